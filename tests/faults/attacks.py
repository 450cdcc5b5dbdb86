"""What the attack scripts share: tiny experiments, their runs, and how each of these ended.

Everything is judged from outside: by exit codes, what is printed, and what the files hold.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import tiny_language  # noqa: E402
from forks import Forked  # noqa: E402

from easy_jax.cli import errors  # noqa: E402
from easy_jax.train.loss_table import LossTable  # noqa: E402

LANGUAGE, VISION = "language", "vision"


def arguments(description, count, argv=None):
    """`--count` and `--seed` of a script."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Tally:
    """Prints an outcome a line, and counts them.

    Args:
      right: the outcomes that are as they should be.
    """

    def __init__(self, *right, quiet=False):
        self._right = right
        self._quiet = quiet
        self.counts = collections.Counter()
        self.wrong = []
        self._by_kind = collections.defaultdict(collections.Counter)

    def add(self, name, outcome, detail="", kind=None):
        """One attack; `kind`: what it is counted under besides."""
        self.counts[outcome] += 1
        if kind is not None:
            self._by_kind[kind][outcome] += 1
        detail = " ".join(detail.split())[:240]
        line = f"{name}: {outcome}{f' ({detail})' if detail else ''}"
        if outcome not in self._right:
            self.wrong.append(line)
        if outcome not in self._right or not self._quiet:
            print(line, flush=True)

    def finish(self):
        """Prints the counts; the exit code: 1 if an outcome was wrong."""
        for kind, counts in self._by_kind.items():
            summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
            print(f"{kind}: {summary}")
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.most_common())
        print(f"{self.counts.total()} in all: {counts}; {len(self.wrong)} wrong", flush=True)
        return int(bool(self.wrong))


@contextlib.contextmanager
def silence():
    """Nothing that this process prints as a complaint is seen."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def call(function):
    """Calls a function: `("value", result)`, `("reported", message)` for an error of one line that
    a user can act on, otherwise `("traceback", message)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "value", function()
        except errors.USER_ERRORS as error:
            message = str(error)
            return ("traceback" if "\n" in message.strip() else "reported"), message
        except Exception as error:  # whatever else a user would see as a traceback
            return "traceback", f"{type(error).__name__}: {str(error)[:300]}"


# Runs.


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def outcome(self):
        """`finished`, `killed`, `refused` (one line, exit code 2), `stopped` or `traceback`."""
        if self.code == 0:
            return "finished"
        if self.code == -signal.SIGKILL:
            return "killed"
        if "Traceback" in self.err or not self.last.startswith("easy-jax: "):
            return "traceback"
        return {2: "refused", 75: "stopped", 76: "peers"}.get(self.code, "traceback")

    @property
    def last(self):
        """The last line of complaint."""
        return (self.err.strip().splitlines() or [""])[-1]


class Run(Forked):
    """A command line in a process of its own."""

    def __init__(self, arguments, environment=None):
        super().__init__(arguments, ROOT, environment)

    @property
    def is_over(self):
        return self.poll() is not None

    def wait(self, timeout=300):
        """How it ended."""
        texts = self.communicate(timeout)
        return Ended(self.returncode, *texts)


class Bench:
    """A folder with the tiny experiments, and the results of calm runs of them.

    Args:
      folder: for everything; empty.
      train: examples of the language experiment; it takes 8 a step.
    """

    def __init__(self, folder, train=48):
        self.folder = Path(folder)
        self.model = self.folder / "model"
        self.model.mkdir()
        tiny_language.write_folder(self.model, train=train)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.folder / "compilations"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        self._calm = {}
        self._number = 0

    def workdir(self):
        """The name of a new one."""
        self._number += 1
        return self.folder / f"run{self._number}"

    def arguments(self, workdir, kind=LANGUAGE, command="run", extra=()):
        config = f"tests/tiny_language.py:{self.model}"
        if kind == VISION:
            config = "configs/quickstart.py:tiny"
            extra = ("--config.only=standard,flow,wise_ft", *extra)
        return [command, f"--config={config}", f"--workdir={workdir}", *extra]

    def start(self, workdir, kind=LANGUAGE, command="run", extra=(), environment=None):
        given = self.arguments(workdir, kind, command, extra)
        return Run(given, environment)

    def again(self, workdir, kind=LANGUAGE, command="run", extra=()):
        """To the end."""
        return self.start(workdir, kind, command, extra).wait()

    def calm(self, kind=LANGUAGE, command="run"):
        """The workdir of a run that nothing happens to."""
        key = kind, command
        if key not in self._calm:
            self._calm[key] = self.workdir()
            ended = self.again(self._calm[key], kind, command)
            assert ended.outcome == "finished", ended
        return self._calm[key]

    def differences(self, workdir, kind=LANGUAGE, command="run"):
        """In what its result is not the calm run's, bit for bit; nothing if it is."""
        ours, calm = result(workdir), result(self.calm(kind, command))
        names = sorted(ours.keys() | calm.keys())
        return [name for name in names if not _same(ours.get(name), calm.get(name))]


def result(workdir, with_seconds=False):
    """All that a workdir has to say, by name: weights, numbers and trained parameters."""
    found = {}
    for path in sorted(workdir.glob("**/metadata.json")):
        table = LossTable.open(path.parent)
        name = str(path.parent.relative_to(workdir))
        found |= {f"{name} losses": table.loss_N(), f"{name} weights": table.flow_weights()}
        if table.metadata["token_losses"]:
            found[f"{name} token weights"] = table.flow_token_weights().values
    for stage in sorted({path.parent.parent for path in workdir.glob("checkpoints/**/state")}):
        last = max(int(path.name) for path in stage.iterdir() if path.name.isdigit())
        for name, value in parameters(stage / str(last)).items():
            found[f"{stage.relative_to(workdir)} {last} {name}"] = value
    if (workdir / "results.json").exists():
        rows = json.loads((workdir / "results.json").read_text())
        found["results.json"] = rows if with_seconds else without_seconds(rows)
    for path in sorted(workdir.glob("exported/*/model.safetensors")):
        found[str(path.relative_to(workdir))] = path.read_bytes()
    return found


def parameters(step):
    """The arrays of a checkpoint, read by Orbax alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.restore(step / "state")
    return dict(_leaves(tree))


def _leaves(tree, path=""):
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, value in items:
            yield from _leaves(value, f"{path}.{name}")
    elif tree is not None:
        yield path, np.asarray(tree)


def without_seconds(value):
    """JSON without the times that it took, and the checksums, which are of these, too."""
    if isinstance(value, dict):
        items = value.items()
        return {k: without_seconds(v) for k, v in items if k not in ("seconds", "checksum")}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def _same(ours, calm):
    if isinstance(ours, np.ndarray) and isinstance(calm, np.ndarray):
        return ours.dtype == calm.dtype and np.array_equal(
            np.atleast_1d(ours).view(np.uint8), np.atleast_1d(calm).view(np.uint8)
        )
    return type(ours) is type(calm) and ours == calm


same = _same


def until(condition, run, seconds=60):
    """Waits for a moment of a run; whether it came before the run was over."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(FileNotFoundError):  # what was listed may be renamed meanwhile
            if condition():
                return True
        if run.is_over or time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
