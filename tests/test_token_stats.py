"""Statistics of the fused head against NumPy in float64, and rules between loss and gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lm_head import _assert_close, _case, _numpy
from test_vocabulary_parallel import _on

from easy_jax.config import MeshConfig
from easy_jax.core.losses import logit_stats
from easy_jax.kernels import token_stats
from easy_jax.kernels.linear_cross_entropy import (
    NO_TARGET,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    weighted_linear_cross_entropy,
    weighted_sum,
)
from easy_jax.parallel import sharding

FIELDS = ("nll", *token_stats.OF_DISTRIBUTION)
MESHES = (None, (1, 2, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8))


def _mesh(sizes):
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def reference(hidden, head, targets, cap=None):
    """All statistics of whole logits in float64; 0 where there is no target."""
    logits = np.einsum("...d,vd->...v", np.float64(hidden), np.float64(head))
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    top = logits.max(-1)
    lse = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    log_p = logits - lse[..., None]
    there = targets != NO_TARGET
    chosen = np.take_along_axis(logits, np.where(there, targets, 0)[..., None], -1)[..., 0]
    found = {
        "nll": lse - chosen,
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
        "collision": np.exp(2 * log_p).sum(-1),
        "max_prob": np.exp(top - lse),
        "lse": lse,
        "is_argmax": chosen == top,
        "is_close": (np.abs(logits - top[..., None]) < 1e-4 * np.abs(top)[..., None]).sum(-1) > 1,
    }
    return {name: np.where(there, values, 0) for name, values in found.items()}


@functools.partial(jax.jit, static_argnames=("cap", "mesh", "block", "chunk"))
def _stats(hidden, head, targets, cap=None, mesh=None, block=None, chunk=None):
    with sharding.tracing_on(mesh):
        return linear_cross_entropy_stats(
            hidden, head, targets, cap, vocab_block=block, token_chunk=chunk
        )


def _assert_stats(stats, expected, targets, tolerance=1e-5):
    for name in FIELDS:
        actual = np.float64(getattr(stats, name))
        if name == "is_argmax":  # float32 cannot tell
            actual = np.where(expected["is_close"], expected[name], actual)
        np.testing.assert_allclose(
            actual, expected[name], rtol=tolerance, atol=tolerance, err_msg=name
        )
    np.testing.assert_array_equal(stats.mask, targets != NO_TARGET)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_large_vocabulary(sizes, cap):
    case = _case((8, 12), 49_152, scale=2.0, features=16)
    expected = reference(*case[:3], cap)
    mesh = None if sizes is None else _mesh(sizes)
    hidden, head, targets, _ = case if mesh is None else _on(mesh, case)
    stats = _stats(hidden, head, targets, cap=cap, mesh=mesh)
    _assert_stats(stats, expected, case[2])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("vocab,block,chunk", [(24, 8, 3), (46, 16, 5), (23, 2048, 3)])
def test_blocks_of_a_small_vocabulary(vocab, block, chunk, cap, scale):
    hidden, head, targets, _ = _case((3, 7), vocab, scale=scale)
    stats = _stats(hidden, head, targets, cap=cap, block=block, chunk=chunk)
    # Float32 logits of a few hundred have an error of 1e-5 themselves.
    logits = np.einsum("...d,vd->...v", hidden, head)
    tolerance = 1e-5 if cap is not None else max(1e-5, 3e-7 * np.abs(logits).max())
    _assert_stats(stats, reference(hidden, head, targets, cap), targets, tolerance)


def test_the_largest_logit_comes_last_and_first():
    head = np.zeros((12, 1), np.float32)
    targets = np.array([11, 0, 3], np.int32)
    for best in (0, 5, 11):
        head[:] = -40.0
        head[best] = 40.0
        stats = _stats(np.ones((3, 1), np.float32), head, targets, block=4)
        expected = reference(np.ones((3, 1)), head, targets)
        _assert_stats(stats, expected, targets)
        np.testing.assert_array_equal(stats.is_argmax, targets == best)


def test_ties_count_as_the_argmax():
    stats = _stats(np.zeros((2, 3), np.float32), np.ones((4, 3), np.float32), np.array([1, 3]))
    assert stats.is_argmax.all()
    np.testing.assert_allclose(stats.entropy, np.log(4), rtol=1e-6)


def test_bfloat16_accumulates_in_float32():
    hidden, head, targets, _ = _case((2, 9), 300, features=8)
    hidden, head = jnp.bfloat16(hidden), jnp.bfloat16(head)
    _assert_stats(
        _stats(hidden, head, targets), reference(hidden, head, targets), targets, tolerance=2e-5
    )


def test_losses_and_their_gradients_are_those_without_statistics():
    hidden, head, targets, cotangent = _case((3, 7), 46)

    def loss(function, hidden, head):
        return jnp.sum(function(hidden, head, targets) * cotangent)

    def of_stats(*arguments):
        return linear_cross_entropy_stats(*arguments).nll

    plain, expected = jax.value_and_grad(loss, (1, 2))(linear_cross_entropy, hidden, head)
    value, gradients = jax.value_and_grad(loss, (1, 2))(of_stats, hidden, head)
    assert value == plain
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_nan_stays_with_its_token():
    hidden, head, targets, _ = _case((1, 7), 24)
    targets[:] = 3
    hidden[0, 2] = np.nan
    stats = _stats(hidden, head, targets)
    for name in ("nll", "entropy", "collision", "lse"):
        np.testing.assert_array_equal(
            np.isnan(getattr(stats, name)[0]), np.arange(7) == 2, err_msg=name
        )


def test_whole_logits():
    hidden, head, targets, _ = _case((9,), 24)
    targets = np.abs(targets)
    logits = np.einsum("nd,vd->nv", hidden, head)
    _assert_stats(
        logit_stats(jnp.asarray(logits), jnp.asarray(targets)),
        reference(hidden, head, targets),
        targets,
    )


# Rules.


def _probability_and_more(stats):
    """Reads the loss, the entropy and a given field."""
    return jnp.exp(-stats.nll) + 0.1 * stats.entropy * jnp.exp(-stats.frozen_nll)


@functools.partial(jax.jit, static_argnames=("cap", "mesh", "rule", "more"))
def _rule(hidden, head, targets, weight, given, cap=None, mesh=None, rule=None, more=True):
    """The sum, the rule's weights, and the gradients."""
    with sharding.tracing_on(mesh):

        def loss(hidden, head):
            options = {"rule": rule, "given": given, "soft_cap": cap, "more": more}
            found = weighted_sum(hidden, head, targets, weight, **options)
            return found.total, found.rule_N

        (total, w), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
        return total, w, *gradients


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_rule_gives_the_weights_and_no_gradient_of_its_own(sizes, cap):
    case = _case((8, 12), 64, features=8)
    hidden, head, targets, _ = case
    rng = np.random.default_rng(1)
    weight, frozen = rng.random((2, 8, 12)).astype(np.float32)
    weight[0, :5] = 0.0
    targets = np.where(weight == 0, NO_TARGET, targets)
    stats = reference(hidden, head, targets, cap)
    w = np.exp(-stats["nll"]) + 0.1 * stats["entropy"] * np.exp(-np.float64(frozen))
    w = np.where(targets == NO_TARGET, 0.0, w)
    nll, *gradients = _numpy(hidden, head, targets, weight * w, cap)
    mesh = None if sizes is None else _mesh(sizes)
    arrays = case if mesh is None else _on(mesh, case)
    found = _rule(
        *arrays[:3],
        weight,
        {"frozen_nll": frozen},
        cap=cap,
        mesh=mesh,
        rule=_probability_and_more,
    )
    _assert_close(found, [np.sum(weight * w * nll), w, *gradients])


