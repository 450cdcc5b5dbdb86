"""A run whose workdir is `gs://...`, against an emulator of the object store."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import tiny_language
from etils import epath
from processes import Processes, free_port, run

from easy_jax.io import files, metrics_log
from easy_jax.train.loss_table import LossTable

pytestmark = pytest.mark.slow

BUCKET = "bucket"


@pytest.fixture(scope="module")
def store():
    """Starts the emulator; from here on, all clients talk to it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "gcp_storage_emulator",
            "start",
            "--host=127.0.0.1",
            f"--port={port}",
            "--in-memory",
            f"--default-bucket={BUCKET}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b/{BUCKET}").close()
            break
        except OSError:
            time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # the emulator has none
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        yield f"gs://{BUCKET}"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_language.write_folder(tmp_path_factory.mktemp("model"), train=80)


def test_what_is_written_is_read(store):
    target = files.path(f"{store}/a/lines.jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    for part in ("one", "two"):
        lines = files.Lines(target)
        lines.append(part)
        lines.close()
    assert target.read_text() == "one\ntwo\n"
    files.write(target, "three")
    assert target.read_text() == "three"
    assert [found.name for found in target.parent.glob("*.jsonl")] == ["lines.jsonl"]


def test_the_log_is_written_anew_by_every_flush(store):
    workdir = f"{store}/logged"
    for step in (1, 2):
        log = metrics_log.MetricsLog(workdir)
        log.write("stage", "train", step, {"loss": 0.5})
        log.flush()
        assert [entry["step"] for entry in metrics_log.read(workdir)] == list(range(1, step + 1))
        log.close()
    assert list((epath.Path(workdir) / "tensorboard" / "stage").iterdir())


def test_scoring_is_stopped_continued_and_the_same(root, store, folder, tmp_path):
    """Not training: Orbax writes to the store on its own, which the emulator is too simple for."""

    def arguments(workdir):
        return ["score", f"--config=tests/tiny_language.py:{folder}", f"--workdir={workdir}"]

    local, remote = tmp_path / "run", f"{store}/runs/one"
    run(root, arguments(local), devices=1)
    with Processes(root, arguments(remote), devices=1) as stopped:
        while len(list(epath.Path(remote).glob("loss_table/part-*"))) < 2:
            assert stopped.all[0].poll() is None, stopped.wait()
            time.sleep(0.01)
        stopped.signal(0, signal.SIGTERM)
        codes, _, complaints = stopped.wait()
    assert codes == [75], complaints
    parts = len(list(epath.Path(remote).glob("loss_table/part-*")))
    assert 2 <= parts < 10
    run(root, arguments(remote), devices=1)
    ours, theirs = LossTable.open(f"{remote}/loss_table"), LossTable.open(local / "loss_table")
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.temperature == theirs.temperature
    assert ours.token_temperature == theirs.token_temperature


def test_without_a_client_the_error_says_what_to_install(root, folder):
    """`gs://` needs gcsfs, which is an extra."""
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from easy_jax.main import cli\n"
        f"sys.argv = ['easy-jax', 'run', '--config=tests/tiny_language.py:{folder}', "
        "'--workdir=gs://bucket/run']\n"
        "cli()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}"},
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert "pip install 'easy-jax[gcs]'" in result.stderr
