"""Attention on NVIDIA GPUs: what is asked of cuDNN's kernel, computed by XLA; and when it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easy_jax.kernels import cudnn, splash
from easy_jax.kernels.attention import causal_attention
from easy_jax.parallel import chip, sharding

SCALE = 0.2


def _case(dtype, length=96, head_dim=32):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, head_dim)), dtype) for n in (4, 2, 2))
    return q, k, v, np.cumsum(rng.random((2, length)) < 3 / length, axis=1).astype(np.int32)


def _mesh(platform, kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES, auto, abstract_device=device)


@pytest.fixture
def by_xla(monkeypatch):
    """JAX's own attention in the kernel's place; a list of the implementations asked for."""
    asked = []
    attention = jax.nn.dot_product_attention

    def replaced(*arrays, implementation, **options):
        asked.append(implementation)
        return attention(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", replaced)
    return asked


def test_segments_are_those_of_the_reference(by_xla):
    q, k, v, segments = _case(jnp.float32)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    options = {"segment_ids_BT": segments, "scale": SCALE}
    actual, expected = (
        jax.jit(lambda *qkv, f=f: (f(*qkv), jax.vjp(f, *qkv)[1](cotangent)))(q, k, v)
        for f in (
            functools.partial(cudnn.attention, **options),
            functools.partial(causal_attention, **options),
        )
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    assert set(by_xla) == {"cudnn"}


@pytest.mark.parametrize(
    ("platform", "kind", "change", "used"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", {}, True),
        ("gpu", "AMD Instinct MI300X", {}, False),
        ("cpu", "cpu", {}, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {"dtype": jnp.float32}, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {"length": 95}, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {"head_dim": 160}, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {"head_dim": 36}, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {"cap": 5.0}, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {"window": 7}, False),
    ],
)
def test_the_kernel_is_used_where_it_can_be(by_xla, platform, kind, change, used):
    sizes = {"dtype": jnp.bfloat16, **change}
    options = {name: sizes.pop(name, None) for name in ("window", "cap")}
    case = _case(**sizes)

    def attend(*case):
        with jax.sharding.use_abstract_mesh(_mesh(platform, kind)):
            return splash.attend(*case, scale=SCALE, **options)

    jax.make_jaxpr(attend)(*case)
    assert by_xla == ["cudnn"] * used


def test_without_a_mesh_it_is_the_default_device_that_counts():
    assert not chip.is_gpu()
    with jax.default_device(jax.devices()[1]):
        assert not chip.is_nvidia()
    with jax.default_device("cpu"):
        assert not chip.is_nvidia()
