"""Classification heads, and the description of a classifier's classes and input images."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from flax import nnx

from easy_jax.io.checks import ConfigError, require

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class ClassifierInfo:
    """Class names and image normalisation that an image classifier was trained with.

    `easy_jax.train.compatibility` compares them with those of a data source.

    Attributes:
      classes: class names in the order of the outputs; empty if unknown.
      mean, std: mean and standard deviation of each channel, for pixels in [0, 1], with which the
        model expects images to be normalised; empty if unknown.

    Example:
      >>> ClassifierInfo(classes=("cat", "dog")).classes
      ('cat', 'dog')
    """

    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, source: Any) -> "ClassifierInfo":
        """Returns the classes and normalisation of a data source, for a network trained on it.

        Example:
          >>> from types import SimpleNamespace
          >>> ClassifierInfo.of(SimpleNamespace(classes=["cat", "dog"]))
          ClassifierInfo(classes=('cat', 'dog'), mean=(), std=())
        """
        colours = (
            tuple(round(float(value), 6) for value in getattr(source, name, ()))
            for name in ("mean", "std")
        )
        return cls(tuple(getattr(source, "classes", ())), *colours)


def info_of(model: nnx.Module) -> ClassifierInfo:
    """Returns the model's attribute `info`, or an empty `ClassifierInfo` if it has none."""
    info = getattr(model, "info", None)
    return info if isinstance(info, ClassifierInfo) else ClassifierInfo()


def linear_head(
    features: int, num_classes: int, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.Linear:
    """Returns a new linear classification head: random kernel, zero bias, float32."""
    return nnx.Linear(
        features,
        num_classes,
        use_bias=use_bias,
        kernel_metadata={"logical_axes": ("features", "classes")},
        bias_metadata={"logical_axes": ("classes",)},
        rngs=rngs,
    )


def new_head(model: M, num_classes: int, *, classes: Sequence[str] = (), seed: int = 0) -> M:
    """Returns a classifier with a new head for other classes; the given model is not changed.

    Args:
      model: a model whose attribute `head` is an `nnx.Linear`, such as `ResNet`. The result shares
        all its other variables.
      num_classes: number of outputs of the new head.
      classes: class names in the order of the outputs; exports include them.
      seed: random seed of the kernel; the bias is zero.

    Returns:
      A model of the same type, in the same mode.

    Raises:
      ConfigError: the model has no such head, `num_classes` is below one, or the number of names
        differs from it.

    Example:
      >>> from easy_jax.config import ResNetConfig
      >>> from easy_jax.models.resnet import ResNet
      >>> pretrained = ResNet(ResNetConfig(width=4, depths=(1,)), num_classes=99, rngs=nnx.Rngs(0))
      >>> model = new_head(pretrained, 3, classes=["cat", "dog", "owl"])
      >>> model.head.out_features, pretrained.head.out_features, model.info.classes
      (3, 99, ('cat', 'dog', 'owl'))
    """
    head = getattr(model, "head", None)
    if not isinstance(head, nnx.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no `head` that is an nnx.Linear; rename its last "
            "layer to `head`, or replace that layer yourself"
        )
    require(num_classes > 0, "num_classes", num_classes, "positive")
    require(
        not classes or len(classes) == num_classes,
        "the number of class names",
        len(classes),
        f"num_classes, which is {num_classes}",
    )
    other: M = nnx.merge(*nnx.split(model))  # a new module that shares the arrays
    other.head = linear_head(  # type: ignore[attr-defined]
        head.in_features, num_classes, nnx.Rngs(params=seed), use_bias=head.use_bias
    )
    info = dataclasses.replace(info_of(model), classes=tuple(classes))
    if info != info_of(other):
        other.info = info  # type: ignore[attr-defined]
    return other
