"""Convolution and max pooling whose gradients are fast on CPUs.

On TPUs and GPUs both are XLA's own, gradients included. For some shapes XLA's CPU backend has
only slow programs; this module has faster ones. `benchmarks/image_step.py` times ResNet-18.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Padding = Sequence[tuple[int, int]]

# Bytes of the output's gradient in one product for the kernel's gradient; they fit into a cache.
_PIECE_BYTES = 2**20


def convolve(
    x_BHWC: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding, **settings: Any
) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated` for square kernels; a replacement within `nnx.Conv`.

    Where windows are larger than images, a CPU computes one product for every position in a window.
    XLA would swap the roles of image and kernel, for which its CPU backend has no fast program. The
    gradient for the image is a convolution of the output's gradient, so the size of the output
    matters as well.

    Args:
      x_BHWC: images.
      kernel: [size, size, channels, features].
      strides, padding: strides and padding of height and width.
      settings: the other arguments, as `nnx.Conv` passes them.
    """
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **settings
    )
    sizes = [
        (size + sum(pad) - kernel.shape[0]) // stride + 1
        for size, pad, stride in zip(x_BHWC.shape[1:3], padding, strides, strict=True)
    ]
    dilations = (*(settings.get("lhs_dilation") or ()), *(settings.get("rhs_dilation") or ()))
    is_plain = settings.get("feature_group_count", 1) == 1 and set(dilations) <= {1}
    if not is_plain or kernel.shape[0] <= min(*x_BHWC.shape[1:3], *sizes):
        return _convolve(conv, None, x_BHWC, kernel)

    def by_place(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
        # Sum over positions in float32, here and in the gradients.
        wide = (x_BHWC.astype(jnp.float32), kernel.astype(jnp.float32))
        y_BHWF = _by_place(*wide, strides, padding, sizes)
        return y_BHWF.astype(x_BHWC.dtype)

    return _convolve(conv, by_place, x_BHWC, kernel)


_Conv = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(
    conv: _Conv, by_place: _Conv | None, x_BHWC: jax.Array, kernel: jax.Array
) -> jax.Array:
    if by_place is None:
        return conv(x_BHWC, kernel)
    y_BHWC: jax.Array = jax.lax.platform_dependent(x_BHWC, kernel, cpu=by_place, default=conv)
    return y_BHWC


def _convolve_forward(
    conv: _Conv, by_place: _Conv | None, x_BHWC: jax.Array, kernel: jax.Array
) -> tuple[Any, Any]:
    return _convolve(conv, by_place, x_BHWC, kernel), (x_BHWC, kernel)


def _convolve_backward(
    conv: _Conv, by_place: _Conv | None, residuals: Any, gradient_BHWC: jax.Array
) -> Any:
    if by_place is None:
        cpu = functools.partial(_gradients_in_pieces, conv)
    else:
        cpu = functools.partial(_gradients, by_place)
    default = functools.partial(_gradients, conv)
    return jax.lax.platform_dependent(*residuals, gradient_BHWC, cpu=cpu, default=default)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _gradients(
    conv: _Conv, x_BHWC: jax.Array, kernel: jax.Array, gradient_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_gradient_BHWC, kernel_gradient = jax.vjp(conv, x_BHWC, kernel)[1](gradient_BHWC)
    return x_gradient_BHWC, kernel_gradient


def _gradients_in_pieces(
    conv: _Conv, x_BHWC: jax.Array, kernel: jax.Array, gradient_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the kernel's gradient in pieces, which is faster if there are few features."""
    (x_gradient_BHWC,) = jax.vjp(lambda x: conv(x, kernel), x_BHWC)[1](gradient_BHWC)
    pieces = _pieces(gradient_BHWC)

    def split(a_BHWC: jax.Array) -> jax.Array:
        # A piece takes every `pieces`-th image, so that images stay on their devices.
        return a_BHWC.reshape(-1, pieces, *a_BHWC.shape[1:])

    x, gradient = split(x_BHWC), split(gradient_BHWC)

    def part(piece: int) -> jax.Array:
        backward = jax.vjp(lambda kernel: conv(x[:, piece], kernel), kernel)[1]
        return backward(gradient[:, piece])[0]

    # Unrolled, because XLA compiles slower code for the same products in a loop.
    return x_gradient_BHWC, functools.reduce(jnp.add, [part(piece) for piece in range(pieces)])


def _pieces(gradient_BHWC: jax.Array) -> int:
    """Returns the number of equal pieces that a batch is split into."""
    batch = gradient_BHWC.shape[0]
    least = min(batch, -(-gradient_BHWC.size * gradient_BHWC.dtype.itemsize // _PIECE_BYTES))
    return next(pieces for pieces in range(max(1, least), batch + 1) if batch % pieces == 0)


def _by_place(
    x_BHWC: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    sizes: Sequence[int],
) -> jax.Array:
    """Multiplies pixels only, never padding; for images of 2x2 that is less than half of all."""

    def reach(axis: int, place: int) -> tuple[slice, tuple[int, int]]:
        """Returns the pixels at this position of windows, and how many windows have none there."""
        size, stride, (pad, _) = x_BHWC.shape[1 + axis], strides[axis], padding[axis]
        first = min(max(0, -(-(pad - place) // stride)), sizes[axis])
        end = max(first, min(sizes[axis], (size - 1 + pad - place) // stride + 1))
        start = first * stride + place - pad
        return slice(start, start + (end - first) * stride, stride), (first, sizes[axis] - end)

    y_BHWF = jnp.zeros((x_BHWC.shape[0], *sizes, kernel.shape[-1]), x_BHWC.dtype)
    for place in np.ndindex(kernel.shape[:2]):
        (rows, above_below), (columns, sides) = map(reach, range(2), place)
        part_BHWF = x_BHWC[:, rows, columns] @ kernel[place]
        y_BHWF += jnp.pad(part_BHWF, ((0, 0), above_below, sides, (0, 0)))
    return y_BHWF


# Max pooling.

_SIZE, _STRIDE = 3, 2
_NONE = float(_SIZE**2)  # not a position in a window


@jax.custom_vjp
def max_pool(x_BHWC: jax.Array) -> jax.Array:
    """Computes the maximum over windows of 3x3 with stride 2, padded by one -inf on every side.

    As in PyTorch, the gradient goes to the first of equal maxima.

    Args:
      x_BHWC: images.

    Returns:
      Images of half the height and width, rounded up.

    Example:
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """

    def of_places(x_BHWC: jax.Array) -> jax.Array:
        return functools.reduce(jnp.maximum, _places(x_BHWC, -jnp.inf))

    y_BHWC: jax.Array = jax.lax.platform_dependent(x_BHWC, cpu=of_places, default=_max_pool)
    return y_BHWC


def _max_pool(x_BHWC: jax.Array) -> jax.Array:
    return nnx.max_pool(x_BHWC, (_SIZE,) * 2, strides=(_STRIDE,) * 2, padding=((1, 1),) * 2)


def _max_pool_forward(x_BHWC: jax.Array) -> tuple[Any, Any]:
    y_BHWC = max_pool(x_BHWC)
    return y_BHWC, (x_BHWC, y_BHWC)


def _max_pool_backward(residuals: Any, gradient_BHWC: jax.Array) -> tuple[jax.Array]:
    def by_xla(x_BHWC: jax.Array, y_BHWC: jax.Array, gradient_BHWC: jax.Array) -> jax.Array:
        del y_BHWC
        (x_gradient_BHWC,) = jax.vjp(_max_pool, x_BHWC)[1](gradient_BHWC)
        return x_gradient_BHWC

    return (
        jax.lax.platform_dependent(
            *residuals, gradient_BHWC, cpu=_max_pool_gradient, default=by_xla
        ),
    )


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _places(x_BHWC: jax.Array, fill: float) -> list[jax.Array]:
    """Yields, for every position in a window, row by row, the values of all windows there."""
    batch, height, width, channels = x_BHWC.shape
    odd = (height % _STRIDE, width % _STRIDE)
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), constant_values=fill)
    rows, columns = (size // _STRIDE for size in x_BHWC.shape[1:3])
    pairs = x_BHWC.reshape(batch, rows, _STRIDE, columns, _STRIDE, channels)

    def at(row: int, column: int) -> jax.Array:
        # A window covers both pixels of its own pair and the second one of the pair before.
        before = [(int(place == 0), 0) for place in (row, column)]
        part_BHWC = pairs[:, : rows - before[0][0], (row + 1) % _STRIDE]
        part_BHWC = part_BHWC[:, :, : columns - before[1][0], (column + 1) % _STRIDE]
        return jnp.pad(part_BHWC, ((0, 0), *before, (0, 0)), constant_values=fill)

    return [at(row, column) for row in range(_SIZE) for column in range(_SIZE)]


def _max_pool_gradient(x_BHWC: jax.Array, y_BHWC: jax.Array, gradient_BHWC: jax.Array) -> jax.Array:
    """Computes the gradient from the positions of the maxima, which are found only once."""
    first_BHWC = jnp.full(y_BHWC.shape, _NONE**2, jnp.float32)
    # NaN equals nothing. With -inf, XLA would share these arrays with the forward pass, in memory.
    for place, value_BHWC in reversed(list(enumerate(_places(x_BHWC, jnp.nan)))):
        first_BHWC = jnp.where(value_BHWC == y_BHWC, float(place**2), first_BHWC)
    # XLA considers a root expensive, and so does not recompute the position for every pixel.
    first_BHWC = jnp.sqrt(first_BHWC)

    def of_window(after: tuple[int, ...]) -> jax.Array:
        is_first = _for_pixels(first_BHWC, after, _NONE) == _places_of_pixels(after)
        return jnp.where(is_first, _for_pixels(gradient_BHWC, after, 0.0), 0.0)

    windows = [of_window(after) for after in np.ndindex(_STRIDE, _STRIDE)]
    x_gradient = functools.reduce(jnp.add, windows)  # [B, rows, 2, columns, 2, C]
    batch, height, width, channels = x_BHWC.shape
    rows, columns = y_BHWC.shape[1:3]
    x_gradient = x_gradient.reshape(batch, _STRIDE * rows, _STRIDE * columns, channels)
    return x_gradient[:, :height, :width].astype(x_BHWC.dtype)


def _for_pixels(a_BHWC: jax.Array, after: tuple[int, ...], fill: float) -> jax.Array:
    """Returns values of windows for pairs of pixels, [B, rows, 1, columns, 1, C]."""
    down, right = after
    edges = ((0, 0), (0, down), (0, right), (0, 0))
    a_BHWC = jnp.pad(a_BHWC[:, down:, right:], edges, constant_values=fill)
    return a_BHWC[:, :, None, :, None]


def _places_of_pixels(after: tuple[int, ...]) -> np.ndarray:
    """Returns the positions of a pair's pixels in a window; above `_NONE` if outside."""
    place = np.full((1, 1, _STRIDE, 1, _STRIDE, 1), _NONE + 1, np.float32)
    for pixel in np.ndindex(_STRIDE, _STRIDE):
        row, column = (1 + p - _STRIDE * a for p, a in zip(pixel, after, strict=True))
        if row >= 0 and column >= 0:
            place[0, 0, pixel[0], 0, pixel[1], 0] = _SIZE * row + column
    return place
