"""Checks that a classifier fits its data: number of outputs, class names, image normalisation.

No loss is computed. The number of classes that a loss function uses is read from an abstract
trace, so a head of the wrong size is reported before anything is compiled or scored.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easy_jax import data
from easy_jax.core import contract, losses
from easy_jax.data.loader import read_records
from easy_jax.data.sources import check_labels
from easy_jax.models.classifier import ClassifierInfo, info_of
from easy_jax.models.modes import eval_mode


def check_classifier(
    model: nnx.Module,
    source: data.AnySource,
    loss_fn: Callable[..., Any],
    *,
    used_N: np.ndarray | None = None,
) -> None:
    """Checks that a model's outputs, class names and image normalisation match the data.

    Does nothing for packed text, or for loss functions that do not call
    `losses.softmax_cross_entropy`.

    Args:
      model: the classifier, in any mode.
      source: the data. If it has no `num_classes`, its labels are checked instead, provided that
        they are in memory (`ArraySource`).
      loss_fn: the loss function, such as `losses.classification_loss`.
      used_N: bool by example id: the examples whose labels must be in range; default: all.

    Raises:
      DataError: the number of outputs, the class names or their order differ from the data's, or
        labels are out of range; the message gives both numbers or names, and a solution.

    Warns:
      DataWarning: the model expects images with another mean or standard deviation.

    Example:
      >>> source = data.ArraySource({"x": np.zeros((2, 4), "f"), "label": np.arange(2)}, 2)
      >>> def loss_fn(model, batch):
      ...   return losses.softmax_cross_entropy(model(batch["x"]), batch["label"])
      >>> model = nnx.Linear(4, 1000, rngs=nnx.Rngs(0))
      >>> check_classifier(model, source, loss_fn)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      easy_jax.data.sources.DataError: the model has 1000 outputs and the data 2 classes; ...
    """
    num_classes = getattr(source, "num_classes", None)
    labelled = isinstance(source, data.ArraySource) and "label" in source.fields
    if isinstance(source, data.PackedSource) or (num_classes is None and not labelled):
        return
    outputs = _outputs(model, source, loss_fn)
    if not outputs:
        return
    for number in outputs:
        if num_classes is not None and number != num_classes:
            raise data.DataError(
                f"the model has {_count(number, 'output')} and the data "
                f"{_count(num_classes, 'class', 'es')}; give it a head of their size with "
                f"easy_jax.new_head(model, {num_classes}), or use the data that its head is for"
            )
        if num_classes is None and isinstance(source, data.ArraySource):
            _check_labels(source, number, used_N)
    check_names(info_of(model).classes, getattr(source, "classes", ()))
    difference = difference_of_pixels(info_of(model), source)
    if difference:
        warnings.warn(difference, data.DataWarning, stacklevel=3)


def check_names(ours: Sequence[str], theirs: Sequence[str], model: str = "the model") -> None:
    """Raises DataError if the class names of a model and of the data differ.

    Does nothing if either has no names. The names `0`, `1`, `2` and so on stand for classes
    without names: only their order is checked, and only against the same names.

    Args:
      ours, theirs: class names of the model and of the data, in order.
      model: a name of the model, for the message.

    Example:
      >>> check_names(["1", "2", "10"], ["1", "10", "2"])  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      easy_jax.data.sources.DataError: the model's classes are the data's in another order: ...
    """
    ours, theirs = list(ours), list(theirs)
    if ours == theirs or not ours or not theirs:
        return
    if sorted(ours) == sorted(theirs):
        place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        natural = ours == sorted(ours, key=natural_key) != sorted(ours)
        reason = (
            ". The model's are in the order of their numbers, those of folders in the order of "
            "text, where 10 comes before 2"
            if natural
            else ""
        )
        raise data.DataError(
            f"{model}'s classes are the data's in another order: class {place} is "
            f"{ours[place]!r} of the model and {theirs[place]!r} of the data{reason}. Rename the "
            "data's classes so that they sort as the model's, or give the model a new head "
            "(easy_jax.new_head)"
        )
    if _count_up(ours) or _count_up(theirs):
        return
    missing = [name for name in theirs if name not in ours]
    raise data.DataError(
        f"{model}'s classes, {_some(ours)}, are not the data's, {_some(theirs)}"
        f"{f': it has no {missing[0]!r}' if missing else ''}; give it a new head "
        f"(easy_jax.new_head(model, {len(theirs)})), or use data of its classes"
    )


def natural_key(name: str) -> tuple[int, str]:
    """Returns a sort key: integers by their value, before all other names."""
    return (int(name), name) if name.isdecimal() else (2**63, name)


def _count_up(names: list[str]) -> bool:
    return names == [str(number) for number in range(len(names))]


def _some(names: list[str]) -> str:
    return f"{names[:3]}{' ...' if len(names) > 3 else ''}"


def _check_labels(source: data.ArraySource, number: int, used_N: np.ndarray | None) -> None:
    label_N = source.fields.get("label")
    if label_N is None or label_N.ndim != 1 or not np.issubdtype(label_N.dtype, np.integer):
        return
    try:
        check_labels(label_N, number, used_N)
    except data.DataError as error:
        raise data.DataError(
            f"the model has {_count(number, 'output')}, and {error}. Fix the labels, or give the "
            "model a head of as many outputs as there are classes (easy_jax.new_head)"
        ) from error


def difference_of_pixels(info: ClassifierInfo, source: Any) -> str:
    """Returns a message if the model expects another normalisation than the data's, else an
    empty string."""
    for ours, name in ((info.mean, "mean"), (info.std, "std")):
        theirs = getattr(source, name, None)
        if not ours or theirs is None:
            continue
        if len(ours) != len(theirs) or not np.allclose(ours, theirs, atol=1e-3):
            return (
                f"the model wants images of {name} {_rounded(ours)}; the data's are normalised "
                f"with {_rounded(theirs)}. Set mean and std of ImageDataConfig to the model's"
            )
    return ""


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def _outputs(
    model: nnx.Module, source: data.Source, loss_fn: Callable[..., Any]
) -> tuple[int, ...]:
    """Returns the number of classes in each call of `softmax_cross_entropy` by the loss."""
    graphdef, state = nnx.split(eval_mode(model))
    record = read_records(source, [0])
    batch = {**record, "mask": np.ones(1, bool), "weight": np.ones(1, np.float32)}
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
        for name, array in batch.items()
    }
    sizes = jax.eval_shape(_trace(graphdef, loss_fn), state, shapes)
    return tuple(size.shape[0] for size in sizes)


@functools.lru_cache(maxsize=32)
def _trace(
    graphdef: nnx.GraphDef[Any], loss_fn: Callable[..., Any]
) -> Callable[[nnx.State, Mapping[str, jax.Array]], list[jax.Array]]:
    """Returns the numbers as sizes of arrays, because a cached trace runs no Python code."""

    def trace(state: nnx.State, batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        with losses.recorded_outputs() as outputs:
            contract.call(loss_fn, nnx.merge(graphdef, state, copy=True), batch, token_losses=True)
        return [jnp.zeros(number) for number in outputs]

    return jax.jit(trace)
