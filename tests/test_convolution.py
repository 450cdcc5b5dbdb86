"""Convolution and maximum over windows: by NumPy, and as XLA has them where it is fast."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import devices_mesh

from easy_jax.core import losses
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.kernels import convolution
from easy_jax.kernels.convolution import convolve, max_pool
from easy_jax.parallel import sharding
from easy_jax.train import forward

CASES = [  # batch, height, width, channels, features, window, stride
    (2, 9, 8, 3, 5, 3, 1),
    (6, 9, 8, 3, 5, 3, 2),
    (2, 8, 9, 3, 5, 7, 2),
    (3, 5, 5, 4, 2, 1, 2),
    (2, 2, 2, 4, 3, 3, 1),
    (2, 4, 4, 4, 3, 3, 2),  # the output is smaller than a window
    (2, 1, 3, 4, 3, 3, 1),
    (2, 1, 1, 4, 3, 7, 1),  # places without any pixel
]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def _arrays(case):
    batch, height, width, channels, features, window, _ = case
    rng = np.random.default_rng(0)
    image_BHWC = rng.normal(size=(batch, height, width, channels))
    kernel = rng.normal(size=(window, window, channels, features))
    return np.float32(image_BHWC), np.float32(kernel)


def _settings(case):
    window, stride = case[-2:]
    return {"strides": (stride, stride), "padding": ((window // 2, window // 2),) * 2}


def _numpy_gradients(image_BHWC, kernel, gradient_BHWC, stride):
    """Output, and the gradients for image and kernel, window by window in float64."""
    window = kernel.shape[0]
    pad = window // 2
    padded = np.pad(np.float64(image_BHWC), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    output = np.zeros(gradient_BHWC.shape)
    padded_gradient, kernel_gradient = np.zeros_like(padded), np.zeros(kernel.shape)
    for row, column in itertools.product(*map(range, gradient_BHWC.shape[1:3])):
        place = (
            slice(None),
            slice(row * stride, row * stride + window),
            slice(column * stride, column * stride + window),
        )
        g_BF = gradient_BHWC[:, row, column]
        output[:, row, column] = np.einsum("bijc,ijcf->bf", padded[place], kernel)
        padded_gradient[place] += np.einsum("bf,ijcf->bijc", g_BF, kernel)
        kernel_gradient += np.einsum("bijc,bf->ijcf", padded[place], g_BF)
    height, width = image_BHWC.shape[1:3]
    image_gradient = padded_gradient[:, pad : pad + height, pad : pad + width]
    return output, image_gradient, kernel_gradient


@pytest.mark.slow
@pytest.mark.parametrize("piece_bytes", [2**20, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolve(case, piece_bytes, monkeypatch):
    monkeypatch.setattr(convolution, "_PIECE_BYTES", piece_bytes)
    image_BHWC, kernel = _arrays(case)
    conv = functools.partial(convolve, **_settings(case), dimension_numbers=LAYOUT)
    shape = jax.eval_shape(conv, image_BHWC, kernel).shape
    gradient_BHWC = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    @jax.jit
    def values(image_BHWC, kernel, gradient_BHWC):
        actual_BHWC, backward = jax.vjp(conv, image_BHWC, kernel)
        return actual_BHWC, *backward(gradient_BHWC)

    actual = values(image_BHWC, kernel, gradient_BHWC)
    expected = _numpy_gradients(image_BHWC, kernel, gradient_BHWC, case[-1])
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"rhs_dilation": (1, 2)}, {"feature_group_count": 2}], ids=str
)
@pytest.mark.parametrize("height", [2, 6])
def test_unequal_strides_and_padding(height, settings, dtype):
    """As XLA has them, in float64."""
    rng = np.random.default_rng(0)
    image_BHWC = rng.normal(size=(2, height, 5, 4))
    kernel = rng.normal(size=(3, 3, 4 // settings.get("feature_group_count", 1), 6))
    settings |= {"padding": ((1, 0), (2, 1)), "dimension_numbers": LAYOUT}
    with jax.enable_x64(True):
        exact = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 1), **settings)
        arrays = [jnp.asarray(jnp.asarray(a, dtype), jnp.float64) for a in (image_BHWC, kernel)]
        y_BHWC, backward = jax.vjp(exact, *arrays)
        cotangent_BHWC = np.float64(jnp.asarray(rng.normal(size=y_BHWC.shape), dtype))
        expected = [np.asarray(a) for a in (y_BHWC, *backward(jnp.asarray(cotangent_BHWC)))]
    ours = functools.partial(convolve, strides=(2, 1), **settings)
    y_BHWC, backward = jax.vjp(ours, jnp.asarray(image_BHWC, dtype), jnp.asarray(kernel, dtype))
    actual = (y_BHWC, *backward(jnp.asarray(cotangent_BHWC, dtype)))
    bound = 1e-5 if dtype == jnp.float32 else 1e-2
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.float64(mine), theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("batch", "piece_bytes", "pieces"),
    [(6, 2**20, 1), (6, 4 * 9 * 8 * 5, 6), (6, 1000, 6), (6, 2000, 6), (6, 4500, 2), (7, 4500, 7)],
)
def test_pieces_are_small_and_equal(batch, piece_bytes, pieces, monkeypatch):
    monkeypatch.setattr(convolution, "_PIECE_BYTES", piece_bytes)
    gradient_BHWC = jax.ShapeDtypeStruct((batch, 9, 8, 5), jnp.float32)
    assert convolution._pieces(gradient_BHWC) == pieces


def test_pieces_do_not_cross_devices(monkeypatch):
    monkeypatch.setattr(convolution, "_PIECE_BYTES", 8 * 4 * 9 * 8 * 5)  # an image per device
    mesh = devices_mesh(8)
    image = jax.ShapeDtypeStruct((32, 9, 8, 3), jnp.float32, sharding=sharding.batch_sharding(mesh))
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
    conv = functools.partial(convolve, **_settings(CASES[0]), dimension_numbers=LAYOUT)

    def gradient(image_BHWC, kernel):
        return jax.grad(lambda kernel: jnp.sum(conv(image_BHWC, kernel) ** 2))(kernel)

    text = jax.jit(gradient).lower(image, kernel).compile().as_text()
    assert text.count(" convolution(") > 3
    assert "all-reduce" in text
    assert not any(f"{kind}(" in text for kind in ("all-gather", "all-to-all", "permute"))


def test_eigen_computes_convolutions_on_cpus(monkeypatch):
    """XLA's default has one core for those with few features; else the option can go."""
    image_BHWC, kernel = jnp.ones((8, 16, 16, 64)), jnp.ones((3, 3, 64, 64))
    conv = functools.partial(convolve, **_settings(CASES[0]), dimension_numbers=LAYOUT)

    def libraries(options):
        text = jax.jit(conv, compiler_options=options).lower(image_BHWC, kernel).compile().as_text()
        assert text.count(" convolution(") == 1
        return text.count("__ynn_fusion")

    assert libraries(None) == 1
    assert libraries(sharding.compiler_options(devices_mesh(1))) == 0
    assert sharding.compiler_options(None) is None
    tpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
    assert sharding.compiler_options(tpu) is None
    monkeypatch.setattr(sharding, "_EIGEN_CONVOLUTIONS", {"xla_no_such_option": "1"})
    sharding._eigen_convolutions.cache_clear()
    try:
        assert sharding.compiler_options(devices_mesh(1)) is None
    finally:
        sharding._eigen_convolutions.cache_clear()


