"""Numbers at the edges: weight 0 removes, what underflows is right or told, NaN is named."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import Records, devices_mesh
from safetensors.numpy import save_file

import easy_jax as ej
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.data import ArraySource, DataError, DataWarning
from easy_jax.kernels.linear_cross_entropy import weighted_linear_cross_entropy
from easy_jax.models import resnet
from easy_jax.parallel import sharding
from easy_jax.pretrained import weight_files
from easy_jax.train.hooks import TrainingError
from easy_jax.train.loss_table import LossTableError

REDUCTIONS = ("token_mean", "example_mean", "weight_mean")
RATE = 0.1


class Line(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.full((3, 1), 0.5))

    def __call__(self, x):
        return x @ self.kernel


def squared(model, batch):
    return ej.squared_error(model(batch["x"]), batch["y"])


def surprise(model, batch):
    """Infinite where x is 0, as its derivative is."""
    return -jnp.log(jnp.abs(model(batch["x"])[:, 0])), batch["tokens"].sum(axis=1)


def _batch(size=8):
    rng = np.random.default_rng(0)
    return {
        "x": rng.uniform(1, 2, (size, 3)).astype(np.float32),
        "y": rng.normal(size=(size, 1)).astype(np.float32),
        "tokens": np.ones((size, 2), np.float32) * np.arange(1, size + 1)[:, None],
        "weight": rng.uniform(0.5, 1, size).astype(np.float32),
        "mask": np.ones(size, bool),
    }


def _step(batch, loss_fn, reduction, micro_batches=1):
    optimizer, mesh = optax.sgd(RATE), devices_mesh(1)
    step = ej.make_train_step(
        nnx.graphdef(Line()), loss_fn, optimizer, reduction=reduction, micro_batches=micro_batches
    )
    state = ej.init_train_state(Line(), optimizer, mesh=mesh)
    state, metrics = step(state, sharding.shard_batch(batch, mesh))
    return np.asarray(state.params["kernel"][...]), jax.device_get(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("loss_fn", "bad"), [(surprise, 0.0), (squared, 1e30), (squared, np.nan), (squared, np.inf)]
)
def test_a_weight_of_zero_removes_an_infinite_loss(loss_fn, bad, reduction, micro_batches):
    batch = _batch()
    batch["weight"][[2, 5]] = 0.0
    expected = _step(batch, loss_fn, reduction, micro_batches)
    batch["x"][[2, 5]] = bad
    kernel, metrics = _step(batch, loss_fn, reduction, micro_batches)
    np.testing.assert_array_equal(kernel, expected[0])
    assert metrics == expected[1]
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


def test_denominators_count_an_example_of_weight_zero_as_before():
    batch = _batch()
    batch["weight"][2] = 0.0
    totals = np.asarray(surprise(Line(), batch)[0], np.float64)
    weight, count = np.float64(batch["weight"]), batch["tokens"].sum(axis=1)
    sizes = {
        "token_mean": (weight @ totals) / count.sum(),
        "example_mean": (weight @ (totals / count)) / 8,
        "weight_mean": (weight @ totals) / (weight @ count),
    }
    for reduction, expected in sizes.items():
        np.testing.assert_allclose(
            _step(batch, surprise, reduction)[1]["loss"], expected, rtol=1e-5
        )


@pytest.mark.slow
def test_a_weight_of_zero_is_out_of_the_batch_statistics():
    """BatchNorm of a batch with an example of weight 0 is that of the batch without it."""

    class Normed(nnx.Module):
        def __init__(self):
            self.norm = resnet.BatchNorm(3, nnx.Rngs(0))
            self.line = Line()

        def __call__(self, x, mask):
            return self.line(self.norm(x[:, None, None, :], mask)[:, 0, 0, :])

    def loss_fn(model, batch):
        return ej.squared_error(model(batch["x"], batch["mask"]), batch["y"])

    def step(batch):
        model, optimizer, mesh = ej.train_mode(Normed()), optax.sgd(RATE), devices_mesh(1)
        take = ej.make_train_step(nnx.graphdef(model), loss_fn, optimizer, reduction="weight_mean")
        state = ej.init_train_state(model, optimizer, mesh=mesh)
        return jax.device_get(take(state, sharding.shard_batch(batch, mesh))[0].model_state())

    batch = _batch()
    keep = np.arange(8) != 3
    without = {name: array[keep] for name, array in batch.items()}
    batch["weight"][3], batch["x"][3] = 0.0, 1e4
    for one, other in zip(*map(jax.tree.leaves, (step(batch), step(without))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_a_token_of_weight_zero_leaves_the_head_s_gradient_clean(soft_cap):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 4, 3)).astype(np.float32)
    head = rng.normal(size=(6, 3)).astype(np.float32)
    targets = rng.integers(0, 6, (2, 4))
    weight = np.float32([[1, 0, 0.5, 2], [0, 1, 1, 0]])

    def total(hidden, head):
        return weighted_linear_cross_entropy(hidden, head, targets, weight, soft_cap=soft_cap)

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    expected = run(hidden, head)
    for bad in (np.inf, np.nan, 1e38):
        damaged = np.where((weight == 0)[:, :, None], np.float32(bad), hidden)
        value, gradients = run(damaged, head)
        assert value == expected[0]
        for one, other in zip(gradients, expected[1], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_token_weight_of_zero_removes_an_infinite_loss(monkeypatch):
    batch = {
        "tokens": np.zeros((1, 3), np.int32),
        "segment_ids": np.ones((1, 3), np.int32),
        "targets": np.ones((1, 3), np.int32),
        "mask": np.ones((1, 1), bool),
        "token_weight": np.float32([[2, 0, 1]]),
    }
    monkeypatch.setattr(
        "easy_jax.core.causal_lm.linear_cross_entropy",
        lambda *_, **__: jnp.array([[1.0, jnp.inf, 3.0]]),
    )
    monkeypatch.setattr("easy_jax.core.causal_lm._hidden_states", lambda *_: None)

    class Headless:
        class config:  # noqa: N801
            final_cap = None

        head_VD = staticmethod(lambda: None)

    total, count, nll = ej.causal_lm_token_losses(Headless(), jax.tree.map(jnp.asarray, batch))
    assert (float(total[0, 0]), float(count[0, 0]), nll.tolist()) == (5.0, 3.0, [[2.0, 0.0, 3.0]])


# Stages.


def _source(**fields):
    batch = _batch()
    return ArraySource({name: batch[name] for name in ("x", "y", "tokens")} | fields)


def _fit(directory, source, loss_fn=squared, batch_size=8, **options):
    stage = ej.StageConfig(batch_size=batch_size, optimizer=ej.OptimizerConfig(learning_rate=RATE))
    return ej.fit(
        Line(), source, directory, stage=stage, loss_fn=loss_fn, mesh=devices_mesh(1), **options
    )


def test_all_weights_of_a_data_set_are_zero(tmp_path):
    with pytest.raises(DataError, match="nothing to train on: all 8 weights are 0"):
        _fit(tmp_path, _source(), weight_N=np.zeros(8))
    weight_N = np.where(np.arange(8) < 3, np.nan, 0.0)
    with pytest.raises(DataError, match="nothing to train on: all 5 weights are 0"):
        _fit(tmp_path, _source(), weight_N=weight_N)


@pytest.mark.slow
def test_weights_that_devices_take_for_zero_are_told(tmp_path):
    weight_N = np.where(np.arange(8) == 5, 1e-40, 1.0)
    with pytest.warns(DataWarning, match=r"1 weights are positive and below 1.2e-38.* ids \[5\]"):
        small = _fit(tmp_path / "small", _source(), weight_N=weight_N)
    zero = _fit(tmp_path / "zero", _source(), weight_N=np.where(np.arange(8) == 5, 0.0, 1.0))
    np.testing.assert_array_equal(small.model_state["kernel"][...], zero.model_state["kernel"][...])


@pytest.mark.parametrize("weight_N", [["a"] * 8, np.ones((8, 1)), np.full(8, 1e300)])
def test_weights_that_are_none(weight_N, tmp_path):
    message = r"weights must be numbers|\(8, 1\) weights for 8|infinite for 8 examples, ids \[0, 1"
    with pytest.raises(DataError, match=message):
        _fit(tmp_path, _source(), weight_N=weight_N)


def test_a_batch_whose_weights_are_all_zero_is_told_once(tmp_path):
    weight_N = np.float32([0, 0, 1, 0, 0, 0, 0, 0])
    with pytest.warns(DataWarning, match="nothing is learnt in step") as told:
        _fit(tmp_path, _source(), weight_N=weight_N, batch_size=2, seed=1)
    messages = [str(w.message) for w in told]
    assert len(messages) == 1 and "all weights of its batch are 0, example ids [" in messages[0]


def corner(model, batch):
    """Finite where x is 0; its derivative is not."""
    return jnp.sqrt(jnp.abs(model(batch["x"])[:, 0]))


def test_a_gradient_that_is_not_finite_stops_at_its_step(tmp_path):
    loader = ej.training_loader(_source(), 1, epochs=1, seed=0, rows=np.arange(1))
    bad = [int(batch["example_id"][0]) for batch in loader][2]  # of step 3; 4 would be blamed
    source = _source(x=np.where(np.arange(8)[:, None] == bad, np.float32(0), _batch()["x"]))
    message = rf"the loss is 0 at step 3, but the norm of its gradient is nan, on .* ids \[{bad}\]"
    with pytest.raises(TrainingError, match=message):
        _fit(tmp_path, source, corner, batch_size=1, save_every_steps=1)
    saved = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert sorted(saved) == [1, 2]


def test_a_removed_example_does_not_stop_a_stage(tmp_path):
    x = np.where(np.arange(8)[:, None] == 4, np.float32(0), _batch()["x"])
    weight_N = np.where(np.arange(8) == 4, 0.0, 1.0)
    removed = _fit(tmp_path / "a", _source(x=x), surprise, weight_N=weight_N)
    expected = _fit(tmp_path / "b", _source(), surprise, weight_N=weight_N)
    np.testing.assert_array_equal(
        removed.model_state["kernel"][...], expected.model_state["kernel"][...]
    )


def test_a_weight_of_its_own_that_is_negative(tmp_path):
    weights = [1.0, 1.0, -1.0, 1.0, 1.0, -2.0, 1.0, 1.0]
    fields = zip(_batch()["x"], _batch()["y"], weights, strict=True)
    records = [{"x": x, "y": y, "weight": w} for x, y, w in fields]
    with pytest.raises(DataError, match=r"field 'weight' is negative in example ids \[2, 5\]"):
        _fit(tmp_path, Records(records))


def test_online_weights_of_a_removed_example():
    mesh = devices_mesh(1)
    weigh = OnlineWeights(Line(), loss_fn=squared, tau=2.0, mesh=mesh)
    batch = _batch()
    expected = np.asarray(weigh(sharding.shard_batch(batch, mesh))["weight"])
    batch["x"][3], batch["weight"][3] = np.nan, 0.0
    found = np.asarray(weigh(sharding.shard_batch(batch, mesh))["weight"])
    assert found[3] == 0
    np.testing.assert_array_equal(np.delete(found, 3), np.delete(expected, 3))


@pytest.mark.parametrize("tau", [0.0, -1.0, np.nan, np.inf, 1e-40, 1e38])
def test_temperatures_that_are_none(tau, tmp_path):
    with pytest.raises(ValueError, match="tau is"):
        OnlineWeights(Line(), loss_fn=squared, tau=tau, mesh=devices_mesh(1))


# Losses and their weights.


def _table(losses, directory):
    sums_N = jnp.asarray(np.float32(losses))
    source = ArraySource({"i": np.arange(len(losses), dtype=np.int32)})

    def looked_up(model, batch):
        return sums_N[batch["i"]]

    return ej.score(Line(), source, directory, loss_fn=looked_up, batch_size=8)


@pytest.mark.parametrize("scale", [1e-40, 1e-44, 1e-30, 1e30, 1e38])
def test_weights_of_very_small_and_large_losses(scale, tmp_path):
    losses = np.float32(scale) * np.float32([1, 2, 3])
    exact = np.exp(-np.float64(losses) / np.float64(losses[1]))
    np.testing.assert_allclose(ej.flow_weights(losses), exact, rtol=1e-6)
    np.testing.assert_allclose(ej.temperature(losses), losses[1], rtol=1e-6)
    np.testing.assert_allclose(ej.flow_weights(losses, losses[1]), exact, rtol=1e-6)
    table = _table(losses, tmp_path)
    np.testing.assert_allclose(table.flow_weights(), exact, rtol=1e-6)


def test_weights_of_losses_that_are_far_from_the_median(tmp_path):
    losses = np.float32([1, 1, 1, 90, 200])
    exact = np.exp(-np.float64(losses))
    np.testing.assert_allclose(ej.flow_weights(losses), exact, rtol=1e-5, atol=1.4e-45)
    table = _table([1] * 9 + [200], tmp_path)
    with pytest.warns(DataWarning, match=r"1 of 10 weights are 0: .* from example ids \[9\]"):
        weight_N = table.flow_weights()
    np.testing.assert_allclose(weight_N[:9], np.exp(-1), rtol=1e-6)
    assert weight_N[9] == 0


def test_equal_losses_are_told(tmp_path):
    with pytest.warns(DataWarning, match="all weights are 0.3679, because all losses are equal"):
        weight_N = _table([2.5] * 4, tmp_path).flow_weights()
    np.testing.assert_allclose(weight_N, np.exp(-1), rtol=1e-6)


@pytest.mark.parametrize("tau", [0.0, -1.0, np.nan, np.inf])
def test_a_table_refuses_a_temperature(tau, tmp_path):
    with pytest.raises(LossTableError, match="it must be positive and finite"):
        _table([1.0, 2.0], tmp_path).flow_weights(tau)


def test_a_temperature_of_ones_own_that_float32_does_not_have(tmp_path):
    table = _table([0.0, 1.0, 2.0], tmp_path)
    with pytest.warns(DataWarning, match="2 of 3 weights are 0"):
        np.testing.assert_array_equal(table.flow_weights(1e-60), [1, 0, 0])
    np.testing.assert_array_equal(np.asarray(ej.flow_weights([0.0, 1.0], 1e60)), [1, 1])


def test_medians_of_huge_losses_and_other_functions():
    assert float(ej.temperature(np.float32([3e38, 3.2e38]))) == np.float32(3.1e38)
    assert ej.kl_dro_weights(np.float32([0, 3e38]), 0.1).tolist() == [0, 1]
    with pytest.raises(ValueError, match="the mean of the weights is 0"):
        ej.control_weights(np.zeros(3), "mean_one", 0)
    with pytest.raises(ValueError, match="pi_N has negative"):
        ej.entropic_objective(np.float32([1.5, -0.5]), np.zeros(2, np.float32), 1.0)


# Tensors in files.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(dtype, bad, tmp_path):
    path = tmp_path / "model.safetensors"
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    largest = float(ml_dtypes.finfo(dtype).max)
    tensors = {
        "good": np.array([[largest, -largest], [0.0, 1.0]], dtype),
        "count": np.array(7),
        "bad": np.array([1.0, bad, bad], dtype),
        "empty": np.zeros(0, dtype),
    }
    save_file(tensors, path)
    files = dict.fromkeys(tensors, path)
    read = dict(weight_files.read_tensors(files, ["good", "count", "empty"]))
    np.testing.assert_array_equal(read["good"], tensors["good"])
    with pytest.raises(weight_files.WeightsError, match="2 of 3 values of bad are NaN or infinite"):
        list(weight_files.read_tensors(files, tensors))
