"""KL(p0 || p) of the fused head, and its gradient, against NumPy in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lm_head import _assert_close, _case, _numpy
from test_vocabulary_parallel import _on

from easy_jax.config import MeshConfig
from easy_jax.kernels import linear_cross_entropy as fused
from easy_jax.kernels.divergence import Frozen
from easy_jax.kernels.linear_cross_entropy import NO_TARGET, linear_cross_entropy_and_kl
from easy_jax.parallel import sharding

MESHES = (None, (1, 2, 1), (1, 8, 1), (2, 2, 2))


def _mesh(sizes):
    return (
        None
        if sizes is None
        else sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    )


def _log_softmax(hidden, head, cap):
    """Log-probabilities, and the slope of the soft cap, in float64."""
    logits = np.einsum("...d,vd->...v", np.float64(hidden), np.float64(head))
    slope = np.ones_like(logits)
    if cap is not None:
        slope = 1.0 / np.cosh(logits / cap) ** 2
        logits = cap * np.tanh(logits / cap)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)), slope


def reference(hidden, head, targets, frozen, weight, cap=None):
    """KL(p0 || p), and the gradients of sum(weight * KL), from whole logits in float64."""
    log_p, slope = _log_softmax(hidden, head, cap)
    log_p0, _ = _log_softmax(*frozen, cap)
    there = targets != NO_TARGET
    kl = np.where(there, (np.exp(log_p0) * (log_p0 - log_p)).sum(-1), 0.0)
    factor = np.where(there, np.float64(weight), 0.0)[..., None]
    bar = (np.exp(log_p) - np.exp(log_p0)) * factor * slope
    flat = bar.reshape(-1, head.shape[0])
    head_bar = np.einsum("nv,nd->vd", flat, np.float64(hidden).reshape(-1, hidden.shape[-1]))
    return kl, np.einsum("...v,vd->...d", bar, np.float64(head)), head_bar


def _pair(case, seed=1, apart=0.3):
    """A frozen pair near the current one."""
    rng = np.random.default_rng(seed)
    return tuple((x + apart * rng.normal(size=x.shape)).astype(np.float32) for x in case[:2])


@functools.partial(jax.jit, static_argnames=("cap", "mesh", "block", "chunk"))
def _both(hidden, head, targets, frozen, weights, cap=None, mesh=None, block=None, chunk=None):
    """Losses and divergences, and the gradients of their weighted sum."""
    with sharding.tracing_on(mesh):

        def function(hidden, head):
            return linear_cross_entropy_and_kl(
                hidden, head, targets, *frozen, soft_cap=cap, vocab_block=block, token_chunk=chunk
            )

        found, vjp = jax.vjp(function, hidden, head)
        return *found, *vjp(weights)


@functools.partial(jax.jit, static_argnames=("cap", "mesh", "rule"))
def _sum(hidden, head, targets, frozen, weights, cap=None, mesh=None, rule=None):
    """The weighted sum of both, the divergences, and the gradients."""
    with sharding.tracing_on(mesh):

        def function(hidden, head):
            found = fused.weighted_sum(
                hidden,
                head,
                targets,
                weights[0],
                rule=rule,
                frozen=Frozen(*frozen),
                kl_weight_N=weights[1],
                soft_cap=cap,
            )
            return found.total, found.kl_N

        (total, kl), gradients = jax.value_and_grad(function, (0, 1), has_aux=True)(hidden, head)
        return total, kl, *gradients


def _expected(case, frozen, weights, cap):
    hidden, head, targets, _ = case
    nll, *nll_bars = _numpy(hidden, head, targets, weights[0], cap)
    kl, *kl_bars = reference(hidden, head, targets, frozen, weights[1], cap)
    return nll, kl, *(a + b for a, b in zip(nll_bars, kl_bars, strict=True))


def _weights(shape, seed=2):
    return tuple(np.random.default_rng(seed).random((2, *shape)).astype(np.float32))


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("vocab,block,chunk", [(24, 8, 3), (46, 16, 5), (23, 2048, 3)])
def test_losses_and_divergences_in_blocks(vocab, block, chunk, cap):
    case = _case((3, 7), vocab)
    frozen, weights = _pair(case), _weights((3, 7))
    found = _both(*case[:3], frozen, weights, cap=cap, block=block, chunk=chunk)
    _assert_close(found, _expected(case, frozen, weights, cap))


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_large_vocabulary_on_any_mesh(sizes, cap):
    case = _case((8, 12), 49_152, features=16)
    frozen, weights, mesh = _pair(case), _weights((8, 12)), _mesh(sizes)
    arrays = case if mesh is None else _on(mesh, case)
    pair = frozen if mesh is None else _on(mesh, (*frozen, *case[2:]))[:2]
    expected = _expected(case, frozen, weights, cap)
    _assert_close(_both(*arrays[:3], pair, weights, cap=cap, mesh=mesh), expected)
    total = np.sum(weights[0] * expected[0]) + np.sum(weights[1] * expected[1])
    found = _sum(*arrays[:3], pair, weights, cap=cap, mesh=mesh)
    _assert_close(found, (total, *expected[1:]))


def _probability(stats):
    return jnp.exp(-stats.nll)


@pytest.mark.parametrize("sizes", [None, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_rule_weighs_the_losses_and_not_the_divergences(sizes):
    """This is ASFT: DFT's weights on the losses, and a weight of each token's divergence."""
    case = _case((8, 12), 64, features=8)
    frozen, (weight, kl_weight), mesh = _pair(case), _weights((8, 12)), _mesh(sizes)
    weight[0], kl_weight[1], weight[2], kl_weight[2] = 0.0, 0.0, 0.0, 0.0
    targets = np.where((weight == 0) & (kl_weight == 0), NO_TARGET, case[2])
    case = (*case[:2], targets, case[3])
    nll = _numpy(*case[:3], weight, None)[0]
    expected = _expected(case, frozen, (weight * np.exp(-nll), kl_weight), None)
    total = np.sum(weight * np.exp(-nll) * expected[0]) + np.sum(kl_weight * expected[1])
    arrays = case if mesh is None else _on(mesh, case)
    pair = frozen if mesh is None else _on(mesh, (*frozen, *case[2:]))[:2]
    found = _sum(*arrays[:3], pair, (weight, kl_weight), mesh=mesh, rule=_probability)
    _assert_close(found, (total, *expected[1:]))


def test_a_model_is_at_no_distance_from_itself():
    case = _case((3, 7), 46)
    weights = (np.zeros((3, 7), np.float32), np.ones((3, 7), np.float32))
    _, kl, hidden_bar, head_bar = _both(*case[:3], case[:2], weights)
    for array in (kl, hidden_bar, head_bar):
        np.testing.assert_allclose(array, 0.0, atol=2e-6)


def test_far_apart():
    """p0 certain of a token that p excludes, and the reverse."""
    head = np.array([[60.0], [0.0], [-60.0]], np.float32)
    hidden, frozen = np.array([[1.0], [-1.0]], np.float32), np.array([[-1.0], [1.0]], np.float32)
    weights = (np.zeros(2, np.float32), np.ones(2, np.float32))
    found = _both(hidden, head, np.array([0, 1], np.int32), (frozen, head), weights, block=2)
    expected = reference(hidden, head, np.array([0, 1]), (frozen, head), weights[1])
    np.testing.assert_allclose(found[1], [120.0, 120.0], rtol=1e-6)
    _assert_close(found[1:], expected)


def test_a_nan_stays_with_its_token():
    case = _case((1, 7), 24)
    targets = np.full((1, 7), 3, np.int32)
    frozen = _pair(case)
    frozen[0][0, 2] = np.nan
    _, kl, hidden_bar, _ = _both(*case[:2], targets, frozen, _weights((1, 7)))
    np.testing.assert_array_equal(np.isnan(kl[0]), np.arange(7) == 2)
    np.testing.assert_array_equal(np.isnan(hidden_bar[0]).any(-1), np.arange(7) == 2)


def test_the_frozen_pair_has_no_gradient():
    case = _case((3, 7), 46)

    def function(frozen):
        return linear_cross_entropy_and_kl(*case[:3], *frozen)[1].sum()

    for gradient in jax.grad(function)(tuple(map(jnp.asarray, _pair(case)))):
        np.testing.assert_array_equal(gradient, 0.0)


def test_other_shapes_are_refused():
    hidden, head, targets, _ = _case((3, 7), 46)
    with pytest.raises(ValueError, match=r"frozen hidden states and head have shapes .*\(45, 6\)"):
        linear_cross_entropy_and_kl(hidden, head, targets, hidden, head[:45])


@pytest.mark.parametrize("sizes", [None, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_rule_may_be_infinite_at_tokens_of_weight_0(sizes):
    case = _case((8, 12), 64, features=8)
    frozen, (weight, kl_weight), mesh = _pair(case), _weights((8, 12)), _mesh(sizes)
    weight[:, ::2] = 0.0
    given = {"frozen_nll": np.where(weight == 0, 0.0, 1.0).astype(np.float32)}
    arrays = case if mesh is None else _on(mesh, case)
    pair = frozen if mesh is None else _on(mesh, (*frozen, *case[2:]))[:2]

    @jax.jit
    def total(hidden, head):
        with sharding.tracing_on(mesh):
            found = fused.weighted_sum(
                hidden,
                head,
                arrays[2],
                weight,
                rule=lambda stats: 1.0 / stats.frozen_nll,
                given=given,
                frozen=Frozen(*pair),
                kl_weight_N=kl_weight,
            )
        return found.total, found.loss

    (value, loss), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays[:2])
    expected = _expected(case, frozen, (weight, kl_weight), None)
    np.testing.assert_allclose(loss, np.sum(weight * expected[0]), rtol=1e-5)
    _assert_close((value, *gradients), (loss + np.sum(kl_weight * expected[1]), *expected[2:]))
