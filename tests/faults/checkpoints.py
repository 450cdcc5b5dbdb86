"""Damages checkpoints and continues: the same result bit for bit, or a line that names the folder.

  python tests/faults/checkpoints.py [--count 170] [--seed 0]

Most through `ej.fit`, in one process, on a stage that was interrupted (checkpoints after steps 3, 6
and 9 of 12) or is finished (12, too); every sixteenth through the command line, on the checkpoints
of a language model. Permissions are not taken away where the script runs as root, whom they do not
stop: that kind is then a file that cannot be opened because it is a socket.
"""

import contextlib
import itertools
import random
import shutil
import sys
import tempfile
from pathlib import Path

import attacks
import jax
import numpy as np
from checkpoint_damage import KINDS
from flax import nnx
from helpers import devices_mesh

import easy_jax as ej

CLI_EVERY = 16


class Network(nnx.Module):
    """Two layers, large enough that their arrays get files of their own."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(16, 128, rngs=rngs)
        self.last = nnx.Linear(128, 3, rngs=rngs)

    def __call__(self, image, mask=None):
        return self.last(nnx.relu(self.first(image)))


class Stage:
    """A stage in a folder, interrupted or finished, and its parameters in the calm run."""

    def __init__(self, folder):
        self.folder = Path(folder)
        rng = np.random.default_rng(0)
        image, label = rng.normal(size=(48, 16)), rng.integers(0, 3, 48)
        fields = {"image": image.astype(np.float32), "label": label.astype(np.int32)}
        self._source = ej.ArraySource(fields)
        optimizer = ej.OptimizerConfig(name="adamw", learning_rate=0.01)
        self._stage = ej.StageConfig(epochs=2, batch_size=8, optimizer=optimizer)
        self._mesh = devices_mesh(1)
        self.places = {name: self.folder / name for name in ("interrupted", "finished")}
        self.calm = self._parameters(self.fit(self.places["finished"]))
        with contextlib.suppress(_Interruption):
            self.fit(self.places["interrupted"], stop_after=10)
        steps = sorted(path.name for path in self.places["interrupted"].iterdir())
        assert steps == ["3", "6", "9"], steps

    def fit(self, place, stop_after=None):
        """What `ej.fit` returns."""
        left = itertools.count(1)

        def stop(_):
            if next(left) == stop_after:
                raise _Interruption

        return ej.fit(
            Network(),
            self._source,
            place,
            stage=self._stage,
            loss_fn=ej.classification_loss,
            weight_N=np.linspace(0.1, 1, 48, dtype=np.float32),
            mesh=self._mesh,
            save_every_steps=3,
            keep=9,
            progress=stop,
        )

    @staticmethod
    def _parameters(done):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(done.model_state))]

    def outcome(self, place):
        """What comes of the same call again."""
        with attacks.silence():  # what Orbax's threads print of their own
            kind, result = attacks.call(lambda: self.fit(place))
        if kind == "reported" and str(place) not in result:
            return "unclear", result
        if kind != "value":
            return kind, result
        return self.judge(result), ""

    def judge(self, done):
        """Whether a stage's parameters are the calm run's, bit for bit."""
        same = map(attacks.same, self._parameters(done), self.calm)
        return "same" if all(same) else "silently wrong"


class _Interruption(Exception):  # noqa: N818, no error
    pass


class CommandLine:
    """The same with `easy-jax export`, which trains before."""

    def __init__(self, folder):
        self._bench = attacks.Bench(folder)
        options = ("--config.keep_checkpoints=9",)
        self._calm = self._bench.workdir()
        self._run = lambda workdir: self._bench.again(workdir, command="export", extra=options)
        assert self._run(self._calm).outcome == "finished"
        self._model = (self._calm / "exported/flow/model.safetensors").read_bytes()

    def copy(self):
        workdir = self._bench.workdir()
        shutil.copytree(self._calm, workdir, symlinks=True)
        shutil.rmtree(workdir / "exported")
        return workdir

    def outcome(self, workdir):
        ended = self._run(workdir)
        if ended.outcome != "finished":
            return {"refused": "reported"}.get(ended.outcome, ended.outcome), ended.err.strip()
        exported = (workdir / "exported/flow/model.safetensors").read_bytes()
        return ("same" if exported == self._model else "silently wrong"), ""


def attack(count, seed, folder, tally, with_command_line=True):
    """Damages as many checkpoints, one after the other."""
    draw = random.Random(seed)
    stage = Stage(Path(folder) / "stage")
    if with_command_line:
        (Path(folder) / "command_line").mkdir()
        command_line = CommandLine(Path(folder) / "command_line")
    for number in range(count):
        damage = KINDS[number % len(KINDS)]
        if with_command_line and number % CLI_EVERY == CLI_EVERY - 1:
            place = command_line.copy()
            detail = damage(place / "checkpoints" / "all-flow", draw)
            kind, outcome = "command line", command_line.outcome(place)
        else:
            kind = draw.choice(list(stage.places))
            place = stage.folder / f"damaged{number}"
            shutil.copytree(stage.places[kind], place)
            detail = damage(place, draw)
            outcome = stage.outcome(place)
        name, message = outcome
        tally.add(f"{number + 1} {kind}, {damage.__name__}: {detail}", name, message, kind)
        shutil.rmtree(place)


def main(argv=None):
    args = attacks.arguments(__doc__, count=170, argv=argv)
    tally = attacks.Tally("same", "reported")
    with tempfile.TemporaryDirectory() as folder:
        attack(args.count, args.seed, folder, tally)
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
