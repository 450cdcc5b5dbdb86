"""Damages checkpoints and continues: the same result bit for bit, or a line that names the folder.

  python tests/faults/checkpoints.py [--count 170] [--seed 0]

Most through `ej.fit`, in one process, on a stage that was interrupted (checkpoints after steps 3, 6
and 9 of 12) or is finished (12, too); every sixteenth through the command line, on the checkpoints
of a language model. Permissions are not taken away where the script runs as root, whom they do not
stop: that kind is then a file that cannot be opened because it is a socket.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import attacks
import jax
import numpy as np
from flax import nnx
from helpers import devices_mesh

import easy_jax as ej

CLI_EVERY = 16
_DEEP = b"[" * 100_000


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
        if kind == "told" and str(place) not in result:
            return "badly told", result
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
            return {"refused": "told"}.get(ended.outcome, ended.outcome), ended.err.strip()
        exported = (workdir / "exported/flow/model.safetensors").read_bytes()
        return ("same" if exported == self._model else "silently wrong"), ""


# Each damages the checkpoints of a stage, whose folder it is given, and says what it did.


def _steps(stage):
    return sorted(
        (path for path in stage.iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )


def _file(stage, draw, step=-1):
    """Any file of a checkpoint, the latest by default."""
    return draw.choice(sorted(p for p in _steps(stage)[step].rglob("*") if p.is_file()))


def _items(stage, draw, has_json=False):
    """The name of a folder of the latest checkpoint; of one with JSON, if that is asked for."""
    folders = (path for path in _steps(stage)[-1].iterdir() if path.is_dir())
    names = (path.name for path in folders if not has_json or (path / "metadata").is_file())
    return draw.choice(sorted(names))


def _large(stage, draw):
    """One of the files with the most of the arrays."""
    files = (p for p in _steps(stage)[-1].rglob("d/*") if p.is_file())
    return draw.choice(sorted(files, key=lambda p: (-p.stat().st_size, p))[:3])


def truncate(stage, draw):
    path = _file(stage, draw)
    size = draw.randrange(max(path.stat().st_size, 1))
    os.truncate(path, size)
    return f"{path.relative_to(stage)} to {size} bytes"


def truncate_arrays(stage, draw):
    path = _large(stage, draw)
    os.truncate(path, draw.randrange(path.stat().st_size))
    return path.relative_to(stage)


def empty(stage, draw):
    path = _file(stage, draw)
    path.write_bytes(b"")
    return path.relative_to(stage)


def delete(stage, draw):
    path = _file(stage, draw)
    path.unlink()
    return path.relative_to(stage)


def garble(stage, draw):
    path = _file(stage, draw)
    return f"{path.relative_to(stage)}, bytes {_garble(path, draw, 8)}"


def garble_arrays(stage, draw):
    path = _large(stage, draw)
    return f"{path.relative_to(stage)}, bytes {_garble(path, draw, 1)}"


def _garble(path, draw, count):
    content = bytearray(path.read_bytes() or b"\0")
    places = sorted(draw.sample(range(len(content)), min(count, len(content))))
    for place in places:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return places


def swap_files(stage, draw):
    path = _file(stage, draw)
    other = _steps(stage)[0] / path.relative_to(_steps(stage)[-1])
    if not other.is_file():
        other = _file(stage, draw, 0)
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return f"{path.relative_to(stage)} and {other.relative_to(stage)}"


def swap_items(stage, draw):
    first, *_, last = _steps(stage)
    name = _items(stage, draw)
    return f"{name} of {_swap(first / name, last / name)}"


def swap_steps(stage, draw):
    first, *_, last = _steps(stage)
    return _swap(first, last)


def _swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name}"


def rename_latest(stage, draw):
    last = _steps(stage)[-1]
    name = draw.choice(["12", "99", "10"])
    if not (stage / name).exists():
        last.rename(stage / name)
    return f"{last.name} to {name}"


def copy_first(stage, draw):
    first = _steps(stage)[0]
    shutil.copytree(first, stage / "11")
    return f"{first.name} as 11"


def file_to_folder(stage, draw):
    path = _file(stage, draw)
    path.unlink()
    path.mkdir()
    return path.relative_to(stage)


def file_to_link(stage, draw):
    path = _file(stage, draw)
    other = _steps(stage)[0] / path.relative_to(_steps(stage)[-1])
    path.unlink()
    path.symlink_to(other if draw.random() < 0.5 else "nowhere")
    return f"{path.relative_to(stage)} to {path.readlink().name}"


def item_to_file(stage, draw):
    path = _steps(stage)[-1] / _items(stage, draw)
    shutil.rmtree(path)
    path.write_bytes(b"no folder")
    return path.relative_to(stage)


def item_away(stage, draw):
    path = _steps(stage)[-1] / _items(stage, draw)
    shutil.rmtree(path)
    return path.relative_to(stage)


def empty_step(stage, draw):
    path = stage / draw.choice(["10", "11", "12", "99", "1000000"])
    path.mkdir(exist_ok=True)
    for inside in path.iterdir():
        shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
    return path.name


def half_a_step(stage, draw):
    last = _steps(stage)[-1]
    kept = draw.sample(sorted(path.name for path in last.iterdir()), 3)
    for name in kept:
        copy = shutil.copytree if (last / name).is_dir() else shutil.copy
        (stage / "50").mkdir(exist_ok=True)
        copy(last / name, stage / "50" / name)
    return f"50 with {', '.join(kept)}"


def step_is_file(stage, draw):
    path = stage / draw.choice(["13", "99"])
    path.write_bytes(b"")
    return path.name


def wrong_json(stage, draw):
    item = _items(stage, draw, has_json=True)
    path = _steps(stage)[-1] / item / "metadata"
    content = draw.choice(
        [b"[]", b"null", b"{}", b"1e999", b'"x"', b"\xff\xfe{}", _DEEP, b'{"a": NaN}', b""]
    )
    path.write_bytes(content)
    return f"{path.relative_to(stage)}: {content[:10]!r}"


def wrong_values(stage, draw):
    item = _items(stage, draw, has_json=True)
    path = _steps(stage)[-1] / item / "metadata"
    content = json.loads(path.read_text())
    wrong = draw.choice([None, -1, 10**9, "x", [], {}, 0.5])
    name = _change_leaf(content, draw, wrong)
    path.write_text(json.dumps(content))
    return f"{path.relative_to(stage)}: {name} is {wrong!r}"


def _change_leaf(content, draw, wrong):
    while True:
        keys = sorted(content) if isinstance(content, dict) else range(len(content))
        key = draw.choice(list(keys))
        if not isinstance(content[key], dict | list) or not content[key]:
            content[key] = wrong
            return key
        content = content[key]


def no_permission(stage, draw):
    path = _file(stage, draw)
    if os.geteuid():
        path.chmod(0)
        return path.relative_to(stage)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as opened:  # by a short name, the only ones there are
        handle = os.open(path.parent, os.O_RDONLY)
        opened.bind(f"/proc/self/fd/{handle}/{path.name}")
        os.close(handle)
    return f"{path.relative_to(stage)} is a socket"


def leftovers(stage, draw):
    last = _steps(stage)[-1]
    name = draw.choice(["99.orbax-checkpoint-tmp-17", "99.orbax-checkpoint-tmp", "99.tmp", "abc"])
    shutil.copytree(last, stage / name)
    shutil.rmtree(stage / name / _items(stage, draw))
    return name


def unfinished_item(stage, draw):
    last = _steps(stage)[-1]
    item = _items(stage, draw)
    (last / item).rename(last / f"{item}.orbax-checkpoint-tmp-3")
    return f"{last.name}/{item}"


def all_damaged(stage, draw):
    for number, _ in enumerate(_steps(stage)):
        _file(stage, draw, number).write_bytes(b"damaged")
    return "a file in every one"


KINDS = (
    truncate,
    truncate_arrays,
    empty,
    delete,
    garble,
    garble_arrays,
    swap_files,
    swap_items,
    swap_steps,
    rename_latest,
    copy_first,
    file_to_folder,
    file_to_link,
    item_to_file,
    item_away,
    empty_step,
    half_a_step,
    step_is_file,
    wrong_json,
    wrong_values,
    no_permission,
    leftovers,
    unfinished_item,
    all_damaged,
    garble_arrays,
    wrong_values,
    wrong_json,
)


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
    tally = attacks.Tally("same", "told")
    with tempfile.TemporaryDirectory() as folder:
        attack(args.count, args.seed, folder, tally)
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
