"""What a checkpoint or a loss table depends on is recorded; what differs is refused by name."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import Records

import easy_jax as ej
from easy_jax.config import OptimizerConfig, StageConfig
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.data import ArraySource
from easy_jax.train.checkpoint import CheckpointError
from easy_jax.train.identity import of_stage
from easy_jax.train.loss_table import LossTableError
from easy_jax.train.weights import StageWeights

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
Y = X @ np.ones((3, 1), np.float32)
ANCHORED = StageConfig(batch_size=8, optimizer=OptimizerConfig(anchor="l2_sp", anchor_strength=0.1))


class Loss:
    """A loss whose factor can change after it has been used."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, model, batch):
        total, count = ej.squared_error(model(batch["x"]), batch["y"])
        return self.factor * total, count


def squared(model, batch):
    return ej.squared_error(model(batch["x"]), batch["y"])


def another_squared(model, batch):
    total, count = ej.squared_error(model(batch["x"]), batch["y"])
    return 2 * total, count


def linear(seed=0, **options):
    return nnx.Linear(3, 1, rngs=nnx.Rngs(seed), **options)


def is_bias(path, variable):
    return path[-1] == "bias"


def data(**changes):
    return ArraySource({"x": X, "y": Y, **changes})


def fit(directory, **changes):
    arguments = {
        "model": linear(),
        "source": data(),
        "directory": directory,
        "stage": StageConfig(batch_size=8),
        "loss_fn": squared,
        **changes,
    }
    result = ej.fit(**arguments)
    return result, np.asarray(result.model_state["kernel"][...])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return directory, fit(directory)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("the loss function", {"loss_fn": another_squared}),
        ("the loss function", {"loss_fn": lambda m, b: squared(m, b)}),
        ("the starting parameters", {"model": linear(seed=1)}),
        ("the model's structure", {"model": linear(precision="highest")}),
        ("the training data", {"source": data(y=-Y)}),
        ("the trainable parameters", {"trainable": is_bias}),
        ("the weights", {"weight_N": np.full(16, 0.5)}),
        ("seed", {"seed": 1}),
        ("sfa_beta", {"sfa_beta": 0.5}),
        ("stage.epochs", {"stage": StageConfig(batch_size=8, epochs=2)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_differs_is_refused_and_named(finished, named, changes):
    with pytest.raises(CheckpointError, match="is of another run: ") as error:
        fit(finished[0], **changes)
    text = str(error.value)
    _, _, differing = text.partition("of another run: ")
    assert re.findall(r"(?:^|; )([\w.' ]+): .+? now, .+? there", differing) == [named]
    assert "overwrite=True" in text and "\n" not in text


@pytest.mark.slow
def test_the_anchored_set_is_refused_and_named(tmp_path):
    fit(tmp_path, stage=ANCHORED, anchored=is_bias)
    with pytest.raises(CheckpointError, match=r"anchored parameters: '2 of 2, .* '1 of 2, "):
        fit(tmp_path, stage=ANCHORED, anchored=lambda path, _: path[-1] in ("bias", "kernel"))


@pytest.mark.slow
def test_the_weights_of_every_batch_are_refused_and_named(tmp_path, finished):
    mesh = ej.make_mesh()

    def online(**changes):
        options = {"model": linear(), "loss_fn": squared, "tau": 1.0, **changes}
        return OnlineWeights(options.pop("model"), mesh=mesh, **options)

    fit(tmp_path, online=online(), mesh=mesh)
    for changes in ({"tau": 2.0}, {"loss_fn": another_squared}, {"model": linear(seed=1)}):
        with pytest.raises(CheckpointError, match="run: the weights of every batch: "):
            fit(tmp_path, online=online(**changes), mesh=mesh)
    assert fit(tmp_path, online=online(), mesh=mesh)[0].resumed_from == 2


def test_what_is_the_same_is_taken(finished):
    # Another function object, another list of the same numbers, the same model on one device.
    source = ArraySource({"y": Y.copy(), "x": X.copy()})
    model = nnx.clone(linear())
    result, kernel = fit(finished[0], source=source, model=model, loss_fn=squared)
    assert result.resumed_from == 2
    np.testing.assert_array_equal(kernel, finished[1])


def test_weights_of_another_dtype_are_the_same(tmp_path):
    weight_N = np.linspace(0, 1, 16)
    fit(tmp_path, weight_N=weight_N)
    assert fit(tmp_path, weight_N=weight_N.astype(np.float32))[0].resumed_from == 2
    assert fit(tmp_path, weight_N=weight_N.tolist())[0].resumed_from == 2


def test_a_source_without_a_fingerprint_is_looked_into(tmp_path):
    records = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]
    fit(tmp_path, source=Records(records))
    assert fit(tmp_path, source=Records(records))[0].resumed_from == 2
    with pytest.raises(CheckpointError, match="run: the training data: "):
        fit(tmp_path, source=Records([*records[:15], records[0]]))


@pytest.mark.slow
def test_overwrite_starts_anew(tmp_path):
    fit(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    result, kernel = fit(tmp_path, loss_fn=another_squared, overwrite=True)
    _, fresh = fit(tmp_path / "fresh", loss_fn=another_squared)
    assert result.resumed_from == 0
    np.testing.assert_array_equal(kernel, fresh)
    assert (tmp_path / "notes.txt").read_text() == "mine"  # no checkpoint of ours
    assert fit(tmp_path, loss_fn=another_squared)[0].resumed_from == 2


@pytest.mark.slow
def test_a_loss_that_changes_in_a_process_is_compiled_anew(tmp_path):
    # One object: caches that go by it would hand out the step of its old factor.
    loss = Loss()
    _, one = fit(tmp_path / "one", loss_fn=loss)
    first = ej.score(linear(), data(), tmp_path / "table", loss_fn=loss, batch_size=8).loss_N()
    loss.factor = 3.0
    with pytest.raises(CheckpointError, match="run: the loss function: 'Loss "):
        fit(tmp_path / "one", loss_fn=loss)
    with pytest.raises(LossTableError, match="was computed with different inputs: loss is 'Loss "):
        ej.score(linear(), data(), tmp_path / "table", loss_fn=loss, batch_size=8)
    _, three = fit(tmp_path / "three", loss_fn=loss)
    _, expected = fit(tmp_path / "expected", loss_fn=Loss(3.0))
    np.testing.assert_array_equal(three, expected)
    assert np.abs(three - one).max() > 1e-4
    second = ej.score(
        linear(), data(), tmp_path / "table", loss_fn=loss, batch_size=8, overwrite=True
    )
    np.testing.assert_allclose(second.loss_N(), 3 * first, rtol=1e-6)


def test_a_table_knows_the_model_s_structure(tmp_path):
    table = ej.score(linear(), data(), tmp_path, loss_fn=squared, batch_size=8)
    again = ej.score(linear(), data(), tmp_path, loss_fn=squared, batch_size=8)
    assert again.metadata == table.metadata
    with pytest.raises(LossTableError, match="was computed with different inputs: structure is "):
        ej.score(linear(precision="highest"), data(), tmp_path, loss_fn=squared, batch_size=8)


def test_a_checkpoint_of_another_version_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("easy_jax.train.checkpoint.FORMAT_VERSION", 2)
    fit(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"another version of .* \(format 2; .* reads 3"):
        fit(tmp_path)


def test_starting_parameters_survive(finished):
    # They are hashed where they are, and neither moved nor changed.
    model = linear()
    before = jax.device_get(nnx.state(model))
    fit(finished[0], model=model)
    np.testing.assert_array_equal(model.kernel[...], before["kernel"][...])


@pytest.mark.slow
def test_the_identity_of_a_stage_is_that_of_version_0_1():
    """Computed by commit 7b5e5d5; checkpoints of that version must be continued."""
    model = ej.train_mode(ej.ResNet(ej.ResNetConfig(width=4, depths=(1, 1)), 3, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(jax.numpy.zeros_like, nnx.state(model)))
    fields = {"image": np.zeros((4, 8, 8, 1), np.float32), "label": np.int32([0, 1, 2, 0])}
    found = of_stage(
        model,
        ArraySource(fields),
        stage=StageConfig(optimizer=OptimizerConfig(anchor="l2_sp", anchor_strength=0.1)),
        loss_fn=ej.classification_loss,
        weights=StageWeights(np.array([0.5, 1.0, np.nan, 0.0])),
        online=None,
        trainable=nnx.Param,
        anchored=None,
        sfa_beta=0.5,
        seed=7,
    )
    optimizer = found["stage"].pop("optimizer")
    assert optimizer == {
        "name": "sgd",
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup_ratio": 0.0,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-08,
        "clip_norm": 0.0,
        "anchor": "l2",
        "anchor_strength": 0.1,
        "anchor_per_parameter": False,
    }
    assert found == {
        "the starting parameters": "361f5d1063ceea6c",
        "the model's structure": "289b39dff13c1f64",
        "the training data": "4fdeda359eeb2002",
        "the number of examples": 4,
        "the loss function": "classification_loss",
        "the trainable parameters": "20 of 20, 43fe3ada752ccf7f",
        "the anchored parameters": "20 of 20, 43fe3ada752ccf7f",
        "the weights": "9258b058d257fe86",
        "the weights of every batch": None,
        "stage": {"epochs": 1, "batch_size": 64, "micro_batches": 1, "reduction": "example_mean"},
        "seed": 7,
        "sfa_beta": 0.5,
    }
