"""The command line from end to end, in processes of its own; killed, repeated, in parts."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from easy_jax.train.loss_table import LossTable

pytestmark = pytest.mark.slow

METHODS = ("standard", "flow")
EPOCHS = 8  # of pre-training: 16 steps of 64 out of 128 letters
CONFIG = (
    "--config=configs/quickstart.py:tiny",
    *(f"--config.only={method}" for method in METHODS),
    "--config.save_every_steps=1",
    "--config.log_every_steps=1",
    f"--config.pretrain.epochs={EPOCHS}",
)
ROW_KEYS = {
    "method",
    "seed",
    "label_noise",
    "learning_rate",
    "pretrain_before",
    "pretrain_after",
    "target",
    "mean",
    "seconds",
}
STAGES = {
    "seed0/pretrain",
    "seed0/noise0.3/probe",
    "seed0/noise0.3/lr0.03/pretrained-all",
    "seed0/noise0.3/lr0.03/probe-all-flow",
    "seed0/noise0.3/lr0.03/probe-all-flow-head-unweighted",
}


class CommandLine:
    """Starts `python -m easy_jax.main` in the repository, on one device."""

    def __init__(self, root):
        self.root = root
        self.env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        # The first process compiles for all of them; conftest.py sets the folder.
        self.env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self.env["PYTHONPATH"] = str(root)
        self.env["COLUMNS"] = "200"

    def start(self, command, workdir):
        return subprocess.Popen(
            [sys.executable, "-m", "easy_jax.main", command, *CONFIG, f"--workdir={workdir}"],
            cwd=self.root,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(self, command, workdir):
        """What a command that succeeds prints."""
        process = self.start(command, workdir)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        return out


@pytest.fixture(scope="module")
def command_line(root):
    return CommandLine(root)


@pytest.fixture(scope="module")
def whole(command_line, tmp_path_factory):
    """The workdir of an uninterrupted run, and what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "workdir"
    return workdir, command_line("run", workdir)


def read_results(workdir):
    return json.loads((workdir / "results.json").read_text())


def rows_without_time(workdir):
    """The results, but for `seconds` in every row, and the checksum over them."""
    results = read_results(workdir)
    del results["checksum"]
    for row in (row for rows in results.values() for row in rows if isinstance(row, dict)):
        row.pop("seconds", None)
    return results


def metrics_by_step(workdir):
    """Logged values but for the speed, in full precision; steps that were taken again after a
    kill count once."""
    entries = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        (entry["stage"], entry["kind"], entry["step"]): entry
        for entry in entries
        if entry["kind"] != "speed"
    }


