"""launch/: scripts without findings, and runs on TPU VMs in dry runs and from end to end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_cloud import (  # noqa: F401
    GKE,
    RUN,
    SECRET,
    SLICE,
    TPU,
    WORKDIR,
    XPK,
    cloud_fixture,
    dry_fixture,
    repository_fixture,
    words,
)

SCRIPTS = ("tpu_vm.sh", "babysit.sh", "gke.sh", "xpk.sh", "common.sh", "worker.sh", "slurm.sbatch")


def shellcheck(file):
    """What it finds; its program is installed beside Python's."""
    program = Path(sys.executable).with_name("shellcheck")
    return subprocess.run([program, "-x", file], capture_output=True, text=True).stdout


@pytest.mark.slow
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
        (["--accelerator-type=v6e-8", "--spot"], ["--node-id=flow-1", "v2-alpha-tpuv6e", "--spot"]),
        (
            ["--accelerator-type=v5p-128", "--node-count=3", "--reserved", "--project=p-1"],
            ["--node-count=3", "--node-prefix=flow-1", "v2-alpha-tpuv5", "--reserved"],
        ),
        (
            ["--accelerator-type=v4-8", "--create-flag=--network=n", "--runtime-version=mine"],
            ["--node-id=flow-1", "mine", "--network=n"],
        ),
    ],
)
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
    start = next(c for c in commands if "worker.sh start" in c[-1])
    assert {"--node=all", "--worker=all"} <= set(start)
    remote = words(start[-1].removeprefix("--command="))
    assert remote == ["bash", "easy_jax_flow-1/worker.sh", "start", *RUN, WORKDIR]


def test_babysit_dry_run_is_one_attempt(dry):
    commands, _, _ = dry("babysit.sh", "--attempts=9", *SLICE, "--spot", "--dry-run", "--", *RUN)
    assert commands[0][1:] == [*SLICE, "--spot", "--", *RUN]
    assert [c[4] for c in commands if c[0] == "gcloud"].count("create") == 1


@pytest.mark.slow
def test_tpu_vm_runs_everywhere_and_deletes(cloud):
    setup = "--setup=printf '%s' \"$(hostname) $HOME\" >set-up"
    out, err = cloud.run("tpu_vm.sh", *SLICE, setup, "--secret=HF_TOKEN", "--", *RUN)
    assert "worker 0 trains" in out and "worker 1 trains" not in out
    runs = cloud.read("runs.jsonl")
    assert sorted(run["worker"] for run in runs) == [0, 1]
    assert all(run["argv"] == [*RUN, WORKDIR] for run in runs)
    assert all(run["token"] == SECRET for run in runs)
    (token,) = {run["run_token"] for run in runs}
    assert re.fullmatch("[0-9a-f]{32}", token)
    commands = [call["command"] for call in cloud.read("calls.jsonl")]
    assert token not in out + err + json.dumps(commands)
    # The local tree with its new file, and without the ignored one.
    assert runs[0]["files"] == [".gitignore", "launch", "new", "pyproject.toml", "set-up"]
    assert cloud.calls("gcloud")[-1][4:6] == ["delete", "flow-1"]
    assert not (cloud.folder / "state").exists()
    assert not list(cloud.folder.glob("tmp.*"))  # nor is the file of secrets left here


@pytest.mark.slow
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
    ] * 4
    assert len({run["run_token"] for run in cloud.read("runs.jsonl")}) == 2  # one for every start


@pytest.mark.slow
def test_tpu_vm_joins_the_run_of_a_dead_client(cloud):
    cloud.plan(run="hang")
    client = cloud.start("tpu_vm.sh", *SLICE, "--", *RUN)
    cloud.wait_for("runs.jsonl", 2)
    os.killpg(client.pid, signal.SIGKILL)
    client.communicate()
    for other in (["--", "score", *RUN[1:]], ["--commit=HEAD", "--", *RUN]):
        _, err = cloud.run("tpu_vm.sh", *SLICE, *other, code=2)
        assert "runs another command or version under this run id" in err
    assert not cloud.calls("gcloud", "delete")  # which would have killed the run
    calls = len(cloud.read("calls.jsonl"))
    client = cloud.start("tpu_vm.sh", *SLICE, "--", *RUN)
    cloud.wait_for("calls.jsonl", calls + 6)  # describe twice, scp, install, start, follow
    os.kill(client.pid, signal.SIGTERM)
    out, err = client.communicate(timeout=30)
    assert client.returncode == 143 and "worker 0 trains" in out
    assert sorted(run["worker"] for run in cloud.read("runs.jsonl")) == [0, 1]  # once each
    assert not list(cloud.folder.glob("workers/*/*/secrets"))  # of the one that joined
    assert sorted(cloud.read("saved.jsonl")) == [0, 1]
    assert not (cloud.folder / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "code"),
    [
        (0, 0),
        (2, 2),
        (1, 1),
        (75, 75),
        ({"1": 2, "others": 76}, 2),  # the mistake, not its effect on the peers
        ({"0": 137, "others": 76}, 137),
        ({"1": 76, "others": 75}, 76),
        ("preempt", 75),
    ],
)
def test_tpu_vm_exit_code(cloud, run, code):
    cloud.plan(run=run)
    out, _ = cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=code)
    assert cloud.calls("gcloud", "delete") and not (cloud.folder / "state").exists()
    if run not in (0, "preempt"):  # every worker's log, before it is gone
        assert all(f"worker-{worker}: worker {worker} trains" in out for worker in range(2))


def test_tpu_vm_failed_creation(cloud):
    cloud.plan(create=["error", "FAILED"])
    cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=1)
    assert not cloud.calls("gcloud", "delete")  # there is nothing to delete
    cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=69)
    assert len(cloud.calls("gcloud", "delete")) == 1 and not (cloud.folder / "state").exists()
    assert not cloud.calls("gcloud", "ssh")


@pytest.mark.slow
def test_tpu_vm_counts_the_workers(cloud):
    """gcloud leaves out nodes that it cannot reach and reports success."""
    cloud.plan(reachable=1)
    _, err = cloud.run("tpu_vm.sh", *SLICE, "--", *RUN, code=1)
    assert "1 of 2 workers answered" in err and not cloud.read("runs.jsonl")
    assert not (cloud.folder / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tpu_vm.sh", "babysit.sh"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_deletes(cloud, script, sent):
    cloud.plan(run="hang")
    process = cloud.start(script, *SLICE, "--", *RUN)
    cloud.wait_for("runs.jsonl", 2)
    # Ctrl-C reaches the whole group; SIGTERM only the script.
    (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + sent, err
    assert all(f"easy_jax worker-{worker} exit 75" in out for worker in range(2))
    assert sorted(cloud.read("saved.jsonl")) == [0, 1]
    assert not (cloud.folder / "state").exists()
    assert len(cloud.calls("gcloud", "create")) == 1  # and not tried again


@pytest.mark.slow
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
    ("gke.sh", [*GKE, "--topology=2x2"], "--slices=2", "slices of several hosts only"),
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
