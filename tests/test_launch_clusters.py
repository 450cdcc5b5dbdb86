"""launch/ on clusters: GKE's JobSet and image, xpk, SLURM; dry runs, schemas and whole flows."""

import json
import os
import re
import signal
from importlib import metadata

import fake_cloud
import jsonschema
import kubernetes_validate
import pytest
import yaml
from launch_cloud import (  # noqa: F401
    GKE,
    RUN,
    SECRET,
    WORKDIR,
    XPK,
    cloud_fixture,
    dry_fixture,
    repository_fixture,
    words,
)

# A JobSet's fields as its API names them (v1alpha2), of those that are used here.
JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"required": ["name"]},
        "spec": {
            "additionalProperties": False,
            "required": ["failurePolicy", "replicatedJobs"],
            "properties": {
                "failurePolicy": {
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "rules": {
                            "items": {
                                "additionalProperties": False,
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {"enum": ["FailJobSet", "RestartJobSet"]},
                                    "onJobFailureReasons": {"items": {"const": "PodFailurePolicy"}},
                                },
                            }
                        },
                    },
                },
                "replicatedJobs": {
                    "minItems": 1,
                    "items": {
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer"},
                            "template": {
                                "additionalProperties": False,
                                "required": ["spec"],
                                "properties": {"spec": {"type": "object"}},
                            },
                        },
                    },
                },
            },
        },
    },
}


def check_jobset(jobset):
    """Against the JobSet's fields, and its job against Kubernetes' own schema; the job's spec."""
    jsonschema.validate(jobset, JOBSET)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job_alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job}
    kubernetes_validate.validate(job_alone, "1.31", strict=True)
    return job


