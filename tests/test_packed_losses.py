"""Losses and gradients of packed rows are those of each example alone."""

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
from packed import CONFIGS, FAST, LONGEST, REDUCTIONS, SIZE, SOURCES, VOCAB

from easy_jax.core.causal_lm import causal_lm_loss
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.data import training_loader
from easy_jax.data.packing import NO_TARGET
from easy_jax.parallel import sharding

# Losses, against each example alone, in NumPy.


def _alone(junk_seed=5):
    """Each example in a row of its own, from the start; behind it anything may follow."""
    examples = packed.examples()
    rng = np.random.default_rng(junk_seed)
    tokens = rng.integers(0, VOCAB, (SIZE, LONGEST)).astype(np.int32)
    targets = np.full((SIZE, LONGEST), -1, np.int32)
    for i, record in enumerate(examples):
        stop, first = len(record["tokens"]) - 1, record["target_start"] - 1
        tokens[i, :stop] = record["tokens"][:-1]
        targets[i, first:stop] = record["tokens"][first + 1 :]
    return tokens, targets


@functools.cache
def _expected_token_losses(family="llama"):
    """The losses of each example's target tokens, in float64."""
    tokens, targets = _alone()
    logits = packed.logits(family)(tokens)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return [nll[i][targets[i] != NO_TARGET] for i in range(SIZE)]


def _expected_losses(family="llama"):
    return np.array([losses.mean() for losses in _expected_token_losses(family)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("family", CONFIGS)
def test_losses_are_those_of_each_example_alone(family, kind, tmp_path):
    table = packed.score_rows(SOURCES[kind](), tmp_path, family)
    expected = _expected_losses(family)
    assert expected.std() > 0.3
    np.testing.assert_allclose(table.loss_N(), expected, rtol=1e-5)
    tokens = table.token_losses()
    for i, losses in enumerate(_expected_token_losses(family)):
        np.testing.assert_allclose(tokens[i], losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_losses_depend_on_what_comes_before():
    # Were it not so, the test above would say little about attention.
    tokens, _ = _alone()
    other = tokens.copy()
    other[:, 0] = (other[:, 0] + 1) % VOCAB
    for family in CONFIGS:
        difference = np.abs(packed.logits(family)(other) - packed.logits(family)(tokens))
        assert difference[:, 2].max(axis=-1).min() > 1e-2


@functools.cache
def _per_example_gradients(with_token_weights=False):
    """d(nll_sum_i) / d(params), [SIZE, parameters], each example alone through the model."""
    tokens, targets = _alone()
    weight = np.float32(targets != NO_TARGET)
    if with_token_weights:
        weight[targets != NO_TARGET] = packed.token_weights(packed.examples()).values
    graphdef, params = nnx.split(packed.model())

    def nll_sum(params, tokens, targets, weight):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[None])[0])
        chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return -jnp.sum(weight * chosen)

    gradient = jax.jit(jax.grad(nll_sum), compiler_options=FAST)
    return np.stack(
        [packed.flat(gradient(params, *x)) for x in zip(tokens, targets, weight, strict=True)]
    )


def _expected_gradient(reduction, weight_N, token_weights=False):
    weight = np.float64(weight_N)
    count = np.float64(packed.examples().num_targets)
    gradients = _per_example_gradients(token_weights)
    if reduction == "example_mean":
        return (weight / count) @ gradients / SIZE
    return weight @ gradients / (count.sum() if reduction == "token_mean" else weight @ count)


GIVE_GRADIENT = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
_COMPILED = {}


def _gradient(batch, reduction, devices=1, micro_batches=1):
    """The gradient that a step hands to its optimiser, flat, and the metrics."""
    mesh = devices_mesh(devices)
    batch = {name: array for name, array in batch.items() if name != "example_id"}
    state = init_train_state(packed.model(), GIVE_GRADIENT, mesh=mesh)
    sharded = sharding.shard_batch(batch, mesh)
    shapes = tuple((name, array.shape) for name, array in sorted(batch.items()))
    key = (reduction, devices, micro_batches, shapes)
    if key not in _COMPILED:
        step = make_train_step(
            nnx.graphdef(packed.model()),
            causal_lm_loss,
            GIVE_GRADIENT,
            reduction=reduction,
            micro_batches=micro_batches,
        )
        _COMPILED[key] = step.lower(state, sharded).compile(compiler_options=FAST)
    state, metrics = _COMPILED[key](state, sharded)
    return packed.flat(state.opt_state), metrics


def _batch(source, **options):
    """The whole data set in one batch; some of its rows are padding."""
    (batch,) = training_loader(source, 32, epochs=1, seed=3, **options)
    return batch


def _assert_close(actual, expected, tolerance=1e-4):
    difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert difference < tolerance


# Each pair of devices, micro-batches and reduction comes once: a compilation takes seconds.
SPLITS = [
    (REDUCTIONS[(i + j) % 3], devices, micro_batches)
    for i, devices in enumerate((1, 2, 8))
    for j, micro_batches in enumerate((1, 2, 4))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reduction", "devices", "micro_batches"),
    [("packed", *split) for split in SPLITS] + [("padded", *split) for split in SPLITS[::4]],
)
def test_the_gradient_is_the_weighted_sum_over_the_examples(
    kind, reduction, devices, micro_batches
):
    batch = _batch(SOURCES[kind](), weight_N=packed.weights())
    gradient, metrics = _gradient(batch, reduction, devices, micro_batches)
    expected = _expected_gradient(reduction, packed.weights())
    _assert_close(gradient, expected)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(expected), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), [("packed", 8), ("padded", 1)])
