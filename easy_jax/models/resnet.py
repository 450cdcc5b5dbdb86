"""Residual networks in Flax NNX, in timm's layout and parameter order.

Shape suffixes: B batch, H height, W width, C channels, F features, K classes.

Every parameter has its logical axes in the metadata field `logical_axes`;
`easy_jax.parallel.sharding` turns them into shardings. (NNX's own `out_sharding` is not used,
because it needs a mesh at construction time, while models are first built abstractly.)
"""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from easy_jax.kernels.convolution import convolve, max_pool
from easy_jax.models.classifier import ClassifierInfo, linear_head
from easy_jax.models.config import ResNetConfig

_KERNEL_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")


def _conv(
    in_features: int, features: int, size: int, stride: int, dtype: Any, rngs: nnx.Rngs
) -> nnx.Conv:
    # Explicit symmetric padding, because "SAME" pads strided convolutions differently from PyTorch.
    return nnx.Conv(
        in_features,
        features,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated=convolve,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        kernel_metadata={"logical_axes": _KERNEL_AXES},
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation in float32 that ignores padding.

    It matches PyTorch's with a momentum of 0.1: the biased variance normalises a batch, and the
    unbiased variance updates the running variance.
    """

    def __init__(self, features: int, rngs: nnx.Rngs):
        super().__init__(
            features,
            momentum=0.9,
            epsilon=1e-5,
            scale_metadata={"logical_axes": ("norm",)},
            bias_metadata={"logical_axes": ("norm",)},
            rngs=rngs,
        )

    def __call__(self, x_BHWC: jax.Array, mask_B: jax.Array | None = None) -> jax.Array:  # type: ignore[override]
        """Normalises and scales the features; updates the running statistics in train mode.

        Args:
          x_BHWC: features.
          mask_B: boolean, False for padding.

        Returns:
          An array with the shape and dtype of `x_BHWC`; its values are unspecified for padding.
        """
        assert self.scale is not None and self.bias is not None
        scale_C, bias_C, mean_C = self.scale[...], self.bias[...], self.mean[...]
        if self.use_running_average:
            inv_std_C = jax.lax.rsqrt(self.var[...] + self.epsilon)
            return _scaled(x_BHWC, mean_C, inv_std_C * scale_C, bias_C)
        y_BHWC, mean_C, var_C = _normalised(self.epsilon, x_BHWC, scale_C, bias_C, mean_C, mask_B)
        self._learn(mean_C, var_C, _size(x_BHWC, mask_B))
        return y_BHWC

    def _learn(self, mean_C: jax.Array, var_C: jax.Array, size: jax.Array) -> None:
        # Fewer than two values have no unbiased variance. This happens mostly in the last
        # micro-batches of a run, which may contain only padding.
        enough = size > 1.0
        momentum = jnp.where(enough, self.momentum, 1.0)
        var_C = var_C * (size / jnp.where(enough, size - 1.0, 1.0))
        self.mean[...] = momentum * self.mean + (1.0 - momentum) * mean_C
        self.var[...] = momentum * self.var + (1.0 - momentum) * var_C


def _spread(value_C: jax.Array) -> jax.Array:
    return value_C[None, None, None, :]


def _size(x_BHWC: jax.Array, mask_B: jax.Array | None) -> jax.Array:
    """Returns the number of values per channel, without padding."""
    batch, height, width, _ = x_BHWC.shape
    examples = batch if mask_B is None else jnp.sum(mask_B, dtype=jnp.float32)
    return jnp.asarray(examples, jnp.float32) * (height * width)


def _shifted(x_BHWC: jax.Array, shift_C: jax.Array, mask_B: jax.Array | None) -> jax.Array:
    """Returns x minus the shift, with zeros in place of padding."""
    shifted_BHWC = x_BHWC - _spread(shift_C)
    if mask_B is None:
        return shifted_BHWC
    return jnp.where(mask_B[:, None, None, None], shifted_BHWC, 0.0)


def _per_value(x_BHWC: jax.Array, mask_B: jax.Array | None) -> jax.Array:
    """Returns the factor that turns a sum over a channel's values into their mean."""
    # A factor, not a divisor: XLA's CPU backend compiles each division into a separate kernel.
    return 1.0 / jnp.maximum(_size(x_BHWC, mask_B), 1.0)


def _scaled(
    x_BHWC: jax.Array, mean_C: jax.Array, scale_C: jax.Array, bias_C: jax.Array
) -> jax.Array:
    y_BHWC = (x_BHWC - _spread(mean_C)) * _spread(scale_C) + _spread(bias_C)
    return y_BHWC.astype(x_BHWC.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalised(
    epsilon: float,
    x_BHWC: jax.Array,
    scale_C: jax.Array,
    bias_C: jax.Array,
    shift_C: jax.Array,
    mask_B: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises features by the mean and biased variance of the batch.

    The moments exclude padding. If all examples are padding, the output is the bias. Sums are taken
    of differences from `shift_C`, the running mean; otherwise rounding errors of a large mean would
    hide a small variance. The backward pass stores no other array as large as the input.

    Returns:
      `(y_BHWC, mean_C, var_C)`; gradients flow through the first only.
    """
    return _normalised_forward(epsilon, x_BHWC, scale_C, bias_C, shift_C, mask_B)[0]


def _normalised_forward(
    epsilon: float,
    x_BHWC: jax.Array,
    scale_C: jax.Array,
    bias_C: jax.Array,
    shift_C: jax.Array,
    mask_B: jax.Array | None,
) -> tuple[Any, Any]:
    shifted_BHWC = _shifted(x_BHWC, shift_C, mask_B)
    per_value = _per_value(x_BHWC, mask_B)
    mean_C, square_C = (
        jnp.sum(jnp.sum(a, axis=(1, 2)), axis=0) * per_value
        for a in (shifted_BHWC, jnp.square(shifted_BHWC))
    )
    var_C = jnp.maximum(square_C - jnp.square(mean_C), 0.0)
    mean_C += shift_C
    inv_std_C = jax.lax.rsqrt(var_C + epsilon)
    # If all examples are padding, the variance is 0 and the output would grow from layer to layer.
    inv_std_C = jnp.where(_size(x_BHWC, mask_B) > 0, inv_std_C, 0.0)
    y_BHWC = _scaled(x_BHWC, mean_C, inv_std_C * scale_C, bias_C)
    return (y_BHWC, mean_C, var_C), (x_BHWC, scale_C, mask_B, shift_C, mean_C, inv_std_C)


def _normalised_backward(epsilon: float, residuals: Any, gradients: Any) -> Any:
    """Differentiates through the batch's mean and variance, which exclude padding."""
    del epsilon
    x_BHWC, scale_C, mask_B, shift_C, mean_C, inv_std_C = residuals
    gradient_BHWC = gradients[0].astype(jnp.float32)
    # Subtract the same shift as the forward pass, so that XLA stores one difference only.
    shifted_BHWC = _shifted(x_BHWC, shift_C, mask_B)
    mean_C = mean_C - shift_C
    bias_gradient_C = jnp.sum(gradient_BHWC, axis=(0, 1, 2))
    product_C = jnp.sum(gradient_BHWC * shifted_BHWC, axis=(0, 1, 2))
    scale_gradient_C = (product_C - mean_C * bias_gradient_C) * inv_std_C
    per_value = _per_value(x_BHWC, mask_B)
    slope_C = inv_std_C * scale_gradient_C * per_value
    centred_BHWC = shifted_BHWC - _spread(mean_C)
    shared_BHWC = _spread(bias_gradient_C * per_value) + centred_BHWC * _spread(slope_C)
    if mask_B is not None:
        shared_BHWC = jnp.where(mask_B[:, None, None, None], shared_BHWC, 0.0)
    x_gradient_BHWC = (gradient_BHWC - shared_BHWC) * _spread(inv_std_C * scale_C)
    return x_gradient_BHWC.astype(x_BHWC.dtype), scale_gradient_C, bias_gradient_C, None, None


_normalised.defvjp(_normalised_forward, _normalised_backward)


class _Block(nnx.Module):
    """Base class of residual blocks: a shortcut around convolutions with BatchNorm.

    Subclasses call this constructor last, so that parameters are created in timm's order.
    """

    def __init__(self, in_features: int, features: int, stride: int, dtype: Any, rngs: nnx.Rngs):
        self.has_projection = stride != 1 or in_features != features
        if self.has_projection:
            self.downsample_conv = _conv(in_features, features, 1, stride, dtype, rngs)
            self.downsample_bn = BatchNorm(features, rngs)

    def __call__(self, x_BHWC: jax.Array, mask_B: jax.Array | None) -> jax.Array:
        y_BHWC = self.convolve(x_BHWC, mask_B)
        if self.has_projection:
            x_BHWC = self.downsample_bn(self.downsample_conv(x_BHWC), mask_B)
        return nnx.relu(x_BHWC + y_BHWC)

    def convolve(self, x_BHWC: jax.Array, mask_B: jax.Array | None) -> jax.Array:
        raise NotImplementedError


class BasicBlock(_Block):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    expansion = 1

    def __init__(self, in_features: int, width: int, stride: int, dtype: Any, rngs: nnx.Rngs):
        self.conv1 = _conv(in_features, width, 3, stride, dtype, rngs)
        self.bn1 = BatchNorm(width, rngs)
        self.conv2 = _conv(width, width, 3, 1, dtype, rngs)
        self.bn2 = BatchNorm(width, rngs)
        super().__init__(in_features, width, stride, dtype, rngs)

    def convolve(self, x_BHWC: jax.Array, mask_B: jax.Array | None) -> jax.Array:
        y_BHWC = nnx.relu(self.bn1(self.conv1(x_BHWC), mask_B))
        return self.bn2(self.conv2(y_BHWC), mask_B)


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 has the stride (ResNet v1.5)."""

    expansion = 4

    def __init__(self, in_features: int, width: int, stride: int, dtype: Any, rngs: nnx.Rngs):
        features = self.expansion * width
        self.conv1 = _conv(in_features, width, 1, 1, dtype, rngs)
        self.bn1 = BatchNorm(width, rngs)
        self.conv2 = _conv(width, width, 3, stride, dtype, rngs)
        self.bn2 = BatchNorm(width, rngs)
        self.conv3 = _conv(width, features, 1, 1, dtype, rngs)
        self.bn3 = BatchNorm(features, rngs)
        super().__init__(in_features, features, stride, dtype, rngs)

    def convolve(self, x_BHWC: jax.Array, mask_B: jax.Array | None) -> jax.Array:
        y_BHWC = nnx.relu(self.bn1(self.conv1(x_BHWC), mask_B))
        y_BHWC = nnx.relu(self.bn2(self.conv2(y_BHWC), mask_B))
        return self.bn3(self.conv3(y_BHWC), mask_B)


_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nnx.Module):
    """A residual network with random weights; `timm_weights.load` loads pre-trained ones.

    Args:
      config: sizes and dtype; its `path` is not read.
      num_classes: number of outputs of the head.
      rngs: NNX random streams; `params` is used.

    Attributes:
      info: the class names and image normalisation (`ClassifierInfo`), empty at first.

    Example:
      >>> from flax import nnx
      >>> from easy_jax.config import ResNetConfig
      >>> model = ResNet(ResNetConfig(width=4, depths=(1,)), num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jax.numpy.zeros((2, 16, 16, 1))).shape
      (2, 10)
    """

    def __init__(self, config: ResNetConfig, num_classes: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.has_pool = config.stem == "imagenet"
        size, stride = (7, 2) if self.has_pool else (3, 1)
        self.conv1 = _conv(config.in_channels, config.width, size, stride, dtype, rngs)
        self.bn1 = BatchNorm(config.width, rngs)
        new_block = _BLOCKS[config.block]
        blocks = []
        features = config.width
        for stage, depth in enumerate(config.depths):
            width = config.width * 2**stage
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(new_block(features, width, stride, dtype, rngs))
                features = new_block.expansion * width
        self.blocks = nnx.List(blocks)
        self.head = linear_head(features, num_classes, rngs)
        self.info = ClassifierInfo()

    def __call__(self, image_BHWC: jax.Array, mask_B: jax.Array | None = None) -> jax.Array:
        """Computes logits.

        Args:
          image_BHWC: float images.
          mask_B: boolean, False for padding, which BatchNorm's statistics exclude in train mode.

        Returns:
          logits_BK, float32.
        """
        chex.assert_rank(image_BHWC, 4)
        x_BHWC = nnx.relu(self.bn1(self.conv1(image_BHWC), mask_B))
        if self.has_pool:
            x_BHWC = max_pool(x_BHWC)
        for block in self.blocks:
            x_BHWC = block(x_BHWC, mask_B)
        return self.head(jnp.mean(x_BHWC, axis=(1, 2), dtype=jnp.float32))


def is_head(path: Sequence[Any], variable: Any) -> bool:
    """Returns whether a variable belongs to the classification head; an NNX filter."""
    del variable
    return path[0] == "head"


def is_batch_norm(path: Sequence[Any], variable: Any) -> bool:
    """Returns whether a variable belongs to a BatchNorm, with its statistics; an NNX filter."""
    del variable
    return any(str(part).startswith("bn") or part == "downsample_bn" for part in path)


def is_task_specific(path: Sequence[Any], variable: Any) -> bool:
    """Returns whether a variable is task-specific: head or BatchNorm (arXiv:2502.02797).

    Before a fine-tuned network is evaluated on the pre-training task, exactly these parts are
    restored to their pre-trained values.
    """
    return is_head(path, variable) or is_batch_norm(path, variable)


def is_backbone(path: Sequence[Any], variable: Any) -> bool:
    """Returns whether a variable is outside the head; anchors penalise changes of these."""
    return not is_head(path, variable)


head_params = nnx.All(nnx.Param, is_head)
task_params = nnx.All(nnx.Param, is_task_specific)
