"""Kills a run where `faults.py` does not, and gives the same command again.

  python tests/faults/kills.py [--count 40] [--seed 0]

While it imports, opens its workdir, compiles, completes the loss table, measures, goes from one
stage to the next, writes results and report, exports; a language experiment, and the quickstart
with images. Every third is killed a second time, at a random moment of the continuation. The same
command must then end without a flag, with loss tables, checkpoints, results and exported models
bit for bit those of a calm run.
"""

import json
import random
import subprocess
import sys
import tempfile
import time

import attacks
from attacks import LANGUAGE, ROOT, VISION

TRIES = 4  # a moment may be missed


def _exists(*names):
    return lambda workdir: any((workdir / name).exists() for name in names)


def _parts(count):
    return lambda workdir: sum(1 for _ in workdir.glob("loss_table/**/part-*.parquet")) >= count


def _completed(workdir):
    """All parts are there, and the metadata are about to say so, or do."""
    return _parts(BATCHES)(workdir)


def _cells(count):
    def there(workdir):
        path = workdir / "cells.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= count

    return there


def _stages(count):
    """Finished checkpoints."""

    def there(workdir):
        stages = {
            path.parent
            for path in workdir.glob("checkpoints/**/[0-9]*")
            if path.name.isdigit() and (path / "state").exists()
        }
        return len(stages) >= count

    return there


def _last_checkpoint(workdir):
    return (workdir / "checkpoints" / "all-flow" / str(BATCHES)).exists()


BATCHES = 6  # of the language experiment
AT_ONCE = _exists("")  # as soon as the folder is there
# Kind, command, when, and how much later at most, in seconds.
MOMENTS = {
    "importing": (LANGUAGE, "run", None, 3.0),
    "opening the workdir": (LANGUAGE, "run", AT_ONCE, 0.002),
    "its configuration is written": (
        LANGUAGE,
        "run",
        _exists("config.json", "config.json.tmp"),
        0.01,
    ),
    "loading and compiling": (LANGUAGE, "run", _exists("config.json"), 1.0),
    "compiling anew": (LANGUAGE, "run", _exists("config.json"), 4.0),
    "the first part": (LANGUAGE, "run", _parts(1), 0.01),
    "completing the loss table": (LANGUAGE, "run", _completed, 0.02),
    "between scoring and training": (LANGUAGE, "run", _completed, 0.3),
    "measuring the base model": (LANGUAGE, "run", _completed, 0.6),
    "its first measurement is written": (LANGUAGE, "run", _cells(1), 0.002),
    "between measuring and training": (LANGUAGE, "run", _cells(1), 0.2),
    "measuring the trained model": (LANGUAGE, "run", _last_checkpoint, 0.5),
    "its last measurement is written": (LANGUAGE, "run", _cells(2), 0.005),
    "writing the results": (LANGUAGE, "run", _exists("results.json", "results.json.tmp"), 0.005),
    "writing the report": (LANGUAGE, "run", _exists("results.json"), 0.5),
    "before the export": (LANGUAGE, "export", _last_checkpoint, 0.1),
    "exporting": (LANGUAGE, "export", _exists("exported", "exported/flow"), 0.01),
    "the exported model": (LANGUAGE, "export", _exists("exported/flow/model.safetensors"), 0.01),
    "images: opening the workdir": (VISION, "run", AT_ONCE, 0.01),
    "images: the first stage": (VISION, "run", _exists("checkpoints/seed0"), 0.5),
    "images: between two stages": (VISION, "run", _stages(1), 0.1),
    "images: scoring": (VISION, "run", _exists("loss_table"), 0.1),
    "images: a later stage": (VISION, "run", _stages(4), 0.2),
    "images: measuring": (VISION, "run", _cells(1), 0.05),
    "images: between measurements": (VISION, "run", _cells(2), 0.05),
    "images: writing the report": (VISION, "run", _exists("results.json"), 0.6),
}


class Killer:
    """Kills the runs of a bench."""

    def __init__(self, bench, seed):
        self.bench = bench
        self.draw = random.Random(seed)

    def kill(self, name, workdir):
        """Whether the run was alive to be killed at that moment."""
        kind, command, moment, late = MOMENTS[name]
        if moment is None:
            return self._kill_import(workdir, late)
        environment = {}
        if name == "compiling anew":
            environment["JAX_COMPILATION_CACHE_DIR"] = str(workdir) + "-compilations"
        run = self.bench.start(workdir, kind, command, environment=environment)
        came = attacks.until(lambda: moment(workdir), run)
        time.sleep(late * self.draw.random())
        if not run.is_over:
            run.kill()
        ended = run.wait()
        assert ended.outcome in ("killed", "finished"), ended
        return came and ended.outcome == "killed"

    def _kill_import(self, workdir, late):
        """Of a Python that has imported nothing yet."""
        given = self.bench.arguments(workdir)
        run = subprocess.Popen(
            [sys.executable, "-m", "easy_jax.main", *given],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(late * self.draw.random())
        run.kill()
        return run.wait() < 0

    def kill_again(self, name, workdir):
        """At any moment of the continuation."""
        kind, command, *_ = MOMENTS[name]
        run = self.bench.start(workdir, kind, command)
        time.sleep(0.1 + 3.0 * self.draw.random())
        if not run.is_over:
            run.kill()
        return run.wait().outcome == "killed"

    def outcome(self, name, twice):
        """Of a kill, or two, and the same command again; and a detail."""
        kind, command, *_ = MOMENTS[name]
        for _ in range(TRIES):
            workdir = self.bench.workdir()
            if self.kill(name, workdir):
                break
        else:
            return "missed", f"{TRIES} times"
        detail = _left(workdir)
        if twice and self.kill_again(name, workdir):
            detail += f"; killed again, {_left(workdir)}"
        ended = self.bench.again(workdir, kind, command)
        if ended.outcome != "finished":
            return ended.outcome, f"left {detail}; {ended.err[-300:]}"
        different = self.bench.differences(workdir, kind, command)
        if different:
            return "different", f"left {detail}; {', '.join(different[:5])}"
        return "bit-identical", f"left {detail}"


def _left(workdir):
    """What a kill left, in words."""
    if not workdir.exists():
        return "nothing"
    parts = sum(1 for _ in workdir.glob("loss_table/**/part-*"))
    complete = "no metadata"
    for path in workdir.glob("loss_table/**/metadata.json"):
        complete = "complete" if json.loads(path.read_text()).get("complete") else "incomplete"
    names = sorted(path.name for path in workdir.iterdir() if path.is_file())
    unfinished = sum(1 for path in workdir.rglob("*tmp*"))
    return f"{', '.join(names)}; {parts} parts, {complete}; {unfinished} unfinished files"


def attack(names, seed, folder, tally):
    """A kill for each of the names."""
    killer = Killer(attacks.Bench(folder, train=8 * BATCHES), seed)
    for number, name in enumerate(names):
        outcome, detail = killer.outcome(name, twice=number % 3 == 2)
        tally.add(f"{number + 1} {name}", outcome, detail)


def main(argv=None):
    args = attacks.arguments(__doc__, count=40, argv=argv)
    tally = attacks.Tally("bit-identical")
    names = [list(MOMENTS)[number % len(MOMENTS)] for number in range(args.count)]
    with tempfile.TemporaryDirectory() as folder:
        attack(names, args.seed, folder, tally)
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
