"""launch/: dry runs, schemas, and whole flows against stand-ins for the clouds' clients.

No cloud and no cluster is touched: `fake_cloud.py` plays gcloud (with real shells as workers),
kubectl, xpk, srun and scontrol, and the scripts run for real against it.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import fake_cloud
import jsonschema
import kubernetes_validate
import pytest
import yaml

SECRET = "hf_quite'secret $HOME"
# What a second shell, YAML or Kubernetes would spoil if it were not quoted.
ODD = [
    "--config.a=it's, \"b\" \\ $(HOME) $HOME $$ {x} `id` 100%  two  blanks ",
    "--config.only=flow,standard",
    "--config.b=line\nline\ttab",
    "--config.c=é*?~!#&;|<>()[]",
    "--config.d=",
]
RUN = ["run", "--config=configs/quickstart.py:tiny", *ODD]
TPU = ["--run-id=flow-1", "--zone=us-east5-b", "--runs=gs://bucket/runs"]
SLICE = [*TPU, "--accelerator-type=v5litepod-16", "--poll=0"]
GKE = [
    "--run-id=flow-1", "--runs=gs://bucket/runs", "--image=eu.pkg.dev/p/easy-jax:1",
    "--accelerator=tpu-v5-lite-podslice", "--topology=4x4",
]  # fmt: skip
XPK = [
    "--run-id=flow-1", "--runs=gs://bucket/runs", "--image=eu.pkg.dev/p/easy-jax:1",
    "--cluster=c1", "--tpu-type=v5litepod-16",
]  # fmt: skip
WORKDIR = "--workdir=gs://bucket/runs/flow-1"
SCRIPTS = ("tpu_vm.sh", "babysit.sh", "gke.sh", "xpk.sh", "common.sh", "worker.sh", "slurm.sbatch")


class Cloud:
    """A folder of the stand-ins' state, and the scripts of a repository run against it."""

    def __init__(self, folder, repository, workers=4):
        self.folder, self.repository = folder, repository
        for worker in range(workers):
            (folder / "workers" / str(worker)).mkdir(parents=True)
        fake_cloud.install(folder / "bin", fake_cloud.CLIENTS, folder)
        fake_cloud.install(folder / "worker_bin", fake_cloud.ON_WORKERS, folder)
        for name, text in {
            "hostname": "echo worker-$FAKE_WORKER",
            "tail": 'exec /usr/bin/tail -s 0.05 "$@"',
            "sleep": "exec /usr/bin/sleep 0.05",
        }.items():
            (folder / "worker_bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / "worker_bin" / name).chmod(0o755)
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
        return subprocess.Popen(
            ["bash", self.repository / "launch" / script, *arguments],
            env=self.env, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, script, *arguments, code=0):
        """What the script prints; nothing ever prints or passes on the secret."""
        process = self.start(script, *arguments)
        out, err = process.communicate(timeout=50)
        assert process.returncode == code, out + err
        assert "secret" not in out + err.replace("--secret", "") + json.dumps(self.calls("gcloud"))
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


@pytest.fixture(scope="module")
def repository(root, tmp_path_factory):
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


@pytest.fixture
def cloud(tmp_path, repository):
    return Cloud(tmp_path, repository)


@pytest.fixture
def dry(cloud):
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


def shellcheck(file):
    """What it finds; its program is installed beside Python's."""
    program = Path(sys.executable).with_name("shellcheck")
    return subprocess.run([program, "-x", file], capture_output=True, text=True).stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(root, script):
    file = root / "launch" / script
    subprocess.run(["bash", "-n", file], check=True)
    assert not shellcheck(file)
    assert file.read_text().startswith("#!/usr/bin/env bash\n")


def test_shellcheck_would_find_an_unquoted_variable(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh")


def test_readme_names_every_file(root):
    text = (root / "launch" / "README.md").read_text()
    for file in (root / "launch").iterdir():
        assert f"[{file.name}]({file.name})" in text or file.name == "README.md"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--accelerator-type=v5litepod-4"], ["--node-id=flow-1", "v2-alpha-tpuv5-lite"]),
        (["--accelerator-type=v6e-16", "--spot"], ["--node-id=flow-1", "v2-alpha-tpuv6e", "--spot"]),
        (
            ["--accelerator-type=v5p-128", "--node-count=3", "--reserved", "--project=p-1"],
            ["--node-count=3", "--node-prefix=flow-1", "v2-alpha-tpuv5", "--reserved", "--project=p-1"],
        ),
        (
            ["--accelerator-type=v4-8", "--create-flag=--network=n", "--runtime-version=mine"],
            ["--node-id=flow-1", "mine", "--network=n"],
        ),
    ],
)  # fmt: skip
def test_tpu_vm_dry_run(dry, options, expected):
    commands, out, _ = dry("tpu_vm.sh", "--dry-run", *TPU, *options, "--", *RUN)
    verbs = [command[4] for command in commands if command[0] == "gcloud"]
    assert verbs == ["describe", "create", "describe", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]
    create, *_, delete = [c for c in commands if c[0] == "gcloud" and c[4] in ("create", "delete")]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "flow-1"]
    flags = [f"--runtime-version={flag}" if flag[0] != "-" else flag for flag in expected]
    assert {"--zone=us-east5-b", "--quiet", options[0], *flags} <= set(create)
    assert ("--spot" in create, "--reserved" in create) == ("--spot" in out, "--reserved" in out)
    assert delete[5] == "flow-1" and "--force" in delete and "--quiet" in delete
    assert all("--zone=us-east5-b" in c for c in commands if c[0] == "gcloud")
    start = [c for c in commands if "worker.sh start" in c[-1]][0]
    assert {"--node=all", "--worker=all"} <= set(start)
    remote = words(start[-1].removeprefix("--command="))
    assert remote == ["bash", "easy_jax_flow-1/worker.sh", "start", *RUN, WORKDIR]