def files(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_same_outcome(ours, theirs):
    assert rows_without_time(ours) == rows_without_time(theirs)
    assert metrics_by_step(ours) == metrics_by_step(theirs)
    one, two = (LossTable.open(d / "loss_table" / "seed0-noise0.3") for d in (ours, theirs))
    assert one.fingerprint() == two.fingerprint()
    assert one.metadata == two.metadata


def test_run_prints_the_table(whole):
    _, printed = whole
    for method in METHODS:
        assert re.search(rf"\b{method}\b[^\n]*0\.03[^\n]*\d+\.\d", printed)
    assert re.search(r"method.*retained.*target.*mean", printed)
    assert "report.html" in printed


def test_run_writes_the_results(whole):
    workdir, _ = whole
    rows = read_results(workdir)["results"]
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert (row["seed"], row["label_noise"], row["learning_rate"]) == (0, 0.3, 0.03)
        for key in ("pretrain_before", "pretrain_after", "target"):
            assert 0.0 <= row[key] <= 100.0
        assert row["mean"] == pytest.approx((row["pretrain_after"] + row["target"]) / 2)
        assert row["seconds"] > 0
    assert rows[0]["pretrain_before"] == rows[1]["pretrain_before"]


def test_run_leaves_an_artefact_of_every_step(whole):
    workdir, _ = whole
    config = json.loads((workdir / "config.json").read_text())
    assert config["pretrain"]["epochs"] == EPOCHS
    assert config["only"] == list(METHODS)
    assert LossTable.open(workdir / "loss_table" / "seed0-noise0.3").num_examples == 128
    metrics = metrics_by_step(workdir)
    assert {stage for stage, _, _ in metrics} == STAGES
    assert {kind for _, kind, _ in metrics} == {"train", "validation"}
    for stage in STAGES:
        last = 2 * EPOCHS if stage == "seed0/pretrain" else 2
        steps = [step for name, kind, step in metrics if (name, kind) == (stage, "train")]
        assert steps == list(range(1, last + 1))
        saved = [path.name for path in (workdir / "checkpoints" / stage).iterdir()]
        assert str(last) in saved
        events = list((workdir / "tensorboard" / stage).glob("events.out.tfevents.*"))
        assert events and all(path.stat().st_size > 0 for path in events)


def test_report_is_one_page_without_network(whole):
    workdir, _ = whole
    page = (workdir / "report.html").read_text()
    pictures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) >= 4
    outside = re.compile(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:|//)""", re.IGNORECASE)
    for text in [page, *(base64.b64decode(picture).decode() for picture in pictures)]:
        assert not outside.search(text)
        assert "<script" not in text
    for method in METHODS:
        assert method in page


def test_the_same_command_again_finds_all_done(whole, command_line):
    workdir, _ = whole
    before, results = files(workdir / "checkpoints"), read_results(workdir)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    table = files(workdir / "loss_table")
    printed = command_line("run", workdir)
    assert "all is done: 2 results" in printed
    assert str(workdir / "checkpoints") in printed
    assert re.search(r"\bflow\b[^\n]*0\.03", printed)
    assert files(workdir / "checkpoints") == before
    assert files(workdir / "loss_table") == table
    assert (workdir / "metrics.jsonl").read_bytes() == metrics  # not one step was taken
    assert read_results(workdir) == results  # `seconds` included


def wait_for_saves(process, saves):
    """Until four steps are saved."""
    deadline = time.monotonic() + 600
    while not any(path.name.isdigit() and int(path.name) >= 4 for path in saves.glob("*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_says_what_is_saved(command_line, tmp_path):
    saves = tmp_path / "checkpoints" / "seed0" / "pretrain"
    # The background job of a shell, which this may be, ignores Ctrl-C, and so do its processes.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = command_line.start("run", tmp_path)
    signal.signal(signal.SIGINT, before)
    wait_for_saves(process, saves)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    (line,) = err.splitlines()
    found = re.fullmatch(
        r"easy-jax: interrupted in seed0/pretrain after (\d+) of 16 steps; saved up to (\d+) in "
        r"(\S+); the same command continues",
        line,
    )
    assert 4 <= int(found[2]) <= int(found[1]) < 16 and found[3] == str(saves)
    assert (saves / found[2]).is_dir()
    begins = out.splitlines()[:3]
    assert re.fullmatch(rf"quickstart-tiny: on 1 \S+ device, in {tmp_path}", begins[0])
    assert begins[1:] == ["5 stages, 24 training steps in all", "seed0/pretrain: 16 steps"]


def test_killed_and_run_again_gives_the_same_results(whole, command_line, tmp_path):
    workdir = tmp_path / "workdir"
    saves = workdir / "checkpoints" / "seed0" / "pretrain"
    process = command_line.start("run", workdir)
    wait_for_saves(process, saves)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "results.json").exists()
    assert len(metrics_by_step(workdir)) < 2 * EPOCHS

    printed = command_line("run", workdir)
    found = re.search(
        r"seed0/pretrain: continues after \d+ of 16 steps, from checkpoint (\S+)", printed
    )
    assert 4 <= int(found[1].rsplit("/", 1)[1]) < 2 * EPOCHS
    assert found[1].startswith(str(saves))
    assert "all is done" not in printed
    kept = sorted(int(path.name) for path in saves.iterdir())
    assert kept == [2 * EPOCHS - 1, 2 * EPOCHS]  # the last two
    assert_same_outcome(workdir, whole[0])


def test_the_steps_one_by_one_give_the_same_results(whole, command_line, tmp_path):
    workdir = tmp_path / "workdir"
    command_line("score", workdir)
    assert LossTable.open(workdir / "loss_table" / "seed0-noise0.3").num_examples == 128
    assert {stage for stage, _, _ in metrics_by_step(workdir)} == {
        "seed0/pretrain",
        "seed0/noise0.3/probe",
    }
    printed = command_line("train", workdir)
    checkpoint = workdir / "checkpoints" / "seed0/pretrain" / str(2 * EPOCHS)
    assert f"seed0/pretrain: done, from checkpoint {checkpoint}" in printed
    assert {stage for stage, _, _ in metrics_by_step(workdir)} == STAGES
    assert not (workdir / "results.json").exists()
    before = files(workdir / "checkpoints")
    command_line("evaluate", workdir)
    assert [row["method"] for row in read_results(workdir)["results"]] == list(METHODS)
    assert not (workdir / "report.html").exists()
    command_line("report", workdir)
    assert (workdir / "report.html").exists()
    assert files(workdir / "checkpoints") == before
    assert_same_outcome(workdir, whole[0])
