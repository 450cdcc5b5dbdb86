"""The TPU's attention kernel, interpreted on the CPU, against the XLA form; and when it is used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easy_jax.kernels import splash
from easy_jax.kernels.attention import causal_attention
from easy_jax.parallel import sharding

SCALE = 0.1


def _case(length=256, heads=4, kv_heads=2, head_dim=128):
    rng = np.random.default_rng(0)

    def normal(heads):
        return rng.normal(size=(2, length, heads, head_dim)).astype(np.float32)

    starts = rng.random((2, length)) < 3 / length
    return normal(heads), normal(kv_heads), normal(kv_heads), np.cumsum(starts, 1, dtype=np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "cap"), [(None, None), (None, 5.0), (100, 5.0), (999, None)])
def test_values_and_gradients_are_those_of_the_reference(window, cap):
    q, k, v, segments = _case()
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    options = {"segment_ids_BT": segments, "scale": SCALE, "window": window, "cap": cap}
    kernel = functools.partial(splash.splash_attention, interpret=True, **options)
    reference = functools.partial(causal_attention, **options)
    actual, expected = (
        jax.jit(lambda *qkv, f=f: (f(*qkv), jax.vjp(f, *qkv)[1](cotangent)))(q, k, v)
        for f in (kernel, reference)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("length", "head_dim", "fits"), [(256, 128, True), (256, 64, False), (250, 128, False)]
)
def test_the_kernel_takes_whole_blocks_only(length, head_dim, fits):
    assert splash.fits(jnp.zeros((1, length, 1, head_dim))) == fits


def _tpu_mesh(count):
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.sharding.AbstractMesh((1, count, 1), sharding.AXES, auto, abstract_device=device)


def _primitives(mesh):
    def attend(q, k, v, segments):
        with jax.sharding.use_abstract_mesh(mesh):
            return splash.attend(q, k, v, segments, scale=SCALE)

    return str(jax.make_jaxpr(attend)(*_case()))


def test_only_tpus_get_the_kernel():
    assert "pallas_call" in _primitives(_tpu_mesh(2))
    assert "pallas_call" not in _primitives(sharding.make_mesh().abstract_mesh)
