"""Stand-ins for gcloud, kubectl, xpk, srun and scontrol, and for what runs on a TPU VM's worker.

`install` copies this file under a command's name. They keep everything in one folder: `plan.json`
is what shall happen, `calls.jsonl` what was called, `runs.jsonl` how easy-jax was started. A worker
is a folder, its home, where `gcloud ... ssh` runs its command in a real shell.
"""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

CLIENTS = ("gcloud", "kubectl", "xpk", "srun", "scontrol")
ON_WORKERS = {
    "hostname": "echo worker-$FAKE_WORKER",
    "sleep": "exec /usr/bin/sleep 0.05",
    # python3 -m pip install --quiet --upgrade --target uv uv
    "python3": 'mkdir -p uv/bin && cp "${0%/*}/uv" uv/bin',
    # uv venv ... venv; uv pip install ... ./source 'jax[tpu]' gcsfs
    "uv": """mkdir -p venv/bin
[[ $1 == venv || " $* " == *" ./source jax[tpu] "* && -e source/pyproject.toml ]] || exit 1
cp "$(command -v easy-jax)" venv/bin""",
}


def install(folder: Path, names: tuple[str, ...], cloud: Path) -> None:
    """Executables called `names` in `folder`, which keep their state in `cloud`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).read_text()
    for name in names:
        text = f"#!{sys.executable} -SE\nFAKE_CLOUD = {str(cloud)!r}\n{source}"
        if name in ON_WORKERS:
            text = f"#!/bin/bash\n{ON_WORKERS[name]}\n"
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def planned(cloud: Path, key: str, default: object) -> object:
    """The plan's entry for this attempt; the last one holds for all that follow."""
    entries = json.loads((cloud / "plan.json").read_text()).get(key, [default])
    if not isinstance(entries, list):
        return entries
    return entries[min(attempt(cloud), len(entries)) - 1]


def attempt(cloud: Path) -> int:
    file = cloud / "attempt"
    return int(file.read_text()) if file.exists() else 1


def append(file: Path, entry: object) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")


def gcloud(cloud: Path, argv: list[str]) -> int:
    assert argv[:3] == ["compute", "tpus", "queued-resources"], argv
    state = cloud / "state"
    flags = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    if argv[3] == "create":
        assert not state.exists(), "ALREADY_EXISTS"
        number = attempt(cloud) + 1 if (cloud / "attempt").exists() else 1
        (cloud / "attempt").write_text(str(number))
        what = planned(cloud, "create", "ok")
        if what == "error":
            print("ERROR: PERMISSION_DENIED", file=sys.stderr)
            return 1
        state.write_text("FAILED" if what == "FAILED" else "PROVISIONING")
        return 0
    if not state.exists():
        print("ERROR: (gcloud) NOT_FOUND: no such resource", file=sys.stderr)
        return 1
    if argv[3] == "describe":
        print(state.read_text())
        if state.read_text() == "PROVISIONING":
            state.write_text("ACTIVE")
        return 0
    workers = sorted((cloud / "workers").iterdir())[: int(planned(cloud, "reachable", 99))]
    if argv[3] == "delete":
        state.unlink()
        for worker in workers:
            for pid in worker.glob("*/pid"):
                kill_group(int(pid.read_text()))
            subprocess.run(["rm", "-rf", worker], check=True)
            worker.mkdir()
        return 0
    if state.read_text() != "ACTIVE":
        print("ERROR: the node cannot be reached", file=sys.stderr)
        return 255
    if flags["worker"] != "all":
        workers = workers[int(flags["worker"]) :][:1]
    if argv[3] == "scp":
        assert argv[4] == "--recurse" and argv[6] == f"{Path(argv[5]).name[9:]}:", argv
        for worker in workers:
            subprocess.run(["cp", "--recursive", argv[5], worker], check=True)
        return 0
    assert argv[3] == "ssh"
    path = f"{cloud / 'worker_bin'}:/usr/bin:/bin"
    shells = [
        subprocess.Popen(
            ["/bin/bash", "-c", flags["command"]],
            cwd=worker,
            env={"HOME": str(worker), "PATH": path, "FAKE_WORKER": worker.name},
        )
        for worker in workers
    ]
    return max(shell.wait() for shell in shells)


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def easy_jax(cloud: Path, argv: list[str]) -> int:
    """Ends as the plan says: an exit code, or `preempt`, or `hang` until SIGTERM."""
    worker = int(os.environ.get("FAKE_WORKER") or os.environ["SLURM_PROCID"])

    def save(*_: object) -> None:
        time.sleep(0.2)
        append(cloud / "saved.jsonl", worker)
        sys.exit(75)

    signal.signal(signal.SIGTERM, save)
    append(
        cloud / "runs.jsonl",
        {
            "worker": worker,
            "attempt": attempt(cloud),
            "argv": argv,
            "token": os.environ.get("HF_TOKEN"),
            "run_token": os.environ.get("EASY_JAX_RUN_TOKEN"),
            "files": sorted(file.name for file in Path().iterdir()),
        },
    )
    print(f"worker {worker} trains", flush=True)
    what = planned(cloud, "run", 0)
    if isinstance(what, dict):
        what = what.get(str(worker), what["others"])
    if what == "hang":
        time.sleep(60)
    if what == "preempt":
        (cloud / "state").write_text("SUSPENDED")
        return 76
    return int(what)


def srun(cloud: Path, argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: None)  # the tasks get it too
    while argv[0].startswith("--"):
        argv = argv[1:]
    tasks = [
        subprocess.Popen(argv, env=os.environ | {"SLURM_PROCID": str(task), "SLURM_NTASKS": "2"})
        for task in range(2)
    ]
    return max(task.wait() for task in tasks)


def main(name: str, cloud: Path, argv: list[str]) -> int:
    if name != "easy-jax":
        given = "" if sys.stdin is None or name != "kubectl" else sys.stdin.read()
        append(cloud / "calls.jsonl", {"command": [name, *argv], "stdin": given})
    if name == "gcloud":
        # The copied folder's secrets are read by their owner alone.
        for file in Path(argv[5]).glob("secrets") if argv[3] == "scp" else ():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        return gcloud(cloud, argv)
    if name == "srun":
        return srun(cloud, argv)
    if name == "easy-jax":
        return easy_jax(cloud, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, Path(FAKE_CLOUD), sys.argv[1:]))  # noqa: F821
