"""Optimisers, schedules and anchors against NumPy and PyTorch's published update rules."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easy_jax.config import OptimizerConfig
from easy_jax.core import optim
from easy_jax.models import resnet


def _run(config, gradient, x0, steps, anchored=None):
    optimizer = optim.make_optimizer(config, steps, anchored)
    params = {"x": jnp.array(x0, jnp.float32)}
    state = optimizer.init(params)
    path = []
    for _ in range(steps):
        grads = {"x": jnp.array(gradient(np.float64(params["x"])), jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.array(params["x"]))
    return path


def _cosine(step, total, warmup=0):
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))


@pytest.mark.slow
def test_sgd_with_momentum_decay_and_cosine_equals_numpy():
    steps, rate = 12, 0.1
    config = OptimizerConfig(learning_rate=rate, momentum=0.9, weight_decay=5e-4)
    x = np.array([1.0, -2.0])
    velocity = np.zeros(2)
    path = _run(config, lambda x: 3 * x, x, steps)
    for step in range(steps):
        velocity = 0.9 * velocity + 3 * x + 5e-4 * x
        x = x - rate * _cosine(step, steps) * velocity
        np.testing.assert_allclose(path[step], x, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_adamw_equals_numpy():
    steps, rate, b1, b2, eps, decay = 15, 0.05, 0.9, 0.99, 1e-8, 0.1
    config = OptimizerConfig(
        name="adamw",
        learning_rate=rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=decay,
        warmup_ratio=0.2,
    )
    x = np.array([1.0, -2.0])
    m, v = np.zeros(2), np.zeros(2)
    path = _run(config, lambda x: x**3, x, steps)
    for step in range(steps):
        g = x**3
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
        x = x - rate * _cosine(step, steps, warmup=3) * (m_hat / (np.sqrt(v_hat) + eps) + decay * x)
        np.testing.assert_allclose(path[step], x, rtol=2e-5)


def test_constant_schedule_and_clipping():
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", momentum=0.0, clip_norm=1.0)
    path = _run(config, lambda x: np.array([30.0, 40.0]), [0.0, 0.0], 2)
    np.testing.assert_allclose(path, [[-0.3, -0.4], [-0.6, -0.8]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["l1_sp", "l2_sp"])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_anchor_is_the_gradient_of_the_distance(kind, per_parameter):
    rng = np.random.default_rng(0)
    start, now = rng.normal(size=(2, 5))
    strength = 0.7

    def penalty(x):
        distance = np.abs(x - start).sum() if kind == "l1_sp" else ((x - start) ** 2).sum()
        return strength * distance / (5 if per_parameter else 1)

    h = 1e-6
    numeric = [(penalty(now + h * e) - penalty(now - h * e)) / (2 * h) for e in np.eye(5)]
    pull = optim.anchor(kind, strength, per_parameter=per_parameter)
    state = pull.init({"x": jnp.array(start)})
    updates, _ = pull.update({"x": jnp.zeros(5)}, state, {"x": jnp.array(now)})
    np.testing.assert_allclose(updates["x"], numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_anchor_leaves_the_head_alone():
    model = nnx.Dict(
        head=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), body=nnx.Linear(2, 2, rngs=nnx.Rngs(1))
    )
    start = nnx.state(model)
    pull = optim.anchor("l2_sp", 1.0, anchored=resnet.is_backbone)
    moved = jax.tree.map(lambda x: x + 1.0, start)
    zeros = jax.tree.map(jnp.zeros_like, start)
    updates, _ = pull.update(zeros, pull.init(start), moved)
    assert (np.asarray(updates["head"]["kernel"][...]) == 0).all()
    np.testing.assert_allclose(updates["body"]["kernel"][...], 2.0, rtol=1e-6)


def test_anchor_needs_the_parameters():
    pull = optim.anchor("l2_sp", 1.0)
    with pytest.raises(ValueError, match="anchor needs the parameters"):
        pull.update({"x": jnp.zeros(1)}, pull.init({"x": jnp.zeros(1)}))


@pytest.mark.slow
def test_updates_that_bfloat16_rounds_away_are_told():
    """The share is that of the values whose half of a last digit is above the learning rate."""
    values = np.random.default_rng(0).normal(scale=0.02, size=10_000).astype(np.float32)
    params = {"w": jnp.asarray(values, jnp.bfloat16), "scale": jnp.ones(100)}
    rounded = np.asarray(params["w"], np.float32)
    half = 2.0 ** (np.floor(np.log2(np.abs(rounded))) - 8)
    share = (half > 1e-5).sum() / 10_100
    assert 0.8 < share < 0.9
    with pytest.warns(
        optim.LostUpdatesWarning,
        match=rf"{share:.0%} of the parameters .*\(bfloat16\).* rate, 1e-05: .*param_dtype",
    ):
        optim.warn_of_lost_updates(params, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.warn_of_lost_updates(params, 1e-3)
        optim.warn_of_lost_updates(params, 0.0)
        optim.warn_of_lost_updates(jax.tree.map(lambda x: x.astype(jnp.float32), params), 1e-9)
