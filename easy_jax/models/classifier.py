"""What every classifier shares: its head, and what its outputs and inputs mean."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from flax import nnx

from easy_jax.io.checks import ConfigError, require

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier of images was made for (`core.compatibility` compares it with data).

    Attributes:
      classes: names of the outputs, in order; empty: not known.
      mean, std: by channel, of the images that it wants, of pixels in [0, 1]; empty: not known.

    Example:
      >>> ClassifierInfo(classes=("cat", "dog")).classes
      ('cat', 'dog')
    """

    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, source: Any) -> "ClassifierInfo":
        """What a source of data tells of itself: for a network that was trained on it.

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
    """The model's attribute `info`; one that knows nothing where it has none."""
    info = getattr(model, "info", None)
    return info if isinstance(info, ClassifierInfo) else ClassifierInfo()


def linear_head(
    features: int, num_classes: int, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.Linear:
    """A fresh linear classification head, `features` to `num_classes`, with zero bias."""
    return nnx.Linear(
        features,
        num_classes,
        use_bias=use_bias,
        kernel_metadata={"logical_axes": ("features", "classes")},
        bias_metadata={"logical_axes": ("classes",)},
        rngs=rngs,
    )


def new_head(model: M, num_classes: int, *, classes: Sequence[str] = (), seed: int = 0) -> M:
    """Gives a classifier a fresh head for other classes; the model passed keeps its own.

    Args:
      model: with an attribute `head` that is an `nnx.Linear`, such as `ResNet`. All but the head
        is shared with the result, not copied.
      num_classes: outputs of the new head, as the data's `num_classes`.
      classes: their names, in order; they travel with the model into an export.
      seed: of the random kernel; the bias is zero.

    Returns:
      A model of the same type, in the same mode.

    Raises:
      ConfigError: no such head, fewer than one class, or another number of names than of classes.

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
            f"{type(model).__name__} has no `head` that is an nnx.Linear; give it one, or replace "
            "its last layer by one of as many outputs as there are classes"
        )
    require(num_classes > 0, "num_classes", num_classes, "positive")
    require(
        not classes or len(classes) == num_classes,
        "the number of class names",
        len(classes),
        f"that of the classes, {num_classes}",
    )
    other: M = nnx.merge(*nnx.split(model))  # the same arrays, in a module of its own
    other.head = linear_head(  # type: ignore[attr-defined]
        head.in_features, num_classes, nnx.Rngs(params=seed), use_bias=head.use_bias
    )
    info = dataclasses.replace(info_of(model), classes=tuple(classes))
    if info != info_of(other):
        other.info = info  # type: ignore[attr-defined]
    return other