def test_the_gradient_with_token_weights(kind, devices):
    weights = {
        "weight_N": packed.weights(),
        "token_weight": packed.token_weights(packed.examples()),
    }
    batch = _batch(SOURCES[kind](), **weights)
    gradient, metrics = _gradient(batch, "token_mean", devices)
    _assert_close(gradient, _expected_gradient("token_mean", packed.weights(), token_weights=True))
    losses = np.concatenate(_expected_token_losses())
    weight = (
        np.repeat(packed.weights(), packed.examples().num_targets) * weights["token_weight"].values
    )
    np.testing.assert_allclose(metrics["loss"], weight @ losses / len(losses), rtol=1e-5)


@pytest.mark.slow
def test_a_weight_of_one_is_no_weight():
    plain, ones = _batch(packed.source()), _batch(packed.source(), weight_N=np.ones(SIZE))
    chex.assert_trees_all_equal(plain, ones)
    gradient, _ = _gradient(plain, "token_mean")
    _assert_close(gradient, _expected_gradient("token_mean", np.ones(SIZE)))


@pytest.mark.slow
def test_a_weight_of_zero_leaves_the_example_out():
    zero, missing = packed.weights(), packed.weights()
    out = [4, 17]
    zero[out], missing[out] = 0.0, np.nan
    count = packed.examples().num_targets
    share = {
        "weight_mean": 1.0,
        "token_mean": 1.0 - count[out].sum() / count.sum(),
    }
    # Unpacked, where shapes stay as they are; the splits were compiled above.
    source = packed.padded_source()
    for split in (("weight_mean", 2, 2), ("token_mean", 1, 1)):
        reduction = split[0]
        weighted, _ = _gradient(_batch(source, weight_N=zero), *split)
        batch = _batch(source, weight_N=missing)
        assert batch["mask"].sum() == SIZE - len(out)
        without, _ = _gradient(batch, *split)
        _assert_close(weighted, share[reduction] * without)
        _assert_close(weighted, _expected_gradient(reduction, zero))


@pytest.mark.slow
def test_the_table_is_in_order_over_its_parts(tmp_path):
    table = packed.score_rows(packed.source(), tmp_path, batch_size=4)
    assert len(list(tmp_path.glob("part-*.parquet"))) > 1
    ids, loss, count = (np.concatenate(column) for column in zip(*table.rows(), strict=True))
    assert ids.tolist() == list(range(SIZE))
    np.testing.assert_array_equal(count, packed.examples().num_targets)
    np.testing.assert_allclose(loss, _expected_losses(), rtol=1e-5)
