"""Starts two runs in one workdir: one does the work, the other is refused or waits in good order.

  python tests/faults/pairs.py [--count 20] [--seed 0]

Never may both work, or anything end in a traceback; and whatever happened, the same command once
more ends with loss tables, checkpoints and results bit for bit those of a calm run.
"""

import collections
import json
import random
import sys
import tempfile
import time

import attacks
from attacks import LANGUAGE, VISION

BATCHES = 15
# Of the experiment: the commands, when the second starts, and whether the first is then killed.
PAIRS = (
    (LANGUAGE, ("run", "run"), "soon", False),
    (LANGUAGE, ("run", "run"), "scoring", False),
    (LANGUAGE, ("run", "run"), "training", False),
    (LANGUAGE, ("run", "run"), "soon", True),
    (LANGUAGE, ("run", "score"), "soon", False),
    (LANGUAGE, ("score", "run"), "soon", False),
    (LANGUAGE, ("run", "run"), "at once", False),
    (LANGUAGE, ("run", "run"), "training", True),
    (VISION, ("run", "run"), "soon", False),
    (LANGUAGE, ("train", "evaluate"), "training", False),
)
_CONDITIONS = {
    "scoring": lambda workdir: any(workdir.glob("loss_table/part-*")),
    "training": lambda workdir: any(workdir.glob("checkpoints/*/[0-9]*")),
}


class Pair:
    """Two runs in a workdir of a bench."""

    def __init__(self, bench, draw, spec):
        self.kind, self.commands, self.when, self.kills = spec
        self.bench, self.draw = bench, draw
        self.workdir = bench.workdir()

    def outcome(self):
        """Of both, and of the same command again; and what it was."""
        first, second, overlapped = self._together()
        ends = sorted((first.outcome, second.outcome))
        detail = f"{first.outcome}, {second.outcome}"
        for ended in (first, second):
            if ended.outcome not in ("finished", "refused", "killed"):
                return "traceback", f"{detail}: {ended.err[-300:]}"
        again = self.bench.again(self.workdir, self.kind)
        if again.outcome != "finished":
            return "ruined", f"{detail}, again {again.outcome}: {again.err[-300:]}"
        different = self.bench.differences(self.workdir, self.kind)
        if different:
            return "different", f"{detail}: {', '.join(different[:5])}"
        refusals = [ended.last for ended in (first, second) if ended.outcome == "refused"]
        if any(str(self.workdir) not in line for line in refusals):
            return "unclear", refusals[0]
        if ends == ["refused", "refused"]:
            return "both refused", detail
        if not refusals and overlapped and not self.kills and self._worked_twice():
            return "both worked", detail
        return "in good order", f"{detail}{''.join(f': {line}' for line in refusals)}"

    def _together(self):
        """How both ended, and whether the second started before the first was over."""
        first = self.bench.start(self.workdir, self.kind, self.commands[0])
        if self.when in _CONDITIONS:
            attacks.until(lambda: _CONDITIONS[self.when](self.workdir), first)
        if self.when != "at once":
            time.sleep(self.draw.random() * (2.0 if self.when == "soon" else 0.2))
        overlapped = not first.is_over
        second = self.bench.start(self.workdir, self.kind, self.commands[1])
        if self.kills:
            time.sleep(self.draw.random() * 2.0)
            if not first.is_over:
                first.kill()
        return first.wait(), second.wait(), overlapped

    def _worked_twice(self):
        """A step that was logged twice."""
        log = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        steps = ((line["stage"], line["step"]) for line in log if line["kind"] == "train")
        return max(collections.Counter(steps).values(), default=1) > 1


def attack(count, seed, folder, tally):
    """As many pairs, one after the other."""
    draw = random.Random(seed)
    bench = attacks.Bench(folder, train=8 * BATCHES)
    for number in range(count):
        spec = PAIRS[number % len(PAIRS)]
        kind, commands, when, kills = spec
        outcome, detail = Pair(bench, draw, spec).outcome()
        killed = ", the first killed" if kills else ""
        name = f"{kind}, {commands[0]} and {commands[1]} {when}{killed}"
        tally.add(f"{number + 1} {name}", outcome, detail)


def main(argv=None):
    args = attacks.arguments(__doc__, count=20, argv=argv)
    tally = attacks.Tally("in good order")
    with tempfile.TemporaryDirectory() as folder:
        attack(args.count, args.seed, folder, tally)
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