def test_babysit_dry_run_is_one_attempt(dry):
    commands, out, _ = dry("babysit.sh", "--attempts=9", *SLICE, "--spot", "--dry-run", "--", *RUN)
    assert commands[0][1:] == [*SLICE, "--spot", "--", *RUN]
    assert [c[4] for c in commands if c[0] == "gcloud"].count("create") == 1


def test_tpu_vm_runs_everywhere_and_deletes(cloud):
    out, _ = cloud.run("tpu_vm.sh", *SLICE, "--secret=HF_TOKEN", "--", *RUN)
    assert "worker 0 trains" in out and "worker 1 trains" not in out
    runs = cloud.read("runs.jsonl")
    assert sorted(run["worker"] for run in runs) == [0, 1, 2, 3]
    assert all(run["argv"] == [*RUN, WORKDIR] for run in runs)
    assert all(run["token"] == SECRET for run in runs)
    # The local tree with its new file, and without the ignored one.
    assert runs[0]["files"] == [".gitignore", "launch", "new", "pyproject.toml"]
    assert cloud.calls("gcloud")[-1][4:6] == ["delete", "flow-1"]
    assert not (cloud.folder / "state").exists()
    assert not list(cloud.folder.glob("tmp.*"))  # nor is the file of secrets left here


def test_tpu_vm_keeps_and_continues_on_what_is_there(cloud):
    options = [*SLICE, "--secret=HF_TOKEN", "--keep", "--commit=HEAD", "--", *RUN]
    _, err = cloud.run("tpu_vm.sh", *options)
    assert "kept; delete it with: gcloud compute tpus queued-resources delete flow-1" in err
    assert (cloud.folder / "state").read_text() == "ACTIVE"
    assert not list(cloud.folder.glob("workers/*/*/secrets"))  # read, then removed
    cloud.run("tpu_vm.sh", *options)
    assert len(cloud.calls("gcloud", "create")) == 1 and not cloud.calls("gcloud", "delete")
    assert [run["files"] for run in cloud.read("runs.jsonl")] == [
        [".gitignore", "launch", "pyproject.toml"]
    ] * 8


def test_tpu_vm_joins_the_run_of_a_dead_client(cloud):
    cloud.plan(run="hang")
    client = cloud.start("tpu_vm.sh", *SLICE, "--", *RUN)
    cloud.wait_for("runs.jsonl", 4)
    os.killpg(client.pid, signal.SIGKILL)
    client.communicate()
    _, err = cloud.run("tpu_vm.sh", *SLICE, "--", "score", *RUN[1:], code=2)
    assert "runs another command under this run id" in err
    assert len(cloud.read("runs.jsonl")) == 4  # and none was started twice
    assert not (cloud.folder / "state").exists()


@pytest.mark.parametrize(
    ("run", "code"),
    [
        (0, 0),
        (2, 2),
        (1, 1),
        (75, 75),
        ({"2": 2, "others": 76}, 2),  # the mistake, not its effect on the peers
        ({"3": 137, "others": 76}, 137),
        ({"1": 76, "others": 75}, 76),
        ("preempt", 75),
    ],
)
def test_tpu_vm_exit_code(cloud, run, code):
    cloud.plan(run=run)
    out, _ = cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=code)
    assert cloud.calls("gcloud", "delete") and not (cloud.folder / "state").exists()
    if run not in (0, "preempt"):  # every worker's log, before it is gone
        assert all(f"worker-{worker}: worker {worker} trains" in out for worker in range(4))


def test_tpu_vm_failed_creation(cloud):
    cloud.plan(create=["error", "FAILED"])
    cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=1)
    assert not cloud.calls("gcloud", "delete")  # there is nothing to delete
    cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=69)
    assert len(cloud.calls("gcloud", "delete")) == 1 and not (cloud.folder / "state").exists()
    assert not cloud.calls("gcloud", "ssh")


