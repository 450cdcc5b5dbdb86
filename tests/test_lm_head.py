"""The blocked cross-entropy against NumPy in float64, its masks, shardings and memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from easy_jax.config import MeshConfig
from easy_jax.kernels.linear_cross_entropy import NO_TARGET, linear_cross_entropy
from easy_jax.parallel import chip, sharding

FEATURES = 6
# Vocabulary, block and positions of a chunk.
SIZES = (
    (24, 8, 3),  # the block divides
    (30, 8, 3),  # a smaller divisor is near
    (46, 16, 3),  # no divisor is near: padded
    (23, 2048, 3),  # one block
    (23, 8, 1),
    (23, 8, 3),
    (23, 8, 2048),  # prime
)


def _case(shape, vocab, seed=0, scale=1.0, features=FEATURES):
    """Hidden states, head, targets (a third of them missing) and cotangents."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, vocab, shape)
    targets[rng.random(shape) < 0.35] = NO_TARGET
    return (
        (scale * rng.normal(size=(*shape, features))).astype(np.float32),
        rng.normal(size=(vocab, features)).astype(np.float32),
        targets.astype(np.int32),
        rng.normal(size=shape).astype(np.float32),
    )


def _numpy(hidden, head, targets, cotangent, cap=None):
    """Losses, and the gradients of sum(cotangent * loss), written out in float64."""
    hidden, head, cotangent = np.float64(hidden), np.float64(head), np.float64(cotangent)
    logits = np.einsum("...d,vd->...v", hidden, head)
    slope = np.ones_like(logits)
    if cap is not None:
        slope = 1.0 / np.cosh(logits / cap) ** 2
        logits = cap * np.tanh(logits / cap)
    top = logits.max(-1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    there = targets != NO_TARGET
    chosen = np.take_along_axis(logits, np.where(there, targets, 0)[..., None], -1)
    nll = np.where(there, (lse - chosen)[..., 0], 0.0)
    one_hot = np.arange(head.shape[0]) == targets[..., None]
    bar = (np.exp(logits - lse) - one_hot) * np.where(there, cotangent, 0.0)[..., None] * slope
    head_bar = np.einsum(
        "nv,nd->vd", bar.reshape(-1, head.shape[0]), hidden.reshape(-1, hidden.shape[-1])
    )
    return nll, np.einsum("...v,vd->...d", bar, head), head_bar


@functools.partial(jax.jit, static_argnames=("cap", "block", "chunk"))
def _jax(hidden, head, targets, cotangent, cap=None, block=8, chunk=2048):
    """Losses, and the gradients of sum(cotangent * loss)."""

    def loss(hidden, head):
        return linear_cross_entropy(
            hidden, head, targets, soft_cap=cap, vocab_block=block, token_chunk=chunk
        )

    nll, vjp = jax.vjp(loss, hidden, head)
    return nll, *vjp(cotangent)


def _assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.float64(a), b, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "block", "chunk"), SIZES)
@pytest.mark.parametrize(("shape", "cap"), [((7,), 1.5), ((3, 7), None), ((3, 7), 1.5)])
def test_values_and_gradients_are_those_of_numpy(shape, cap, vocab, block, chunk):
    case = _case(shape, vocab)
    actual = _jax(*case, cap=cap, block=block, chunk=chunk)
    assert actual[0].dtype == jnp.float32
    _assert_close(actual, _numpy(*case, cap=cap))


@pytest.mark.slow
def test_rows_without_any_target():
    hidden, head, targets, cotangent = _case((4, 7), 23)
    targets[[0, 2]] = NO_TARGET
    actual = _jax(hidden, head, targets, cotangent, chunk=6)
    _assert_close(actual, _numpy(hidden, head, targets, cotangent))
    assert not np.any(actual[0][np.array([0, 2])])
    assert not np.any(actual[1][np.array([0, 2])])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_no_target_at_all_gives_zeros(shape):
    hidden, head, targets, cotangent = _case(shape, 23)
    for result in _jax(hidden, head, np.full_like(targets, NO_TARGET), cotangent):
        assert not np.any(result)  # NaN counts as true


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 2048])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e4])
def test_what_lies_at_positions_without_target_does_not_matter(poison, chunk, cap):
    """Neither the hidden states there, nor the cotangents, nor how large the logits are."""
    hidden, head, targets, cotangent = _case((4, 7), 23, seed=1)
    targets[0] = NO_TARGET  # and rows of different lengths: chunks are mixed
    expected = _numpy(hidden, head, targets, cotangent, cap=cap)
    hidden[targets == NO_TARGET] = poison
    cotangent[targets == NO_TARGET] = poison
    _assert_close(_jax(hidden, head, targets, cotangent, cap=cap, chunk=chunk), expected)


