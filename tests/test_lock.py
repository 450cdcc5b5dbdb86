"""One run at a time in a folder: the lock, its owner's death, and who gets it then."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiny_language
from flax import nnx
from fsspec.implementations.memory import MemoryFileSystem
from processes import Processes

from easy_jax import pipeline as train
from easy_jax.config import OptimizerConfig, StageConfig
from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource
from easy_jax.experiments.language import Until
from easy_jax.io import lock_file
from easy_jax.parallel import lock
from easy_jax.parallel.lock import Lock, LockError, LockWarning
from easy_jax.train import scoring
from easy_jax.train.checkpoint import Checkpointer
from easy_jax.train.fitting import fit

HOLDER = """
import sys, time
from easy_jax.parallel import lock
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _holder(folder, seconds=60.0):
    """A process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path):
    process = _holder(tmp_path)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 0.6)
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.1)
    monkeypatch.setattr(lock, "_WATCHED_EVERY", 0.05)
    monkeypatch.setattr(lock, "_dead", set())  # what other tests found to be gone


def _written(folder, **fields):
    """Writes the lock of a process elsewhere into a folder; returns its path."""
    owner = dataclasses.replace(lock._this_process(), **fields)
    path = folder / lock.NAME
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    return path


def _names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_lock_says_whose_it_is_and_leaves_nothing_behind(tmp_path):
    with lock.hold(tmp_path):
        content = json.loads((tmp_path / "run.lock").read_text())
        assert content["pid"] == os.getpid()
        assert _names(tmp_path) == ["run.lock"]
    assert _names(tmp_path) == []


@pytest.mark.slow
def test_another_process_is_refused_and_writes_nothing(tmp_path, holder):
    before = _names(tmp_path), tmp_path.stat().st_mtime_ns
    with pytest.raises(LockError) as refused, lock.hold(tmp_path):
        pass
    assert f"process {holder.pid} on {os.uname().nodename}, since 2" in str(refused.value)
    assert "--take-over" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (_names(tmp_path), tmp_path.stat().st_mtime_ns) == before
    assert holder.poll() is None


@pytest.mark.slow
def test_a_killed_process_leaves_a_lock_that_is_taken_over_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)  # a zombie, which nobody has waited for
    begin = time.monotonic()
    while holder.poll() is None and Path(f"/proc/{holder.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert (tmp_path / "run.lock").exists()
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - begin < 5.0
    assert _names(tmp_path) == []


def test_a_process_id_that_is_in_use_again_is_not_the_owner(tmp_path):
    _written(tmp_path, pid=os.getppid(), started="1")
    with lock.hold(tmp_path):
        pass
    _written(tmp_path, pid=os.getppid(), started=lock._started(os.getppid()))
    with pytest.raises(LockError, match=f"process {os.getppid()}"), lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("elsewhere", [{"kernel": "another", "host": "far"}, {"kernel": "other"}])
def test_a_lock_of_elsewhere_that_is_not_renewed_is_taken_over(tmp_path, short_lease, elsewhere):
    _written(tmp_path, **elsewhere)
    begin = time.monotonic()
    with pytest.warns(LockWarning) as told, lock.hold(tmp_path):
        assert time.monotonic() - begin >= 0.6
    first, last = (str(each.message) for each in told)
    assert "waiting up to 0.6 s to see whether the lock is renewed" in first
    assert "was not renewed for 0.6 s" in last


def test_a_lock_of_elsewhere_that_is_renewed_is_respected(tmp_path, short_lease, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 60.0)
    path, over = _written(tmp_path, kernel="another", host="far"), threading.Event()

    def renew():
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.warns(LockWarning, match=r"process .* on far"),
            pytest.raises(LockError, match=r"process .* on far"),
            lock.hold(tmp_path),
        ):
            pass
    finally:
        over.set()
        thread.join()


def test_the_second_lock_of_a_dead_process_is_not_waited_for(tmp_path, short_lease, monkeypatch):
    """A run holds its workdir and, within, the folder of a stage."""
    (tmp_path / "inner").mkdir()
    for folder in (tmp_path, tmp_path / "inner"):
        _written(folder, kernel="another", host="away")
    with pytest.warns(LockWarning), lock.hold(tmp_path):
        monkeypatch.setattr(lock, "LEASE", 1e6)
        with lock.hold(tmp_path / "inner"):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\xff{", b"[1]", b'{"pid": 1}', b"[" * 100_000])
def test_a_damaged_lock_is_watched_and_taken_over(tmp_path, short_lease, content):
    (tmp_path / lock.NAME).write_bytes(content)
    with pytest.warns(LockWarning, match="an unknown process"), lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("pid", [-1, 0, 2**70, "1"])
def test_a_process_id_that_is_none_is_not_asked_for(tmp_path, pid):
    content = {**dataclasses.asdict(lock._this_process()), "pid": pid}
    found = lock_file.Found(json.dumps(content).encode(), 0)
    assert found.owner is None or lock._is_alive(found.owner) is False


def test_without_proc_a_process_that_is_there_is_watched(tmp_path, short_lease, monkeypatch):
    monkeypatch.setattr(lock, "_kernel", lambda: "")
    _written(tmp_path, pid=os.getppid(), started="", token="0")
    with pytest.warns(LockWarning) as told, lock.hold(tmp_path):
        pass
    assert "was not renewed" in str(told[-1].message)
    gone = subprocess.Popen(["true"])
    gone.wait()
    _written(tmp_path, pid=gone.pid, started="", token="0")
    with lock.hold(tmp_path):
        pass


@pytest.mark.slow
def test_take_over(tmp_path, holder):
    with lock.hold(tmp_path, take_over=True):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert _names(tmp_path) == []


def test_who_lost_the_lock_finds_out_and_leaves_the_other_ones(tmp_path, short_lease):
    with lock.hold(tmp_path):
        lock.check(tmp_path)
        path = _written(tmp_path, kernel="another", host="far")
        time.sleep(0.3)  # the thread renews its own lock only
        assert json.loads(path.read_text())["host"] == "far"
        with pytest.raises(LockError, match=r"is now held by process .* on far"):
            lock.check(tmp_path)
    assert json.loads(path.read_text())["host"] == "far"


def test_the_lock_is_renewed(tmp_path, short_lease):
    with lock.hold(tmp_path):
        first = (tmp_path / "run.lock").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "run.lock").stat().st_mtime_ns > first


@pytest.mark.parametrize("dead", [False, True], ids=["free", "abandoned"])
def test_of_many_who_come_at_once_one_wins(tmp_path, dead):
    """Threads count as other owners: each lock has a token of its own."""
    barrier = threading.Barrier(8)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if dead:
            _written(folder, pid=os.getppid(), started="1")
        held, refused = [], []

        def take(folder=folder, held=held, refused=refused):
            mine = Lock(folder / lock.NAME)
            barrier.wait()
            try:
                while not mine.attempt():
                    pass
                held.append(mine)
            except LockError:
                refused.append(mine)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 7)
        assert _names(folder) == ["run.lock"]
        held[0].release()
        assert _names(folder) == []


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with lock.hold(tmp_path):
        assert _names(tmp_path) == ["run.lock"]
        with pytest.raises(LockError), lock.hold(tmp_path):
            pass
    assert _names(tmp_path) == []


@pytest.mark.parametrize("conditional", [True, False])
def test_an_object_store(tmp_path, conditional, monkeypatch):
    """fsspec's store in memory; also one that knows no write on a condition."""
    store = MemoryFileSystem()
    monkeypatch.setattr(store, "store", {})
    if not conditional:
        monkeypatch.setattr(
            store, "pipe_file", lambda *args: MemoryFileSystem.pipe_file(store, *args)
        )
    monkeypatch.setattr(lock_file, "at", lambda path: lock_file._Object(f"memory://{path}"))
    with lock.hold(tmp_path):
        assert [*store.store] == [f"{tmp_path}/run.lock"]
        with pytest.raises(LockError, match="another run"), lock.hold(tmp_path):
            pass
        lock.check(tmp_path)
        mine = store.store[f"{tmp_path}/run.lock"].getvalue()
        lock_file.at(tmp_path / "run.lock").renew(lock_file.Found(mine, 0).owner, 1)
        assert store.store[f"{tmp_path}/run.lock"].getvalue() == mine + b" "
        store.store.clear()
        with pytest.raises(LockError, match="is gone"):
            lock.check(tmp_path)
    assert store.store == {}


