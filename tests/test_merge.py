"""Weight averaging against NumPy."""

import dataclasses
import itertools

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
from easy_jax.core import merge
from easy_jax.parallel.processes import Stopped


def _tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {"a": jnp.array(rng.normal(size=(3, 2)), dtype), "n": jnp.array(seed)}


def test_interpolation_equals_numpy():
    start, end = _tree(1), _tree(2)
    for alpha in (0.1, 0.5, 0.9):
        result = merge.interpolate(start, end, alpha)
        expected = (1 - alpha) * np.float64(start["a"]) + alpha * np.float64(end["a"])
        np.testing.assert_allclose(result["a"], expected, rtol=1e-6)
        assert int(result["n"]) == 2  # integers are not averaged


def test_ends_are_exact():
    start, end = _tree(1), _tree(2)
    np.testing.assert_array_equal(merge.wise_ft(start, end, 0.0)["a"], start["a"])
    np.testing.assert_array_equal(merge.wise_ft(start, end, 1.0)["a"], end["a"])


def test_bfloat16_is_averaged_in_float32_and_cast_back():
    start, end = _tree(1, jnp.bfloat16), _tree(2, jnp.bfloat16)
    result = merge.interpolate(start, end, 0.3)["a"]
    expected = 0.7 * np.float32(start["a"]) + np.float32(0.3) * np.float32(end["a"])
    np.testing.assert_array_equal(result, jnp.array(expected).astype(jnp.bfloat16))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; it must be between 0 and 1"):
        merge.interpolate(_tree(1), _tree(2), alpha)


def test_trees_must_agree():
    with pytest.raises(AssertionError):
        merge.interpolate({"a": jnp.ones(2)}, {"a": jnp.ones(3)}, 0.5)


@pytest.mark.parametrize("total", [4, 10, 195, 1000])
def test_sfa_averages_every_quarter_and_at_the_end(total):
    steps = merge.sfa_steps(total)
    assert len(steps) == 4 and steps[-1] == total
    np.testing.assert_allclose(np.diff([0, *steps]), total / 4, atol=1.0)


# LiNeS and EMA.


def _states(model):
    """A model's state and a random one near it."""
    start = nnx.state(model)
    flat = nnx.to_flat_state(start)
    rng = np.random.default_rng(0)
    moved = [
        (path, leaf.replace(leaf[...] + rng.normal(size=leaf.shape).astype(np.float32)))
        for path, leaf in flat
    ]
    return start, nnx.from_flat_state(moved)


def _shares(start, end, merged):
    """By path: how much of every entry's change is left."""
    flat = zip(*map(nnx.to_flat_state, (start, end, merged)), strict=True)
    return {
        path: (np.float64(c[...]) - a[...]) / (np.float64(b[...]) - a[...])
        for (path, a), (_, b), (_, c) in flat
    }


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_lines_scales_the_change_of_a_transformer_by_layer(alpha):
    config = dataclasses.replace(packed.CONFIGS["gemma2"], layers=6)
    start, end = _states(ej.Transformer(config, rngs=nnx.Rngs(0)))
    shares = _shares(start, end, merge.lines(start, end, alpha))
    for path, share in shares.items():
        if path[0] == "blocks":  # layer 2 g + k is at place k of group g
            for group in range(3):
                expected = alpha + (1 - alpha) * (2 * group + path[1]) / 5
                np.testing.assert_allclose(share[group], expected, atol=2e-3)
        else:
            np.testing.assert_allclose(share, 1.0 if "norm" in path[0] else alpha, atol=2e-3)
    assert sum(path[0] == "blocks" for path in shares) > 10


def test_lines_scales_the_change_of_a_resnet_by_block():
    config = ej.ResNetConfig(in_channels=1, width=4, depths=(1, 2))
    start, end = _states(ej.ResNet(config, 3, rngs=nnx.Rngs(0)))
    shares = _shares(start, end, merge.lines(start, end, 0.2))
    expected = {"conv1": 0.2, "bn1": 0.2, "head": 1.0, 0: 0.2, 1: 0.6, 2: 1.0}
    for path, share in shares.items():
        name = path[1] if path[0] == "blocks" else path[0]
        np.testing.assert_allclose(share, expected[name], atol=2e-3)


def test_lines_needs_layers():
    state = nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="this model has no layers in `blocks`"):
        merge.lines(state, state)


def test_the_moving_average_is_that_of_numpy():
    optimizer = optax.chain(optax.sgd(0.5, momentum=0.9), merge.ema(0.8))
    params = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    expected = np.float64(params["w"])
    for step in range(5):
        updates, state = optimizer.update({"w": params["w"] + step}, state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.8 * expected + 0.2 * np.float64(params["w"])
    np.testing.assert_allclose(merge.average_of(state)["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay is .*; it must be at least 0 and below 1"):
        merge.ema(decay)


@pytest.mark.slow
def test_a_stage_returns_the_moving_average_and_continues_with_it(tmp_path):
    source = ej.ArraySource({"x": np.ones((12, 1), "f"), "y": 3 * np.ones((12, 1), "f")})
    optimizer = ej.OptimizerConfig(
        learning_rate=0.1, schedule="constant", momentum=0.0, ema_decay=0.5
    )
    stage = ej.StageConfig(epochs=2, batch_size=4, optimizer=optimizer)
    left = itertools.count(1)

    def stop(steps):
        del steps
        if next(left) == 4:
            raise Stopped("")

    def run(where, **options):
        return ej.fit(
            nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0)),
            source,
            tmp_path / where,
            stage=stage,
            loss_fn=lambda model, batch: ej.squared_error(model(batch["x"]), batch["y"]),
            mesh=devices_mesh(1),
            save_every_steps=2,
            **options,
        )

    done = run("whole")
    kernel = average = float(nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0)).kernel[0, 0])
    for _ in range(6):
        kernel -= 0.1 * 2 * (kernel - 3)
        average = 0.5 * average + 0.5 * kernel
    np.testing.assert_allclose(jax.tree.leaves(done.model_state)[0], average, rtol=1e-5)
    with pytest.raises(Stopped):
        run("parts", progress=stop)
    parts = run("parts")
    assert parts.resumed_from == 2
    chex.assert_trees_all_equal(parts.model_state, done.model_state)
