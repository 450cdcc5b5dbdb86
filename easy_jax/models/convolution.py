"""Convolution and maximum over windows, with gradients that a CPU is fast at.

Both are XLA's own operations, and on TPUs and GPUs their gradients are, too. For some shapes XLA's
CPU backend has slow programs only: ResNet-18 trains eight times as fast with these on batches of
64 images of 64x64, on two cores.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Padding = Sequence[tuple[int, int]]

# Of the output's gradient, that go into one product for a kernel's: what stays in a cache.
_PIECE_BYTES = 2**20


def convolve(
    x_BHWC: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding, **settings: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for square kernels; `nnx.Conv` takes it in its place.

    Where windows are larger than images, a product of patches: XLA would take such an image for
    the window and the kernel for the image, for which its CPU backend has no fast program (70
    times slower at 2x2 and 512 channels). The gradient for the image is a convolution of the
    output's, so the output's size counts as well.

    Args:
      x_BHWC: images.
      kernel: [size, size, channels, features].
      strides, padding: of height and width.
      settings: the rest, as `nnx.Conv` gives it.
    """
    height, width = x_BHWC.shape[1:3]
    if kernel.shape[0] > min(-(-height // strides[0]), -(-width // strides[1])):
        places = _places(x_BHWC, kernel.shape[0], strides, padding, 0.0)
        return jnp.concatenate(places, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **settings
    )
    return _convolve(conv, x_BHWC, kernel)


def _places(
    x_BHWC: jax.Array, size: int, strides: Sequence[int], padding: Padding, fill: float
) -> list[jax.Array]:
    """For every place in a window, row by row, what all windows have there."""
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *padding, (0, 0)), constant_values=fill)
    height, width = (full - size + 1 for full in x_BHWC.shape[1:3])
    return [
        x_BHWC[:, row : row + height : strides[0], column : column + width : strides[1]]
        for row in range(size)
        for column in range(size)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(conv: Any, x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    y_BHWC: jax.Array = conv(x_BHWC, kernel)
    return y_BHWC


def _convolve_forward(conv: Any, x_BHWC: jax.Array, kernel: jax.Array) -> tuple[Any, Any]:
    return conv(x_BHWC, kernel), (x_BHWC, kernel)


def _convolve_backward(conv: Any, residuals: Any, gradient_BHWC: jax.Array) -> Any:
    x_BHWC, kernel = residuals
    (x_gradient_BHWC,) = jax.vjp(lambda x: conv(x, kernel), x_BHWC)[1](gradient_BHWC)

    def whole(x_BHWC: jax.Array, gradient_BHWC: jax.Array) -> jax.Array:
        (gradient,) = jax.vjp(lambda kernel: conv(x_BHWC, kernel), kernel)[1](gradient_BHWC)
        return gradient

    def in_pieces(x_BHWC: jax.Array, gradient_BHWC: jax.Array) -> jax.Array:
        """A third of the time of the whole, at 16x16 and 64 channels."""
        pieces = _pieces(gradient_BHWC)

        def split(a_BHWC: jax.Array) -> jax.Array:
            # Every so many images in one piece: they stay on their devices.
            return a_BHWC.reshape(-1, pieces, *a_BHWC.shape[1:])

        x, gradient = split(x_BHWC), split(gradient_BHWC)
        # Not a loop: in one, XLA takes slower programs.
        parts = [whole(x[:, piece], gradient[:, piece]) for piece in range(pieces)]
        return functools.reduce(jnp.add, parts)

    kernel_gradient = jax.lax.platform_dependent(
        x_BHWC, gradient_BHWC, cpu=in_pieces, default=whole
    )
    return x_gradient_BHWC, kernel_gradient


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _pieces(gradient_BHWC: jax.Array) -> int:
    """Into how many equal pieces a batch is cut."""
    batch = gradient_BHWC.shape[0]
    least = min(batch, -(-gradient_BHWC.size * gradient_BHWC.dtype.itemsize // _PIECE_BYTES))
    return next(pieces for pieces in range(max(1, least), batch + 1) if batch % pieces == 0)


# Maximum over windows.

_SIZE, _STRIDE, _PADDING = 3, 2, ((1, 1), (1, 1))


@jax.custom_vjp
def max_pool(x_BHWC: jax.Array) -> jax.Array:
    """The maximum over windows of 3x3 with stride 2, padded by one -inf on every side.

    As in PyTorch, the gradient goes to the first of equal maxima.

    Args:
      x_BHWC: images.

    Returns:
      half of height and width, rounded up.

    Example:
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    return _max_pool(x_BHWC)


def _max_pool(x_BHWC: jax.Array) -> jax.Array:
    strides = (_STRIDE, _STRIDE)
    return nnx.max_pool(x_BHWC, (_SIZE, _SIZE), strides=strides, padding=_PADDING)


def _max_pool_forward(x_BHWC: jax.Array) -> tuple[Any, Any]:
    y_BHWC = _max_pool(x_BHWC)
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


def _max_pool_gradient(x_BHWC: jax.Array, y_BHWC: jax.Array, gradient_BHWC: jax.Array) -> jax.Array:
    """In a sixteenth of the time of XLA's, which looks for indices in four arrays."""
    none = jnp.uint8(_SIZE**2)
    first_BHWC = jnp.full(y_BHWC.shape, none)  # place of the maximum in its window
    places = _places(x_BHWC, _SIZE, (_STRIDE, _STRIDE), _PADDING, -jnp.inf)
    for place, value_BHWC in reversed(list(enumerate(places))):
        first_BHWC = jnp.where(value_BHWC == y_BHWC, jnp.uint8(place), first_BHWC)

    # Of the padded image: pixels in even rows are in two windows, above and below, or left and
    # right; in odd ones, in the middle of one.
    def pixels(row: int, column: int) -> jax.Array:
        parts = []
        for i in range(row, _SIZE, _STRIDE):
            for j in range(column, _SIZE, _STRIDE):
                part_BHWC = jnp.where(first_BHWC == _SIZE * i + j, gradient_BHWC, 0.0)
                after = [(place // _STRIDE, 1 - place // _STRIDE) for place in (i, j)]
                parts.append(jnp.pad(part_BHWC, ((0, 0), *after, (0, 0))))
        return functools.reduce(jnp.add, parts)

    rows = [
        jnp.stack([pixels(row, column) for column in range(_STRIDE)], axis=3)
        for row in range(_STRIDE)
    ]
    batch, height, width, channels = x_BHWC.shape
    both = jnp.stack(rows, axis=2)  # [B, H, stride, W, stride, C]
    padded_BHWC = both.reshape(batch, _STRIDE * both.shape[1], _STRIDE * both.shape[3], channels)
    return padded_BHWC[:, 1 : height + 1, 1 : width + 1]