def test_tpu_vm_counts_the_workers(cloud):
    """gcloud leaves out nodes that it cannot reach and reports success."""
    cloud.plan(reachable=3)
    _, err = cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=1)
    assert "3 of 4 workers answered" in err and not cloud.read("runs.jsonl")
    assert not (cloud.folder / "state").exists()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "babysit.sh"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_deletes(cloud, script, sent):
    cloud.plan(run="hang")
    process = cloud.start(script, *SLICE, "--", *RUN)
    cloud.wait_for("runs.jsonl", 4)
    # Ctrl-C reaches the whole group; SIGTERM only the script.
    (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + sent, err
    assert sorted(cloud.read("saved.jsonl")) == [0, 1, 2, 3]
    assert not (cloud.folder / "state").exists()
    assert len(cloud.calls("gcloud", "create")) == 1  # and not tried again


@pytest.mark.parametrize(
    ("plan", "options", "attempts", "code"),
    [
        ({"run": ["preempt", 76, 0]}, [], 3, 0),
        ({"create": ["FAILED", "ok"]}, [], 2, 0),
        ({"run": ["preempt", 2, 0]}, [], 2, 2),
        ({"run": 1}, ["--crashes=2"], 2, 1),
        ({"run": [1, 75, 1, 0]}, ["--crashes=2"], 4, 0),
        ({"run": 75}, ["--attempts=3"], 3, 75),
    ],
)
def test_babysit(cloud, plan, options, attempts, code):
    cloud.plan(**plan)
    options = [*options, "--backoff=0", *SLICE, "--spot", "--secret=HF_TOKEN"]
    cloud.run("babysit.sh", *options, "--", *RUN, code=code)
    creations = cloud.calls("gcloud", "create")
    assert len(creations) == attempts
    assert all(call == creations[0] for call in creations)
    assert all({"flow-1", "--spot"} <= set(call) for call in creations)
    assert {tuple(run["argv"]) for run in cloud.read("runs.jsonl")} == {(*RUN, WORKDIR)}
    assert {run["token"] for run in cloud.read("runs.jsonl")} == {SECRET}
    assert not (cloud.folder / "state").exists()


BAD_OPTIONS = [
    ("tpu_vm.sh", SLICE, "--run-id=Bad_Name", "lower-case letters"),
    ("tpu_vm.sh", SLICE, "--run-id=a;reboot", "lower-case letters"),
    ("tpu_vm.sh", SLICE, "--zone=", "--zone is missing"),
    ("tpu_vm.sh", SLICE, "--zone=us-east5", "a zone like"),
    ("tpu_vm.sh", SLICE, "--accelerator-type=v5e-16", "v5e is called v5litepod-N"),
    ("tpu_vm.sh", SLICE, "--accelerator-type=h100", "a type like"),
    ("tpu_vm.sh", SLICE, "--node-count=0", "a number of slices"),
    ("tpu_vm.sh", SLICE, "--runs=runs", "a folder that all workers share"),
    ("tpu_vm.sh", SLICE, "--secret=NOT_SET_HERE", "NOT_SET_HERE is not set"),
    ("tpu_vm.sh", SLICE, "--secret=HF-TOKEN", "the name of an environment variable"),
    ("tpu_vm.sh", [*SLICE, "--spot"], "--reserved", "exclude each other"),
    ("tpu_vm.sh", SLICE, "--commit=no-such", "no revision of this repository"),
    ("tpu_vm.sh", SLICE, "--config=x", "unknown option --config=x"),
    ("babysit.sh", SLICE, "--attempts=0", "a positive number"),
    ("gke.sh", GKE, "--topology=16", "a topology like 4x4"),
    ("gke.sh", GKE, "--topology=1x3", "no multiple of --chips-per-host=4"),
    ("gke.sh", GKE, "--image=a b", "an image's name"),
    ("xpk.sh", XPK, "--tpu-type=v5", "a type like v5litepod-16"),
]


@pytest.mark.parametrize(("script", "options", "bad", "message"), BAD_OPTIONS)
def test_bad_options(cloud, script, options, bad, message):
    _, err = cloud.run(script, *options, bad, "--", *RUN, code=2)
    assert message in err and not cloud.read("calls.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command after --"),
        (["fly", "--config=x"], "run, score, train, evaluate, export or report"),
        (["run"], "--config=configs/FILE.py is missing"),
        (["run", "--config=x", "--workdir=/x"], "--workdir is set by --runs and --run-id"),
    ],
)
@pytest.mark.parametrize(
    ("script", "options"), [("tpu_vm.sh", SLICE), ("gke.sh", GKE), ("xpk.sh", XPK)]
)
def test_bad_arguments(cloud, script, options, arguments, message):
    _, err = cloud.run(script, *options, "--", *arguments, code=2)
    assert message in err and not cloud.read("calls.jsonl")
