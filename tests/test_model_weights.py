"""Weights of the current model in the training step: invariances, images, and refusals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import pytest
from flax import nnx
from helpers import devices_mesh

import easy_jax as ej
from easy_jax.core import weightings
from easy_jax.core.causal_lm import causal_lm_loss
from easy_jax.core.held_params import OldState, find, hold_old
from easy_jax.core.losses import ContractError, squared_error
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.data import ArraySource, Ragged, training_loader
from easy_jax.io.checks import ConfigError
from easy_jax.parallel import sharding
from easy_jax.train.config import StageConfig

pytestmark = pytest.mark.slow

CURRENT = [name for name in weightings.names() if weightings.get(name).reads_model()]
CONTROLS = ("uniform", "mean_one")
RULES = [(name, {}) for name in CURRENT] + [(name, {"of": "dft"}) for name in CONTROLS]


@functools.cache
def _frozen():
    """A loss for every target token, near those of the model."""
    examples = packed.examples()
    rng = np.random.default_rng(3)
    offsets = np.cumsum([0, *examples.num_targets])
    return Ragged(rng.gamma(2.0, 2.0, offsets[-1]).astype(np.float32), offsets)


def _batch(max_segments=0, weight_N=None, rows=None):
    """All examples as one global batch, in rows of any packing."""
    source = packed.source(max_segments=max_segments)
    order = source.rows(np.arange(packed.SIZE))
    size = rows or -(-len(order) // 8) * 8
    loader = training_loader(
        source,
        size,
        epochs=1,
        seed=0,
        weight_N=weight_N,
        frozen_nll=_frozen(),
        rows=np.arange(size),
    )
    batches = list(loader)
    assert len(batches) == 1
    return {name: array for name, array in batches[0].items() if name != "example_id"}


def _reads_old(weighting):
    return weighting is not None and "old" in weighting.needs


def _stepped(
    batch, weighting, *, devices=1, micro_batches=1, reduction="token_mean", family="llama"
):
    """Parameters and metrics after one step of plain descent."""
    mesh = devices_mesh(devices)
    model = packed.model(family)
    optimizer = (
        optax.chain(optax.sgd(1.0), hold_old(8)) if _reads_old(weighting) else optax.sgd(1.0)
    )
    step = make_train_step(
        nnx.graphdef(model),
        causal_lm_loss,
        optimizer,
        reduction=reduction,
        weighting=weighting,
        micro_batches=micro_batches,
        mesh=mesh,
    )
    state = init_train_state(model, optimizer, mesh=mesh)
    state, metrics = step(state, sharding.shard_batch(batch, mesh))
    return jax.device_get((state.params, metrics))


def _assert_same(found, expected, tolerance=2e-5):
    chex.assert_trees_all_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for name in expected[1]:
        np.testing.assert_allclose(found[1][name], expected[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name,options", RULES)
def test_any_split_gives_the_same_step(name, options):
    weighting = weightings.get(name, **options)
    batch = _batch(rows=32)
    expected = _stepped(batch, weighting)
    assert np.isfinite(expected[1]["loss"]) and expected[1]["weight_mean"] > 0
    _assert_same(_stepped(batch, weighting, devices=8, micro_batches=2), expected)


@pytest.mark.parametrize(
    "name,options", [("eaft", {}), ("talr", {}), ("iw", {}), ("uniform", {"of": "dft"})]
)
def test_packing_does_not_matter(name, options):
    weighting = weightings.get(name, **options)
    alone, together = _batch(max_segments=1), _batch()
    assert len(alone["tokens"]) > len(together["tokens"])
    _assert_same(_stepped(together, weighting), _stepped(alone, weighting))


@pytest.mark.parametrize(
    "name,reduction,options",
    [
        ("eaft", "example_mean", {}),
        ("talr", "weight_mean", {}),
        ("iw", "example_mean", {}),
        ("mean_one", "weight_mean", {"of": "dft"}),
    ],
)
def test_a_weight_of_zero_removes_an_example(name, reduction, options):
    weighting = weightings.get(name, **options)
    weight_N = np.where(np.arange(packed.SIZE) % 3 == 0, 0.0, 1.0)
    zero = _batch(weight_N=weight_N, max_segments=1)
    without = dict(zero)
    without["mask"] = zero["mask"] & (zero["weight"] != 0)
    found, expected = (_stepped(batch, weighting, reduction=reduction) for batch in (zero, without))
    if reduction == "example_mean":  # which divides by the number of examples
        scale = zero["mask"].sum() / without["mask"].sum()
        start = jax.device_get(nnx.state(packed.model("llama"), nnx.Param))
        found = jax.tree.map(lambda a, b: b + (a - b) * scale, found[0], start), {}
        expected = expected[0], {}
    _assert_same(found, expected)


@pytest.mark.parametrize(
    "family,reduction",
    [("gemma2", "token_mean"), ("llama", "example_mean"), ("llama", "weight_mean")],
)
def test_the_power_zero_is_plain_training(family, reduction):
    batch = _batch()
    plain = _stepped(batch, None, family=family, reduction=reduction)
    found = _stepped(batch, weightings.Power(0.0), family=family, reduction=reduction)
    chex.assert_trees_all_close(found[0], plain[0], rtol=1e-6, atol=1e-6)
    assert found[1]["weight_mean"] == 1.0 and found[1]["weight_zero"] == 0.0
    assert abs(found[1]["weight_effective"] - 1.0) < 1e-6


@pytest.mark.parametrize("name,options", [("psft", {}), ("mean_one", {"of": "psft"})])
def test_the_old_model_is_that_of_the_last_refresh(name, options):
    """Against plain steps whose token weights come from two explicit models."""
    mesh, model = devices_mesh(1), packed.model("llama")
    weighting = weightings.get(name, refresh_steps=2, limit=1.2, **options)
    graphdef, sgd = nnx.graphdef(model), optax.sgd(1.0)
    batch = sharding.shard_batch(_batch(), mesh)
    options = {"reduction": "token_mean", "mesh": mesh}
    optimizer = optax.chain(sgd, hold_old(weighting.old_steps()))
    step = make_train_step(graphdef, causal_lm_loss, optimizer, weighting=weighting, **options)
    state = init_train_state(model, optimizer, mesh=mesh)
    plain = make_train_step(graphdef, causal_lm_loss, sgd, **options)
    expected = init_train_state(model, sgd, mesh=mesh)

    @jax.jit
    def losses(params):
        return ej.causal_lm_token_losses(nnx.merge(graphdef, params), batch)[2]

    old = jax.tree.map(jnp.copy, expected.params)
    shares = []
    for number in range(5):
        stats = ej.TokenStats(
            losses(expected.params), old_nll=losses(old), mask=batch["targets"] >= 0
        )
        weight = weighting(stats)
        shares.append(float(jnp.mean(weight[batch["targets"] >= 0] == 0)))
        expected, _ = plain(expected, {**batch, "token_weight": weight})
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["weight_zero"], shares[-1], atol=1e-6)
        if number % 2:
            old = jax.tree.map(jnp.copy, expected.params)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-4, atol=1e-5)
    assert shares[0] == 0 < shares[1]  # before the first refresh all ratios are 1, once
    chex.assert_trees_all_close(find(state.opt_state, OldState).params, old, rtol=1e-4, atol=1e-5)


def test_one_compilation():
    mesh = devices_mesh(8)
    model, optimizer = packed.model("llama"), optax.sgd(0.1)
    for name in ("eaft", "talr"):
        step = make_train_step(
            nnx.graphdef(model),
            causal_lm_loss,
            optimizer,
            reduction="token_mean",
            weighting=weightings.get(name),
            mesh=mesh,
        )
        state = init_train_state(model, optimizer, mesh=mesh)
        for _ in range(3):
            state, _ = step(state, sharding.shard_batch(_batch(), mesh))
        assert step._cache_size() == 1


# Losses of one value per example: images, and one's own.


def _classifier(seed=0):
    class Linear(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 5, rngs=nnx.Rngs(seed))

        def __call__(self, image, mask=None):
            return self.linear(image.reshape(len(image), -1))

    return Linear()


def _images():
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(16, 2, 2, 1)).astype(np.float32),
        "label": rng.integers(0, 5, 16),
        "weight": np.ones(16, np.float32),
        "mask": np.arange(16) < 14,
        "frozen_nll": rng.gamma(2.0, size=16).astype(np.float32),
    }


@pytest.mark.parametrize("name,options", RULES)
def test_image_models_get_the_same_statistics(name, options):
    """The gradient is that of losses times the weights of whole logits, computed beforehand."""
    batch, model = _images(), _classifier()
    weighting = weightings.get(name, **options)
    mesh, optimizer = devices_mesh(1), optax.chain(optax.sgd(1.0), hold_old(8))

    def stepped(weighting, batch):
        step = make_train_step(
            nnx.graphdef(model),
            ej.classification_loss,
            optimizer,
            reduction="example_mean",
            weighting=weighting,
            mesh=mesh,
        )
        return step(init_train_state(model, optimizer, mesh=mesh), batch)[0].params

    logits = model(batch["image"])
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, batch["label"][:, None], axis=1)[:, 0]
    stats = ej.TokenStats(
        nll,
        batch["frozen_nll"],
        old_nll=nll,  # no step has been taken
        entropy=-jnp.sum(jnp.exp(log_p) * log_p, axis=1),
        collision=jnp.sum(jnp.exp(2 * log_p), axis=1),
        mask=batch["mask"],
    )
    weighted = {**batch, "weight": np.asarray(weighting(stats))}
    chex.assert_trees_all_close(
        stepped(weighting, batch), stepped(None, weighted), rtol=1e-5, atol=1e-6
    )


def _squares(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def _source(size=32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    return ArraySource({"x": x, "y": x[:, :1] * 2.0})


STAGE = StageConfig(epochs=2, batch_size=8)


def test_a_loss_of_one_s_own_gives_losses_only():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = optax.sgd(0.1)
    arguments = (nnx.graphdef(model), _squares, optimizer)
    with pytest.raises(ContractError, match=r"Eaft.*distribution, and _squares gives losses only"):
        make_train_step(*arguments, reduction="example_mean", weighting=weightings.Eaft())
    step = make_train_step(*arguments, reduction="example_mean", weighting=weightings.Psft())
    batch = {"x": jnp.ones((1, 3)), "y": jnp.ones((1, 1)), "weight": jnp.ones(1)}
    with pytest.raises(ConfigError, match=r"Psft.* earlier steps: put .*hold_old"):
        step(
            init_train_state(model, optimizer, mesh=devices_mesh(1)),
            {**batch, "mask": jnp.ones(1, bool)},
        )
    with pytest.raises(ConfigError, match=r"Flow.*does not read the current model"):
        make_train_step(*arguments, reduction="example_mean", weighting=weightings.Flow())


def test_none_is_plain_training():
    batch = _batch()
    found, plain = (_stepped(batch, weighting) for weighting in (weightings.get("none"), None))
    chex.assert_trees_all_equal(found, plain)
