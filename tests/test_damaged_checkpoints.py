"""Checkpoints that were damaged: the one before is continued from, and it is said."""

import json
import shutil
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import devices_mesh

from easy_jax.config import OptimizerConfig, StageConfig
from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource
from easy_jax.train import checkpoint_reading
from easy_jax.train.checkpoint import CheckpointError, CheckpointWarning
from easy_jax.train.fitting import fit

pytestmark = pytest.mark.slow


class Network(nnx.Module):
    """Two layers, large enough that their arrays are not in the index of the checkpoint."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(16, 128, rngs=rngs), nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


def _loss(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


_X = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
_SOURCE = ArraySource({"x": _X, "y": _X[:, :1] * 2})
_STAGE = StageConfig(
    epochs=1, batch_size=8, optimizer=OptimizerConfig(name="adamw", learning_rate=0.1)
)


def _fit(directory, **options):
    """Eight steps, saved after the fourth and the last."""
    return fit(
        Network(),
        _SOURCE,
        directory,
        stage=_STAGE,
        loss_fn=_loss,
        save_every_steps=4,
        mesh=devices_mesh(1),
        **options,
    )


def _parameters(done):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(done.model_state))]


@pytest.fixture(scope="module", params=[False, True], ids=["latest", "best"])
def keep_best(request):
    return request.param


@pytest.fixture(scope="module")
def calm(tmp_path_factory, keep_best):
    """A finished stage, and its parameters."""
    directory = tmp_path_factory.mktemp("calm")
    return directory, _parameters(_fit(directory, keep_best=keep_best))


@pytest.fixture
def stage(calm, tmp_path):
    """A copy to damage."""
    return shutil.copytree(calm[0], tmp_path / "stage")


def _names(directory):
    return sorted(each.name for each in directory.iterdir())


def _is_calm(done, calm):
    return all(map(np.array_equal, _parameters(done), calm[1]))


def _empty_later(stage):
    (stage / "99").mkdir()


def _cut(stage):
    file = stage / "8" / "state" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:20])


def _without_state(stage):
    shutil.rmtree(stage / "8" / "state")


def _record_of_another_type(stage):
    (stage / "8" / "record" / "metadata").write_text("[1]")


def _other_position(stage):
    file = stage / "8" / "record" / "metadata"
    record = json.loads(file.read_text())
    record["progress"]["seconds"] += 1
    file.write_text(json.dumps(record))


def _deep(stage):
    (stage / "8" / "_CHECKPOINT_METADATA").write_text("[" * 100_000)


def _list(stage):
    (stage / "8" / "_CHECKPOINT_METADATA").write_text("[]")


def _copied(stage):
    shutil.copytree(stage / "8", stage / "99")


@pytest.mark.parametrize(
    ("damage", "step", "reason"),
    [
        (_empty_later, 99, 'Item "record" was not found'),
        (_cut, 8, "ValueError: "),
        (_without_state, 8, 'Item "state" was not found'),
        (_record_of_another_type, 8, "AttributeError: "),
        (_other_position, 8, "the record was changed after it was written"),
        (_deep, 8, "RecursionError: "),
        (_list, 8, "ValueError: |is not a JSON object"),
        (_copied, 99, "it is the one of step 8, copied"),
    ],
)
def test_the_one_before_is_continued_from(calm, stage, keep_best, capfd, damage, step, reason):
    damage(stage)
    with pytest.warns(CheckpointWarning, match=reason) as told:
        done = _fit(stage, keep_best=keep_best)
    assert len(told) == 1
    assert f"{stage / str(step)} is damaged" in str(told[0].message)
    assert f"it is now called damaged-{step}, and " in str(told[0].message)
    assert done.resumed_from == (8 if step == 99 else 4)
    assert _is_calm(done, calm)
    assert _names(stage) == ["4", "8", f"damaged-{step}"]
    assert "Traceback" not in capfd.readouterr().err
    assert _fit(stage, keep_best=keep_best).resumed_from == 8  # and nothing is told any more


def test_reads_that_had_not_begun_are_not_warned_about():
    class Store:
        async def _get_array_metadatas(self):
            pass

        async def mine(self):
            pass

    never_begun = []

    def read(reader):
        never_begun.append(Store()._get_array_metadatas())
        raise ValueError("damaged")

    name = "Store._get_array_metadatas"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert checkpoint_reading._attempt(read) == (None, "ValueError: damaged")
        never_begun[0].__qualname__ = name
        never_begun.clear()  # as late as Orbax's threads may let it go
        Store().mine()
    assert [str(each.message).split("'")[1].split(".")[-1] for each in told] == ["mine"]


def test_every_changed_array_is_noticed(calm, stage, keep_best):
    """Some are read without an error: only the checksum of the values tells."""
    data = sorted((stage / "8" / "state" / "ocdbt.process_0" / "d").iterdir())
    largest = max(data, key=lambda file: file.stat().st_size)
    content, told_by_values = largest.read_bytes(), 0
    for place in range(7, len(content), len(content) // 8):
        again = stage.parent / str(place)
        shutil.copytree(stage, again)
        changed = content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
        (again / largest.relative_to(stage)).write_bytes(changed)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", CheckpointWarning)
            done = _fit(again, keep_best=keep_best)
        told_by_values += any("its arrays have other values" in str(each.message) for each in told)
        assert _is_calm(done, calm)
    assert told_by_values > 0


def test_a_damaged_loss_is_noticed_where_the_lowest_is_looked_for(calm, stage, keep_best):
    file = stage / "8" / "metrics" / "metrics"
    if not keep_best:
        assert not file.exists()  # Orbax writes none, and none is looked for
        return
    file.write_text(json.dumps({**json.loads(file.read_text()), "loss": 0.0}))
    with pytest.warns(CheckpointWarning, match="metrics was changed after it was written"):
        done = _fit(stage, keep_best=True)
    assert _is_calm(done, calm)


def test_if_none_can_be_read_it_says_what_to_delete(stage, keep_best):
    for step in ("4", "8"):
        shutil.rmtree(stage / step / "record")
    before = _names(stage)
    with pytest.raises(CheckpointError) as told:
        _fit(stage, keep_best=keep_best)
    assert f"no checkpoint in {stage} can be read (8: " in str(told.value)
    assert "; 4: " in str(told.value)
    assert "delete that directory" in str(told.value)
    assert "\n" not in str(told.value)
    assert _names(stage) == before


def test_if_none_can_be_listed_it_says_what_to_delete(stage, keep_best):
    for step in ("4", "8"):
        (stage / step / "_CHECKPOINT_METADATA").write_text("3")
    before = _names(stage)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* delete that directory"):
        _fit(stage, keep_best=keep_best)
    assert _names(stage) == before


def test_a_second_damaged_one_of_a_step_keeps_the_first(stage, keep_best):
    for name in ("damaged-8", "damaged-8-2"):
        _cut(stage)
        with pytest.warns(CheckpointWarning, match=f"now called {name},"):
            _fit(stage, keep_best=keep_best)
    assert _names(stage) == ["4", "8", "damaged-8", "damaged-8-2"]


def test_memory_that_is_short_is_no_damage(stage, keep_best, monkeypatch):
    def restore(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore)
    before = _names(stage)
    with pytest.raises(jax.errors.JaxRuntimeError):
        _fit(stage, keep_best=keep_best)
    assert _names(stage) == before


def test_a_checkpoint_of_an_older_version_is_not_called_damaged(stage, keep_best):
    (stage / "8" / "record").rename(stage / "8" / "identity")
    before = _names(stage)
    with pytest.raises(CheckpointError, match="written by an older version of easy_jax"):
        _fit(stage, keep_best=keep_best)
    assert _names(stage) == before