@pytest.mark.parametrize(
    ("options", "slices", "hosts", "chips"),
    [
        ([], 1, 4, 4),
        (["--slices=3", "--spot", "--namespace=team", "--max-restarts=7"], 3, 4, 4),
        (["--topology=2x4", "--chips-per-host=8"], 1, 1, 8),
        (["--topology=4x4x8", "--accelerator=tpu-v5p-slice", "--slices=2"], 2, 32, 4),
    ],
)
def test_gke_manifest(dry, options, slices, hosts, chips):
    commands, out, err = dry("gke.sh", "--dry-run", *GKE, *options, "--", *RUN)
    namespace = ["--namespace=team"] if "--namespace=team" in options else []
    assert commands == [["kubectl", *namespace, "create", "--filename=-"]]
    jobset = yaml.safe_load(out.split("--filename=-\n", 1)[1])
    job = check_jobset(jobset)
    spec = jobset["spec"]
    assert jobset["metadata"]["name"] == "flow-1"
    assert spec["failurePolicy"]["maxRestarts"] == (7 if "--max-restarts=7" in options else 50)
    assert spec["replicatedJobs"][0]["replicas"] == slices
    assert job["parallelism"] == job["completions"] == hosts and job["backoffLimit"] == 0
    # What another attempt would repeat fails the job, for a reason that fails the JobSet.
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == ("--spot" in options)
    topology = [option for option in (*GKE, *options) if option.startswith("--topology")][-1]
    assert topology.endswith("=" + pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"])
    (container,) = pod["containers"]
    (token,) = container["env"]
    assert token["name"] == "EASY_JAX_RUN_TOKEN"
    assert "jobset-uid" in token["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    # Kubernetes makes $ of $$, and leaves what is left of $(NAME) alone.
    assert [word.replace("$$", "$") for word in container["args"]] == [*RUN, WORKDIR]
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", "".join(container["args"]))
    assert f"{' '.join(['kubectl', *namespace])} logs --follow" in err


def test_gke_schema_finds_mistakes(dry):
    _, out, _ = dry("gke.sh", "--dry-run", *GKE, "--", *RUN)
    text = out.split("--filename=-\n", 1)[1]
    for right, wrong in (
        ("parallelism:", "paralelism:"),
        ("restartPolicy: Never", "restartPolicy: 1"),
    ):
        with pytest.raises(kubernetes_validate.ValidationError):
            check_jobset(yaml.safe_load(text.replace(right, wrong)))
    with pytest.raises(jsonschema.ValidationError):
        check_jobset(yaml.safe_load(text.replace("maxRestarts", "maxRetries")))


def test_gke_applies_the_manifest_and_the_secret(cloud, dry):
    _, dry_out, _ = dry("gke.sh", "--dry-run", "--secret=HF_TOKEN", *GKE, "--", *RUN)
    cloud.run("gke.sh", "--secret=HF_TOKEN", *GKE, "--", *RUN)
    secret, jobset = cloud.read("calls.jsonl")
    assert SECRET not in json.dumps(secret["command"]) + json.dumps(jobset)
    assert secret["command"] == ["kubectl", "apply", "--server-side", "--filename=-"]
    secret = yaml.safe_load(secret["stdin"])
    kubernetes_validate.validate(secret, "1.31", strict=True)
    assert secret["metadata"]["name"] == "flow-1" and secret["stringData"] == {"HF_TOKEN": SECRET}
    assert jobset["command"] == ["kubectl", "create", "--filename=-"]
    assert jobset["stdin"] == dry_out.split("create --filename=-\n", 1)[1]
    assert "secretRef" in jobset["stdin"] and 'name: "flow-1"' in jobset["stdin"]


def test_xpk(cloud, dry):
    options = [*XPK, "--num-slices=2", "--zone=us-east5-b", "--xpk-flag=--spot"]
    commands, _, _ = dry("xpk.sh", "--dry-run", *options, "--", *RUN)
    cloud.run("xpk.sh", *options, "--", *RUN)
    assert cloud.calls("xpk") == commands
    (command,) = commands
    assert command[:3] == ["xpk", "workload", "create"]
    assert {
        "--workload=flow-1",
        "--cluster=c1",
        "--tpu-type=v5litepod-16",
        "--num-slices=2",
        "--docker-image=eu.pkg.dev/p/easy-jax:1",
        "--restart-on-exit-codes=75,76",
        "--max-restarts=50",
        "--termination-grace-period-seconds=300",
        "--zone=us-east5-b",
        "--spot",
    } <= set(command)
    inside = command[-1].removeprefix("--command=").replace("$$", "$")  # as Kubernetes does
    assert words(inside) == ["exec", "easy-jax", *RUN, WORKDIR]
    cloud.run("xpk.sh", *options, "--secret=HF_TOKEN", "--", *RUN)
    assert any(word.startswith("--env-file=") for word in cloud.calls("xpk")[-1])
    assert SECRET not in json.dumps(cloud.read("calls.jsonl"))


@pytest.fixture
def slurm(cloud):
    """Two tasks; `easy-jax` is the stand-in."""
    fake_cloud.install(cloud.folder / "venv" / "bin", ("easy-jax",), cloud.folder)
    cloud.env |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "3"}
    return cloud


@pytest.mark.parametrize(
    ("run", "code", "requeued"),
    [
        (0, 0, False),
        (75, 75, True),
        (76, 76, True),
        ({"0": 75, "others": 76}, 76, True),
        (2, 2, False),
        ({"1": 2, "others": 76}, 2, False),  # the highest is not the cause
        ({"1": 134, "others": 76}, 1, False),
    ],
)
def test_slurm_requeues(slurm, run, code, requeued):
    slurm.plan(run=run)
    arguments = [*RUN, "--workdir=/shared/flow-1"]
    slurm.run("slurm.sbatch", *arguments, code=code)
    assert slurm.calls("scontrol") == [["scontrol", "requeue", "7"]] * requeued
    assert [call["argv"] for call in slurm.read("runs.jsonl")] == [arguments] * 2
    (token,) = {call["run_token"] for call in slurm.read("runs.jsonl")}
    assert re.fullmatch("[0-9a-f]{32}", token)
    assert {"--gpu-bind=none", "--kill-on-bad-exit=0"} <= set(slurm.calls("srun")[0])


def test_slurm_requeues_so_often(slurm):
    slurm.plan(run=75)
    slurm.env |= {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}
    _, err = slurm.run("slurm.sbatch", *RUN, "--workdir=/shared/a", code=75)
    assert "restarted 3 times already" in err and not slurm.calls("scontrol")


def test_slurm_cancelled_saves_and_stays_away(slurm):
    slurm.plan(run="hang")
    process = slurm.start("slurm.sbatch", *RUN, "--workdir=/shared/a")
    slurm.wait_for("runs.jsonl", 2)
    os.killpg(process.pid, signal.SIGTERM)  # scancel signals the tasks and the batch shell
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(slurm.read("saved.jsonl")) == [0, 1] and not slurm.calls("scontrol")


def test_slurm_directives_and_dry_run(dry, root):
    text = (root / "launch" / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert directives["signal"] == "TERM@300"  # without B:, so that the tasks get it
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]  # a process for each GPU
    assert {"requeue", "nodes", "time"} <= set(directives)
    first_command = next(line for line in text.splitlines() if line and line[0] != "#")
    assert text.rindex("#SBATCH") < text.index(first_command)  # sbatch reads no further
    commands, out, _ = dry("slurm.sbatch", "--dry-run", *RUN, "--workdir=/shared/a")
    srun, scontrol = commands
    assert srun[0] == "srun" and srun[-len(RUN) - 1 :] == [*RUN, "--workdir=/shared/a"]
    assert scontrol[:2] == ["scontrol", "requeue"] and "75 or 76" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN, "--workdir=runs/a"], "must be a folder that all nodes share"),
        (RUN, "must be a folder that all nodes share"),
        (["run", "--workdir=/a"], "--config=configs/FILE.py is missing"),
        (["fly", *RUN, "--workdir=/a"], "the first argument is"),
        ([*RUN, "--workdir=/a"], "there is no"),
    ],
)
def test_slurm_bad_arguments(cloud, arguments, message):
    _, err = cloud.run("slurm.sbatch", *arguments, code=2)
    assert message in err and not cloud.read("calls.jsonl")


def test_dockerfile(root):
    text = (root / "launch" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    instructions = [line.split(maxsplit=1) for line in lines]
    names = [name for name, _ in instructions]
    assert names[0] == "FROM" and re.fullmatch(r"python:3\.1[1-9]-slim", instructions[0][1])
    assert set(names) <= {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    # Exec form: in shell form a shell would get SIGTERM in easy-jax's place.
    assert names[-1] == "ENTRYPOINT" and json.loads(instructions[-1][1]) == ["easy-jax"]
    copied = [w for name, rest in instructions if name == "COPY" for w in rest.split()[:-1]]
    assert all((root / source).exists() for source in copied)
    assert {"pyproject.toml", "easy_jax", "configs"} <= set(copied)
    extras = metadata.metadata("jax").get_all("Provides-Extra")
    named = re.findall(r"JAX_EXTRA=(\w+)", text)
    assert set(named) == {"tpu", "cuda13"} and set(named) <= set(extras)
    readme = (root / "launch" / "README.md").read_text()
    assert set(re.findall(r"jax\[(\w+)\]", readme)) <= set(extras)
