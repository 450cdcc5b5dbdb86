"""Blocked attention against NumPy in float64, and against JAX's own, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from easy_jax.kernels.attention import causal_attention, rotate

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 11, 6, 2, 4
SCALE = 0.7


def _case(length=LENGTH, seed=0):
    """Queries, keys, values and segment ids: contiguous, other ones in every row."""
    rng = np.random.default_rng(seed)

    def normal(heads):
        return rng.normal(size=(BATCH, length, heads, HEAD_DIM)).astype(np.float32)

    starts = rng.random((BATCH, length)) < 3 / length
    segments = np.cumsum(starts, axis=1).astype(np.int32)
    return normal(HEADS), normal(KV_HEADS), normal(KV_HEADS), segments


def _seen(segments, window):
    place = np.arange(segments.shape[1])
    distance = place[:, None] - place[None, :]
    near = (distance >= 0) & (distance < (window or len(place)))
    return near & (segments[:, :, None] == segments[:, None, :])


def _numpy(q, k, v, segments, window=None, cap=None):
    """One query at a time, over the keys it sees and no others, in float64."""
    seen = _seen(segments, window)
    y = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        kv_head = n // (q.shape[2] // k.shape[2])
        keys, values = (np.float64(x[b, seen[b, t], kv_head]) for x in (k, v))
        logits = SCALE * keys @ np.float64(q[b, t, n])
        if cap is not None:
            logits = cap * np.tanh(logits / cap)
        share = np.exp(logits - logits.max())
        y[b, t, n] = share @ values / share.sum()
    return y


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 3, 4, 11, 64, None])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (1, None), (3, 1.5), (5, None), (99, 2)])
def test_values_are_those_of_numpy(window, cap, block):
    case = _case()
    y = causal_attention(*case, scale=SCALE, window=window, cap=cap, block=block)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, _numpy(*case, window, cap), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [300, 1030])  # 128 and 128 and 44 queries; 8 blocks of 129
@pytest.mark.parametrize("window", [None, 140])
def test_default_blocks_and_gradients_are_those_of_dense_attention(length, window):
    q, k, v, segments = _case(length)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    ours = functools.partial(causal_attention, segment_ids_BT=segments, scale=SCALE, window=window)
    dense = functools.partial(
        jax.nn.dot_product_attention, mask=_seen(segments, window)[:, None], scale=SCALE
    )
    actual, expected = (
        jax.jit(lambda *qkv, f=f: (f(*qkv), jax.vjp(f, *qkv)[1](cotangent)))(q, k, v)
        for f in (ours, dense)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_with_a_soft_cap_are_finite_differences():
    q, k, v, segments = _case()

    def attend(q, k, v):
        return causal_attention(q, k, v, segments, scale=SCALE, window=3, cap=1.5, block=4)

    check_grads(attend, (q, k, v), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 50.0])
def test_large_logits_do_not_overflow(cap):
    q, k, v, segments = _case()
    y = causal_attention(100 * q, 100 * k, v, segments, scale=SCALE, cap=cap, block=4)
    np.testing.assert_allclose(y, _numpy(100 * q, 100 * k, v, segments, cap=cap), atol=1e-3)


def _operations(q, k, v, segments, **options):
    """Matrix products and exponentials: name, shape and dtype of what they make."""

    def inner(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "exp"):
                out = eqn.outvars[0].aval
                yield eqn.primitive.name, out.shape, out.dtype.name
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    value = value.jaxpr
                if hasattr(value, "eqns"):
                    yield from inner(value)

    attend = functools.partial(causal_attention, scale=SCALE, **options)
    return list(inner(jax.make_jaxpr(attend)(q, k, v, segments).jaxpr))


@pytest.mark.parametrize(
    ("window", "keys"),
    [(None, [128, 256, 384, 512]), (140, [128, 256, 384, 384]), (129, [128, 256, 256, 256])],
)
def test_only_keys_that_may_be_seen_are_looked_at(window, keys):
    operations = _operations(*_case(length=512), window=window)
    assert [shape[-1] for name, shape, _ in operations if name == "exp"] == keys


@pytest.mark.slow
def test_bfloat16_is_accumulated_in_float32():
    q, k, v, segments = _case(length=150)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    y = causal_attention(q, k, v, segments, scale=SCALE)
    assert y.dtype == jnp.bfloat16
    made = {(name, dtype) for name, _, dtype in _operations(q, k, v, segments)}
    assert made == {("dot_general", "float32"), ("exp", "float32")}
    expected = _numpy(*(np.asarray(x, np.float32) for x in (q, k, v)), segments)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.03)


def test_the_probabilities_are_not_kept_for_the_backward_pass():
    q, k, v, segments = _case(length=1024)

    def kept(attend):
        """Elements of the largest array that the backward pass is handed."""
        backward = jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[1], q, k, v)
        return max(leaf.size for leaf in jax.tree.leaves(backward))

    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    ours = functools.partial(causal_attention, segment_ids_BT=segments, scale=SCALE)
    assert kept(dense) == BATCH * HEADS * 1024**2
    assert kept(ours) <= q.size


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"k_BTKH": np.ones((2, 11, 4, 4), "f"), "v_BTKH": np.ones((2, 11, 4, 4), "f")},
            ValueError,
            "6 heads cannot share 4 key-value heads evenly",
        ),
        ({"v_BTKH": np.ones((2, 10, 2, 4), "f")}, AssertionError, "shape"),
        ({"segment_ids_BT": np.ones((2, 10), int)}, AssertionError, "shape"),
        ({"window": 0}, ValueError, "window is 0; it must be at least 1"),
        ({"block": 0}, ValueError, "block is 0; it must be at least 1"),
    ],
)
def test_shapes_that_do_not_fit(change, error, message):
    names = ("q_BTNH", "k_BTKH", "v_BTKH", "segment_ids_BT")
    with pytest.raises(error, match=message):
        causal_attention(**{**dict(zip(names, _case(), strict=True)), **change}, scale=SCALE)


def test_rotation_turns_pairs_of_halves():
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 4)).astype(np.float32)
    angle = np.array([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]])[None, :, None, :]
    y = rotate(jnp.asarray(x), jnp.cos(angle), jnp.sin(angle))
    turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angle)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)
