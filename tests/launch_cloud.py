"""What the tests of launch/ share: the scripts, run for real against `fake_cloud.py`.

No cloud and no cluster is touched: stand-ins play gcloud (with real shells as workers), kubectl,
xpk, srun and scontrol.
"""

import json
import os
import re
import shutil
import subprocess
import time

import fake_cloud
import pytest

SECRET = "hf_s3cr3t's $HOME"
# What a second shell, YAML or Kubernetes would spoil if it were not quoted.
ODD = [
    '--config.a=it\'s, "b" \\ $(HOME) $HOME $$ {x} `id` 100%  two  blanks ',
    "--config.only=flow,standard",
    "--config.b=line\nline\ttab",
    "--config.c=é*?~!#&;|<>()[]",
    "--config.d=",
]
RUN = ["run", "--config=configs/quickstart.py:tiny", *ODD]
TPU = ["--run-id=flow-1", "--zone=us-east5-b", "--runs=gs://bucket/runs"]
SLICE = [*TPU, "--accelerator-type=v5p-16", "--poll=0"]
GKE = [
    "--run-id=flow-1",
    "--runs=gs://bucket/runs",
    "--image=eu.pkg.dev/p/easy-jax:1",
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x4",
]
XPK = [
    "--run-id=flow-1",
    "--runs=gs://bucket/runs",
    "--image=eu.pkg.dev/p/easy-jax:1",
    "--cluster=c1",
    "--tpu-type=v5litepod-16",
]
WORKDIR = "--workdir=gs://bucket/runs/flow-1"


class Cloud:
    """A folder of the stand-ins' state, and the scripts of a repository run against it."""

    def __init__(self, folder, repository, workers=2):
        self.folder, self.repository = folder, repository
        for worker in range(workers):
            (folder / "workers" / str(worker)).mkdir(parents=True)
        fake_cloud.install(folder / "bin", fake_cloud.CLIENTS, folder)
        on_workers = ("easy-jax", *fake_cloud.ON_WORKERS)
        fake_cloud.install(folder / "worker_bin", on_workers, folder)
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HF_TOKEN": SECRET,
            "EASY_JAX_VENV": str(folder / "venv"),
            "TMPDIR": str(folder),
        }
        self.plan()

    def plan(self, **plan):
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def start(self, script, *arguments):
        # A job in the background of a shell ignores SIGINT, and so would all that it starts.
        with_interrupts = ["env", "--default-signal=INT"]
        return subprocess.Popen(
            [*with_interrupts, "bash", self.repository / "launch" / script, *arguments],
            env=self.env,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script, *arguments, code=0):
        """What the script prints; the secret is never printed, nor on a command line."""
        process = self.start(script, *arguments)
        out, err = process.communicate(timeout=50)
        assert process.returncode == code, out + err
        commands = [call["command"] for call in self.read("calls.jsonl")]
        assert "hf_s3cr3t" not in out + err + json.dumps(commands)
        return out, err

    def read(self, name):
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self, command, verb=None):
        calls = [call["command"] for call in self.read("calls.jsonl")]
        return [call for call in calls if call[0] == command and (not verb or verb in call)]

    def wait_for(self, name, lines):
        deadline = time.monotonic() + 30
        while len(self.read(name)) < lines:
            assert time.monotonic() < deadline, f"{name} has not {lines} lines"
            time.sleep(0.02)


@pytest.fixture(name="repository", scope="module")
def repository_fixture(root, tmp_path_factory):
    """A repository with launch/ as it is here, a changed, a new and an ignored file."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(root / "launch", folder / "launch")
    (folder / "pyproject.toml").write_text("committed")
    (folder / ".gitignore").write_text("ignored\n")
    git = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (folder / "new").write_text("not committed")
    (folder / "ignored").write_text("ignored")
    return folder


@pytest.fixture(name="cloud")
def cloud_fixture(tmp_path, repository):
    return Cloud(tmp_path, repository)


@pytest.fixture(name="dry")
def dry_fixture(cloud):
    """A dry run's commands, each read by a real shell; nothing may have been called."""

    def run(script, *arguments):
        fake_cloud.install(cloud.folder / "bin", ("git", "cp"), cloud.folder)
        out, err = cloud.run(script, *arguments)
        assert not cloud.read("calls.jsonl")
        commands = re.findall(r"^\+ (.*)$", out, flags=re.MULTILINE)
        return [words(command) for command in commands], out, err

    return run


def words(text):
    """The words that bash makes of a command."""
    script = f"printf '%s\\0' {text}"
    printed = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    return printed.stdout.split("\0")[:-1]