def test_a_folder_where_nobody_may_write_is_read(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock_file._File, "create", denied)
    with lock.hold(tmp_path):
        assert _names(tmp_path) == []


# Functions that hold their folder, and runs.


def _loss(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def _source():
    x = np.linspace(0, 1, 16, dtype=np.float32)[:, None]
    return ArraySource({"x": x, "y": 2 * x})


def _fit(directory):
    stage = StageConfig(epochs=1, batch_size=8, optimizer=OptimizerConfig(learning_rate=0.1))
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    return fit(model, _source(), directory, stage=stage, loss_fn=_loss)


@pytest.mark.slow
def test_score_and_fit_refuse_a_folder_in_use(tmp_path, holder):
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    for call in (
        lambda: scoring.score(model, _source(), tmp_path, loss_fn=_loss, batch_size=8),
        lambda: _fit(tmp_path),
    ):
        with pytest.raises(LockError, match=f"process {holder.pid}"):
            call()
    assert _names(tmp_path) == ["run.lock"]


def test_fit_writes_nothing_more_when_its_folder_was_taken_over(tmp_path, monkeypatch):
    save = Checkpointer.save

    def taken(self, *args):
        _written(tmp_path, kernel="another", host="far")
        save(self, *args)

    monkeypatch.setattr(Checkpointer, "save", taken)
    with pytest.raises(LockError, match=r"is now held by process .* on far"):
        _fit(tmp_path)
    assert _names(tmp_path) == ["run.lock"]


@pytest.mark.slow
def test_every_command_refuses_a_workdir_in_use(tmp_path, holder):
    config = tiny_language.get_config(str(tmp_path / "no_model"))
    for until in get_args(Until):
        with pytest.raises(LockError, match=f"process {holder.pid}"):
            train.run(config, tmp_path, until)
    assert _names(tmp_path) == ["run.lock"]


@pytest.mark.slow
def test_two_processes_are_both_refused_in_one_line(root, tmp_path, holder):
    arguments = ["run", "--config=tests/tiny_language.py:none", f"--workdir={tmp_path}"]
    with Processes(root, arguments, count=2) as both:
        codes, _, complaints = both.wait()
    assert codes == [2, 2]
    for complaint in complaints:
        lines = [line for line in complaint.splitlines() if line.startswith("easy-jax: ")]
        assert f"process {holder.pid} on" in lines[0]
    assert _names(tmp_path) == ["run.lock"]


@pytest.mark.slow
def test_the_command_line_takes_over(root, tmp_path, holder):
    """Then it finds that there is no model, which is an error of its own, and gives it back."""
    command = [
        sys.executable,
        "-m",
        "easy_jax.main",
        "run",
        f"--config=tests/tiny_language.py:{tmp_path / 'none'}",
        f"--workdir={tmp_path}",
    ]
    for more, told in ([], f"process {holder.pid}"), (["--take-over"], "none"):
        result = subprocess.run([*command, *more], cwd=root, capture_output=True, text=True)
        assert result.returncode == 2
        assert told in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert lock.NAME not in _names(tmp_path)