@pytest.mark.slow
def test_steps_are_compiled_with_the_options(monkeypatch):
    monkeypatch.setattr(sharding, "compiler_options", lambda mesh: {"xla_no_such_option": "1"})
    mesh, optimizer = devices_mesh(1), optax.sgd(0.1)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    batch = {
        "x": np.ones((4, 2), np.float32),
        "label": np.zeros(4, np.int32),
        "weight": np.ones(4, np.float32),
        "mask": np.ones(4, bool),
    }

    def loss_fn(model, batch):
        return losses.softmax_cross_entropy(model(batch["x"]), batch["label"])

    train_step = make_train_step(
        nnx.graphdef(model), loss_fn, optimizer, reduction="example_mean", mesh=mesh
    )
    score_step = forward.make_score_step(nnx.graphdef(model), loss_fn, mesh)
    weigh = OnlineWeights(model, loss_fn=loss_fn, tau=1.0, mesh=mesh)
    state = init_train_state(model, optimizer, mesh=mesh)
    for call in (
        lambda: train_step(state, batch),
        lambda: score_step(nnx.state(model), batch),
        lambda: weigh(batch),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 2), (6, 9)], ids=str)
def test_max_pool(size, dtype):
    """Of few values, so that there are equal ones: the first has the gradient."""
    rng = np.random.default_rng(0)
    image_BHWC = rng.integers(-3, 3, size=(2, *size, 3)).astype(np.float32)
    actual_BHWC, backward = jax.vjp(max_pool, jnp.asarray(image_BHWC, dtype))
    assert actual_BHWC.dtype == dtype
    gradient_BHWC = rng.integers(1, 9, size=actual_BHWC.shape).astype(np.float32)
    (actual_gradient,) = backward(jnp.asarray(gradient_BHWC, dtype))
    actual_BHWC = np.float32(actual_BHWC)

    padded = np.pad(image_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    padded_gradient = np.zeros_like(padded)
    assert actual_BHWC.shape[1:3] == tuple(-(-each // 2) for each in size)
    for b, row, column, c in itertools.product(*map(range, actual_BHWC.shape)):
        window = padded[b, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3, c]
        assert actual_BHWC[b, row, column, c] == window.max()
        i, j = np.unravel_index(window.argmax(), window.shape)
        gradient = gradient_BHWC[b, row, column, c]
        padded_gradient[b, 2 * row + i, 2 * column + j, c] += gradient
    expected_gradient = padded_gradient[:, 1 : 1 + size[0], 1 : 1 + size[1]]
    np.testing.assert_array_equal(np.float32(actual_gradient), expected_gradient)


# Output, gradient for the image, and for the kernel: on CPUs the last in six pieces of one image,
# or all by a product for every place in a window.
@pytest.mark.parametrize(("case", "on_cpu"), [(CASES[1], (8, 0)), (CASES[4], (0, 27))], ids=str)
def test_tpus_and_gpus_have_xlas_own(case, on_cpu, monkeypatch):
    monkeypatch.setattr(convolution, "_PIECE_BYTES", 100)
    image_BHWC, kernel = _arrays(case)

    def loss(image_BHWC, kernel):
        y_BHWC = convolve(image_BHWC, kernel, **_settings(case), dimension_numbers=LAYOUT)
        return jnp.sum(max_pool(y_BHWC))

    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(image_BHWC, kernel)
    for platform in ("tpu", "cuda", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("select_and_scatter" in text) == (platform != "cpu")
        assert ("reduce_window" in text) == (platform != "cpu")
        counts = tuple(text.count(f"stablehlo.{op}") for op in ("convolution", "dot_general"))
        assert counts == (on_cpu if platform == "cpu" else (3, 0))