def _ones(stats):
    return jnp.ones_like(stats.nll)


@pytest.mark.parametrize("sizes", [None, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_rule_of_ones_changes_nothing(sizes):
    mesh = None if sizes is None else _mesh(sizes)
    case = _case((8, 12), 64, features=8)
    hidden, head, targets, weight = case if mesh is None else _on(mesh, case)

    @jax.jit
    def plain(hidden, head):
        with sharding.tracing_on(mesh):

            def loss(hidden, head):
                return weighted_linear_cross_entropy(hidden, head, targets, weight)

            return jax.value_and_grad(loss, (0, 1))(hidden, head)

    total, gradients = plain(hidden, head)
    found = _rule(hidden, head, targets, weight, {}, mesh=mesh, rule=_ones, more=False)
    # The compiler may add up the total in another order; its terms have both signs.
    np.testing.assert_allclose(found[0], total, atol=3e-7 * np.abs(weight).sum())
    for a, b in zip(found[2:], gradients, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rule_of_another_shape_is_refused():
    hidden, head, targets, weight = _case((3, 7), 24)
    with pytest.raises(ValueError, match=r"the weighting _total returned .* \(3,\).*\(3, 7\)"):
        _rule(hidden, head, targets, weight, {}, rule=_total)


def _total(stats):
    return jnp.sum(stats.nll, axis=1)


@pytest.mark.slow
def test_no_logits_in_memory():
    """The compiled step's temporary memory is far below that of the logits."""
    tokens, vocab = 2048, 32_768
    arguments = (
        jax.ShapeDtypeStruct((1, tokens, 32), jnp.float32),
        jax.ShapeDtypeStruct((vocab, 32), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.float32),
        {"frozen_nll": jax.ShapeDtypeStruct((1, tokens), jnp.float32)},
    )
    compiled = _rule.lower(*arguments, rule=_probability_and_more).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * vocab / 8
