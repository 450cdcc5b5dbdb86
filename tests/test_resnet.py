"""BatchNorm against NumPy in float64 and NNX; networks with either block and stem."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easy_jax.config import ConfigError, ResNetConfig
from easy_jax.models import resnet
from easy_jax.models.modes import eval_mode, train_mode
from easy_jax.train import evaluate

FEATURES = 3
MASKS = {"all": [True] * 5, "some": [True, False, True, True, False], "one": [False] * 4 + [True]}


def batch_norm():
    norm = resnet.BatchNorm(FEATURES, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for name in ("scale", "bias", "mean"):
        getattr(norm, name)[...] = jnp.asarray(rng.normal(size=FEATURES), jnp.float32)
    norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=FEATURES), jnp.float32)
    return norm


def images():
    return np.random.default_rng(0).normal(1.0, 2.0, size=(5, 2, 4, FEATURES)).astype(np.float32)


def reference(norm, x_BHWC, mask_B):
    """Output and new running statistics, in float64."""
    x_BHWC = np.asarray(x_BHWC, np.float64)
    x_NC = x_BHWC[mask_B].reshape(-1, FEATURES)
    mean_C, var_C, unbiased_C = x_NC.mean(axis=0), x_NC.var(axis=0), x_NC.var(axis=0, ddof=1)
    scale_C, bias_C = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias))
    y_BHWC = (x_BHWC - mean_C) / np.sqrt(var_C + 1e-5) * scale_C + bias_C
    return y_BHWC, 0.9 * norm.mean[...] + 0.1 * mean_C, 0.9 * norm.var[...] + 0.1 * unbiased_C


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_batch_norm_with_padding(mask):
    norm, x_BHWC, mask_B = batch_norm(), images(), np.array(mask)
    y_BHWC, mean_C, var_C = reference(norm, x_BHWC, mask_B)
    np.testing.assert_allclose(norm(x_BHWC, mask_B)[mask_B], y_BHWC[mask_B], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], mean_C, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var_C, rtol=1e-5)


@pytest.mark.slow
def test_without_padding_a_mask_changes_nothing():
    x_BHWC = images()
    masked, plain, theirs = batch_norm(), batch_norm(), batch_norm()
    y_BHWC = masked(x_BHWC, np.ones(5, bool))
    np.testing.assert_allclose(y_BHWC, plain(x_BHWC), rtol=1e-6, atol=1e-6)
    for name in ("mean", "var"):
        ours, expected = (getattr(norm, name)[...] for norm in (masked, plain))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    expected_BHWC = nnx.BatchNorm.__call__(theirs, x_BHWC)
    np.testing.assert_allclose(y_BHWC, expected_BHWC, rtol=1e-5, atol=1e-6)


def test_a_large_mean_does_not_drown_the_variance():
    norm, x_BHWC = batch_norm(), images() + np.float32(3000.0)
    norm.mean[...] += 3000.0
    y_BHWC, _, var_C = reference(norm, x_BHWC, np.ones(5, bool))
    np.testing.assert_allclose(norm(x_BHWC), y_BHWC, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(norm.var[...], var_C, rtol=1e-3)


def test_running_statistics_normalise_in_eval_mode():
    norm, x_BHWC = batch_norm(), images()
    scale_C, bias_C, mean_C, var_C = (
        np.float64(getattr(norm, name)[...]) for name in ("scale", "bias", "mean", "var")
    )
    y_BHWC = eval_mode(norm)(x_BHWC)
    expected_BHWC = (x_BHWC - mean_C) / np.sqrt(var_C + 1e-5) * scale_C + bias_C
    np.testing.assert_allclose(y_BHWC, expected_BHWC, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.float64(norm.mean[...]), mean_C)


@pytest.mark.slow
def test_padding_alone_has_no_gradient():
    """In a network so deep that values which grow with every layer overflow."""
    config = ResNetConfig(depths=(9,), width=2)
    model = train_mode(resnet.ResNet(config, 5, rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    image_BHWC, mask_B = jnp.ones((2, 4, 4, 1)), jnp.zeros(2, bool)

    def loss(params):
        logits_BK = nnx.merge(graphdef, params, rest, copy=True)(image_BHWC, mask_B)
        return jnp.sum(jnp.where(mask_B, -jax.nn.log_softmax(logits_BK)[:, 0], 0.0))

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_one_value_has_no_variance_to_learn():
    norm = batch_norm()
    mean_C, var_C = np.array(norm.mean[...]), np.array(norm.var[...])
    assert np.isfinite(norm(images()[:1, :1, :1])).all()
    np.testing.assert_array_equal(norm.mean[...], mean_C)
    np.testing.assert_array_equal(norm.var[...], var_C)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradients_of_batch_norm(mask, offset):
    """For images by finite differences in float64; for scale and bias as they are defined."""
    norm, x_BHWC, mask_B = batch_norm(), images() + np.float32(offset), np.array(mask)
    norm.mean[...] += offset
    atol = 1e-3 if offset else 1e-4
    graphdef, state = nnx.split(norm)
    # Random cotangents, 0 on padding: no loss depends on what comes out there.
    cotangent_BHWC = np.random.default_rng(2).normal(size=x_BHWC.shape)
    cotangent_BHWC[~mask_B] = 0

    def objective(state, x_BHWC):
        y_BHWC = nnx.merge(graphdef, state, copy=True)(x_BHWC, mask_B)
        return jnp.sum(y_BHWC * jnp.asarray(cotangent_BHWC, jnp.float32))

    of_state, gradient_BHWC = jax.grad(objective, argnums=(0, 1))(state, x_BHWC)
    y_BHWC, _, _ = reference(norm, x_BHWC, mask_B)
    unit_BHWC = (y_BHWC - np.float64(norm.bias[...])) / np.float64(norm.scale[...])
    for actual, per_value in (
        (of_state["scale"][...], cotangent_BHWC * unit_BHWC),
        (of_state["bias"][...], cotangent_BHWC),
    ):
        np.testing.assert_allclose(actual, per_value.sum(axis=(0, 1, 2)), rtol=1e-3, atol=atol)
    step = 1e-4
    for index in np.ndindex(x_BHWC.shape):
        shifted = []
        for sign in (1, -1):
            moved_BHWC = x_BHWC.astype(np.float64)
            moved_BHWC[index] += sign * step
            y_BHWC, _, _ = reference(norm, moved_BHWC, mask_B)
            shifted.append(np.sum(y_BHWC * cotangent_BHWC))
        expected = (shifted[0] - shifted[1]) / (2 * step)
        np.testing.assert_allclose(gradient_BHWC[index], expected, rtol=1e-3, atol=atol)


def test_statistics_of_padding_alone_are_not_learnt():
    norm, mask_B = batch_norm(), np.zeros(5, bool)
    mean_C, var_C = np.array(norm.mean[...]), np.array(norm.var[...])
    assert np.isfinite(norm(images(), mask_B)).all()
    np.testing.assert_array_equal(norm.mean[...], mean_C)
    np.testing.assert_array_equal(norm.var[...], var_C)


# Networks.


def build(block="bottleneck", stem="imagenet", dtype="float32", classes=4):
    config = ResNetConfig(3, 8, (1, 1), block, stem, dtype=dtype)
    return resnet.ResNet(config, classes, rngs=nnx.Rngs(classes))


@functools.cache
def network(**changes):
    """Random parameters and statistics, and the graph in train mode."""
    model = nnx.eval_shape(lambda: build(**changes))
    rng = np.random.default_rng(4)
    variables = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.shape
        if path[-1] == "kernel":
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            value = rng.uniform(0.5, 1.5, size=shape)
        variables.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.from_flat_state(variables), nnx.graphdef(train_mode(model))


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, image_BHWC, mask_B):
    """Logits, and the state with new statistics."""
    model = nnx.merge(graphdef, state, copy=True)
    return model(image_BHWC, mask_B), nnx.state(model)


def inputs(count=4):
    return np.random.default_rng(3).normal(size=(count, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize(("block", "features"), [("basic", 16), ("bottleneck", 64)])
def test_shapes(block, features, stem):
    model = nnx.eval_shape(lambda: build(block, stem))
    logits_BK = nnx.eval_shape(lambda model, image_BHWC: model(image_BHWC), model, inputs())
    assert logits_BK.shape == (4, 4) and logits_BK.dtype == jnp.float32
    assert model.head.kernel.shape == (features, 4)
    assert model.conv1.kernel.shape[:2] == ((7, 7) if stem == "imagenet" else (3, 3))


@pytest.mark.slow
def test_padding_leaves_logits_and_statistics_alone():
    state, train = network()
    image_BHWC, mask_B = inputs(), np.array([True, False, True, False])
    logits_BK, after = run(train, state, image_BHWC, mask_B)
    image_BHWC[~mask_B] = 1e3
    other_BK, other = run(train, state, image_BHWC, mask_B)
    np.testing.assert_array_equal(logits_BK[mask_B], other_BK[mask_B])
    jax.tree.map(np.testing.assert_array_equal, after, other)
    # Nor do they depend on its being there.
    short_BK, short = run(train, state, image_BHWC[mask_B], mask_B[mask_B])
    np.testing.assert_allclose(logits_BK[mask_B], short_BK, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after, short)
    changed = [
        path
        for (path, a), (_, b) in zip(
            nnx.to_flat_state(state), nnx.to_flat_state(after), strict=True
        )
        if (a[...] != b[...]).any()
    ]
    assert {path[-1] for path in changed} == {"mean", "var"}
    assert len(changed) == 2 * 9  # of every BatchNorm


@pytest.mark.slow
def test_bfloat16_computes_with_parameters_and_batch_norm_in_float32():
    (state, exact), (_, train) = network(), network(dtype="bfloat16")
    image_BHWC, mask_B = inputs(), np.ones(4, bool)
    logits_BK, after = run(train, state, image_BHWC, mask_B)
    expected_BK, expected = run(exact, state, image_BHWC, mask_B)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    assert logits_BK.dtype == jnp.float32
    np.testing.assert_allclose(logits_BK, expected_BK, atol=0.1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02), after, expected
    )
    program = str(jax.make_jaxpr(functools.partial(run, train))(state, image_BHWC, mask_B))
    convolutions = [line for line in program.splitlines() if " conv_general_dilated[" in line]
    assert len(convolutions) == 9
    assert all(re.search(r":bf16\[.* = conv", line) for line in convolutions)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_task_parts_are_swapped_as_a_unit(block):
    body, _ = network(block=block)
    task, _ = network(block=block, classes=6)
    mixed = dict(nnx.to_flat_state(evaluate.with_task_parts(body, task, resnet.is_task_specific)))
    assert mixed.keys() == dict(nnx.to_flat_state(task)).keys()
    body, task = (dict(nnx.to_flat_state(state)) for state in (body, task))
    for path, variable in mixed.items():
        is_convolution = path[-1] == "kernel" and path[0] != "head"
        expected = (body if is_convolution else task)[path]
        np.testing.assert_array_equal(variable[...], expected[...])
    assert mixed["head", "kernel"].shape == task["head", "kernel"].shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "dense"}, r"model.block"),
        ({"stem": "large"}, r"model.stem"),
        ({"dtype": "float16"}, r"model.dtype"),
        ({"depths": (2, 0)}, r"model.depths"),
    ],
)
def test_configurations_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        ResNetConfig(**changes).validate()