@pytest.mark.parametrize("bad", [23, 24, -2, 2**31 - 1])  # 24: a row of the head's padding
def test_a_target_out_of_range_is_nan_for_that_token_only(bad):
    hidden, head, targets, cotangent = _case((3, 7), 23)
    expected = _numpy(hidden, head, targets, cotangent)[0]
    targets[1, 2] = bad
    expected[1, 2] = np.nan
    nll = _jax(hidden, head, targets, cotangent)[0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, head, targets, cotangent = _case((3, 7), 23, scale=1e4)
    expected = _numpy(hidden, head, targets, cotangent)
    assert expected[0].max() > 1e4
    for a, b in zip(_jax(hidden, head, targets, cotangent), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * np.abs(b).max())


def test_a_loss_is_never_negative():
    hidden, head, targets, cotangent = _case((64,), 23, scale=30.0)
    targets = np.argmax(hidden @ head.T, axis=-1).astype(np.int32)
    assert np.all(_jax(hidden, head, targets, cotangent)[0] >= 0)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 1.5])
def test_bfloat16_accumulates_in_float32(cap):
    hidden, head, targets, cotangent = _case((3, 40), 46, features=64)
    hidden, head = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, head / 8))
    actual = _jax(hidden, head, targets, cotangent, cap=cap, block=16, chunk=12)
    expected = _numpy(hidden, head, targets, cotangent, cap=cap)
    assert [x.dtype for x in actual] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    _assert_close(actual[:1], expected[:1])
    # Rounding to 8 bits of each term and of the result; sums are in float32.
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert np.abs(np.float64(a) - b).max() < 2**-7 * np.abs(b).max()


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    hidden, head, targets, cotangent = _case((2, 3), 7)

    @jax.jit
    def loss(hidden, head):
        options = {"soft_cap": 2.0, "vocab_block": 3, "token_chunk": 4}
        return jnp.sum(cotangent * linear_cross_entropy(hidden, head, targets, **options))

    check_grads(loss, (hidden, head), order=1, modes=["rev"], eps=1e-2, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (5, 4), (2,)),  # positions
        ((3, 4), (5, 3), (3,)),  # features
        ((2, 3, 4), (5, 4), (3, 2)),  # rows and positions exchanged
        ((6, 4), (5, 4), (2, 3)),  # flattened on one side
    ],
)
def test_shapes_must_agree(shapes):
    hidden, head, targets = shapes
    with pytest.raises(ValueError, match=r"must be \[\*N, D\], \[\*N\] and \[V, D\]"):
        linear_cross_entropy(jnp.zeros(hidden), jnp.zeros(head), jnp.zeros(targets, jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab", "head_spec"),
    [
        (32, PartitionSpec("tensor", None)),
        (46, PartitionSpec("tensor", None)),  # padded
        (32, PartitionSpec(None, "fsdp")),
        (32, PartitionSpec("tensor", "fsdp")),  # as the transformer's embedding
    ],
)
@pytest.mark.parametrize("batch_spec", [PartitionSpec("data"), PartitionSpec(("data", "fsdp"))])
def test_sharded_as_on_one_device(batch_spec, vocab, head_spec):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    hidden, head, targets, cotangent = case = _case((8, 9), vocab)
    rows, columns = NamedSharding(mesh, batch_spec), NamedSharding(mesh, head_spec)
    hidden, targets, cotangent = jax.device_put((hidden, targets, cotangent), rows)
    head = jax.device_put(head, columns)
    options = {"cap": 1.5, "block": 16, "chunk": 24}
    actual = _jax(hidden, head, targets, cotangent, **options)
    _assert_close(actual, map(np.asarray, _jax(*case, **options)))
    _assert_close(actual, _numpy(*case, cap=1.5))


def _plain_loss(hidden, head, targets):
    logits = hidden @ head.T
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def _blocked_loss(hidden, head, targets):
    return jnp.sum(linear_cross_entropy(hidden, head, targets))


def _gradient(loss):
    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(256,), (4, 64)])
def test_less_memory_than_the_logits(shape):
    vocab, features = 65_536, 16
    arrays = (
        jax.ShapeDtypeStruct((*shape, features), jnp.float32),
        jax.ShapeDtypeStruct((vocab, features), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
    )

    def temporary(loss):
        compiled = jax.jit(_gradient(loss)).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = temporary(_plain_loss)
    assert plain >= math.prod(shape) * vocab * 4
    assert temporary(_blocked_loss) < plain / 4


def _largest_array(jaxpr):
    """The number of elements of the largest array made anywhere inside."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(variable.aval.shape) for variable in equation.outvars]
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            leaf = getattr(leaf, "jaxpr", leaf)
            if hasattr(leaf, "eqns"):
                sizes.append(_largest_array(leaf))
    return max(sizes)


def test_no_array_has_all_logits():
    tokens, vocab = 128, 16_384
    arrays = (jnp.zeros((tokens, 8)), jnp.zeros((vocab, 8)), jnp.zeros(tokens, jnp.int32))
    plain, blocked = (
        _largest_array(jax.make_jaxpr(_gradient(loss))(*arrays).jaxpr)
        for loss in (_plain_loss, _blocked_loss)
    )
    assert plain >= tokens * vocab  # the walk does find them
    assert blocked <= tokens * 2048


@pytest.mark.slow
def test_sizes_on_gpus_give_the_same(monkeypatch):
    case = _case((2, 40), 30)
    expected = _numpy(*case)
    monkeypatch.setattr(chip, "is_gpu", lambda: True)
    actual = jax.vjp(lambda *x: linear_cross_entropy(*x, case[2]), *case[:2])
    gradients = actual[1](jnp.asarray(case[3]))
    for a, b in zip((actual[0], *gradients), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
