"""Flips every byte of the metadata: the run ends with the same result, or refuses in one line.

  python tests/faults/flips.py [--count N] [--seed 0]

`loss_table/metadata.json`, `cells.jsonl`, `results.json` and `config.json` of a finished run of a
tiny language model, and the JSON items of a stage's checkpoints. Each byte has a bit flipped, is
replaced (a digit by another digit), deleted or doubled; then the table is opened, the same run
called again, or the same stage continued, in one process. 20 more, chosen at random, go through
the command line. `--count` is of a random sample; default: every byte.

Compared are the losses, the weights by example and by token, the temperatures and quantiles,
`results.json` with its seconds, and a stage's parameters and seconds.
"""

import contextlib
import dataclasses
import io
import random
import shutil
import sys
import tempfile
from pathlib import Path

import attacks
import checkpoints
import tiny_language

import easy_jax as ej
from easy_jax.config import replace

BY_COMMAND_LINE = 20
KINDS = ("bit", "digit", "deleted", "doubled")
RUN_FILES = ("config.json", "cells.jsonl", "results.json", "loss_table/metadata.json")
CHECKPOINTS = (("finished", "12"), ("interrupted", "9"))
SUMMARY = ("median", "token_median", "quantiles", "num_rows", "num_tokens", "num_examples")


@dataclasses.dataclass(frozen=True)
class Flip:
    """A byte of a file of `how`: `table`, `run`, or a place of a stage."""

    how: str
    file: str
    place: int
    kind: str

    def apply(self, path, draw):
        content = path.read_bytes()
        byte, at = content[self.place], self.place
        if self.kind == "bit":
            new = bytes([byte ^ (1 << draw.randrange(8))])
        elif self.kind == "digit":
            same_class = b"0123456789" if chr(byte).isdigit() else b"abc{}[],:\"'. -x"
            new = bytes([draw.choice([other for other in same_class if other != byte])])
        else:
            new = b"" if self.kind == "deleted" else bytes([byte, byte])
        path.write_bytes(content[:at] + new + content[at + 1 :])


class Workdir:
    """A finished run, copied anew for every flip, always to the same place."""

    def __init__(self, folder):
        model = folder / "model"
        model.mkdir()
        tiny_language.write_folder(model, train=16)
        config = tiny_language.get_config(str(model))
        self._config = replace(config, {"scoring.rows_per_part": 16})
        self._calm, self.path = folder / "calm", folder / "run"
        self._run()
        self.path.rename(self._calm)
        self.restore()
        self._table, self._all = self.table(), self.everything()
        self.arguments = [
            "evaluate",
            f"--config=tests/tiny_language.py:{model}",
            f"--workdir={self.path}",
            "--config.scoring.rows_per_part=16",
        ]

    def restore(self):
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self._calm, self.path)

    def _run(self):
        with contextlib.redirect_stdout(io.StringIO()), attacks.silence():
            return ej.run(self._config, self.path, "evaluate")

    def table(self):
        """What the loss table says."""
        table = ej.LossTable.open(self.path / "loss_table")
        return {
            "losses": table.loss_N(),
            "weights": table.flow_weights(),
            "token weights": table.flow_token_weights().values,
            "temperatures": [table.temperature, table.token_temperature],
            **{name: table.metadata.get(name) for name in SUMMARY},
        }

    def everything(self):
        """What the run returns and leaves."""
        returned = self._run()
        return {"returned": returned, **attacks.result(self.path, with_seconds=True)}

    def outcome(self, how):
        make, calm = {"table": (self.table, self._table), "run": (self.everything, self._all)}[how]
        kind, found = attacks.call(make)
        return _compared(found, calm) if kind == "value" else (kind, found)

    def command_line(self):
        """The same through the command line."""
        ended = attacks.Run(self.arguments).wait()
        if ended.outcome != "finished":
            return {"refused": "reported"}.get(ended.outcome, ended.outcome), ended.err
        calm = {name: value for name, value in self._all.items() if name != "returned"}
        return _compared(attacks.result(self.path, with_seconds=True), calm)


def _compared(found, calm):
    names = sorted(found.keys() | calm.keys())
    other = [name for name in names if not attacks.same(found.get(name), calm.get(name))]
    return ("silently wrong" if other else "same"), f"{', '.join(other)}"


class Items:
    """The JSON items of the checkpoints of a stage."""

    def __init__(self, folder):
        self._stage = checkpoints.Stage(folder)
        self.path = folder / "damaged"
        self._seconds = {name: self._last_seconds(name) for name in self._stage.places}

    def _last_seconds(self, name):
        return self._stage.fit(self._stage.places[name]).seconds if name == "finished" else None

    def restore(self, name):
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self._stage.places[name], self.path)

    def outcome(self, name):
        with attacks.silence():
            kind, found = attacks.call(lambda: self._stage.fit(self.path))
        if kind != "value":
            return kind, found
        outcome = self._stage.judge(found)
        redone = found.resumed_from < found.steps  # which takes its own time
        if outcome == "same" and not redone and found.seconds != self._seconds[name]:
            return "silently other seconds", f"{found.seconds}, not {self._seconds[name]}"
        return outcome, ""


def plan(workdir, items, draw):
    """Every byte, in several ways where that is cheap."""
    flips = []

    def each(how, file, path, kinds):
        for place in range(len(path.read_bytes())):
            flips.extend(Flip(how, file, place, kind) for kind in draw.sample(KINDS, kinds))

    each("table", "loss_table/metadata.json", workdir.path / "loss_table/metadata.json", 4)
    for file in RUN_FILES:
        each("run", file, workdir.path / file, 2 if file == "cells.jsonl" else 1)
    for name, step in CHECKPOINTS:
        items.restore(name)
        for path in sorted((items.path / step).glob("*/metadata")):
            each(name, str(path.relative_to(items.path)), path, 1)
    return flips


def attack(count, seed, folder, tally, by_command_line=BY_COMMAND_LINE):
    """Flips as many bytes, or all; and some through the command line."""
    draw = random.Random(seed)
    for name in ("workdir", "stage"):
        (folder / name).mkdir()
    workdir, items = Workdir(folder / "workdir"), Items(folder / "stage")
    flips = plan(workdir, items, draw)
    if count:
        flips = draw.sample(flips, count)
    for flip in flips:
        part, *name = (workdir,) if flip.how in ("table", "run") else (items, flip.how)
        part.restore(*name)
        flip.apply(part.path / flip.file, draw)
        tally.add(_name(flip), *part.outcome(flip.how), kind=f"{flip.how}, {flip.file}")
    on_runs = [flip for flip in plan(workdir, items, draw) if flip.how == "run"]
    for flip in draw.sample(on_runs, by_command_line):
        workdir.restore()
        flip.apply(workdir.path / flip.file, draw)
        tally.add(f"command line, {_name(flip)}", *workdir.command_line(), kind="command line")


def _name(flip):
    return f"{flip.how}, {flip.file}, byte {flip.place} {flip.kind}"


def main(argv=None):
    args = attacks.arguments(__doc__, count=0, argv=argv)
    tally = attacks.Tally("same", "reported", quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        attack(args.count, args.seed, Path(folder), tally)
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
