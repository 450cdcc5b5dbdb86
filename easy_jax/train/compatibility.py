"""Whether a classifier and its data are made for each other: outputs, class names, pixels.

Nothing here computes a loss: what a loss function makes of the model's outputs is read from an
abstract trace, so that a head of another size is told before anything is compiled or scored.
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
    """Checks that a model's outputs, class names and pixels are those of the data.

    Does nothing for packed text, and for loss functions that are not built on
    `losses.softmax_cross_entropy`.

    Args:
      model: in any mode.
      source: the data. Where it has no `num_classes`, its labels are looked at, if they are in
        memory (`ArraySource`).
      loss_fn: `(model, batch) -> ...`, such as `losses.classification_loss`.
      used_N: bool by example id: those whose labels must be in range; default: all.

    Raises:
      DataError: another number of outputs than of classes, other class names or the same in
        another order, labels out of range; with both numbers or names, and what to do.

    Warns:
      DataWarning: the model wants images of another mean or standard deviation than the data's.

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
    """Raises DataError where a model's classes and the data's have names, and other ones.

    Names that count, `0`, `1`, `2` and so on, are what classes without names are called: they are
    only compared with the same in another order.

    Args:
      ours, theirs: the model's and the data's, in order.
      model: what the message calls it.

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
    """Sorts names that are whole numbers by their value, and before all others."""
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
            f"the model has {_count(number, 'output')}, and {error}. Mend the labels, or give the "
            "model a head of as many outputs as there are classes (easy_jax.new_head)"
        ) from error


def difference_of_pixels(info: ClassifierInfo, source: Any) -> str:
    """Where the images that a model wants are normalised otherwise than the data's: both; else
    nothing."""
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
    """How many classes the loss function distinguishes, by call of `softmax_cross_entropy`."""
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
    """The numbers come out as sizes of arrays: a trace that JAX has cached runs no Python."""

    def trace(state: nnx.State, batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        with losses.recorded_outputs() as outputs:
            contract.call(loss_fn, nnx.merge(graphdef, state, copy=True), batch, token_losses=True)
        return [jnp.zeros(number) for number in outputs]

    return jax.jit(trace)
