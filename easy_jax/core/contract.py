"""Checks of the requirements on a model and a loss function, with one-sentence error messages.

Shapes are checked while a step is traced, which costs nothing when it runs. Whether losses are
per example is checked on the first batch: some examples are replaced, and the losses of the
others must not change.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easy_jax.core.losses import ContractError
from easy_jax.io.code_fingerprint import name_of
from easy_jax.parallel import processes

Arrays = Mapping[str, np.ndarray]
_LOOSE = 2e-2  # tolerance for losses in bfloat16, relative to the largest
_TIGHT = 1e-4
_CONSTANT = 2e-6  # tolerance if all losses are equal, which suggests a repeated mean


def check_model(model: Any, who: str) -> None:
    """Raises ContractError unless a model is a Flax NNX module.

    Example:
      >>> check_model(lambda x: x, "score")
      Traceback (most recent call last):
      easy_jax.core.losses.ContractError: score takes a Flax NNX module, not a function
    """
    if isinstance(model, nnx.Module):
        return
    bases = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    what, cure = f"a {type(model).__qualname__}", ""
    if any(base.startswith("flax.linen.") for base in bases):
        what = f"a Flax Linen module ({type(model).__qualname__})"
        cure = ": wrap it in flax.nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), and call lazy_init"
    elif any(base.startswith("torch.") for base in bases):
        what = f"a PyTorch module ({type(model).__qualname__})"
        cure = ": write it in NNX; timm_weights and hugging_face load the weights of known families"
    elif isinstance(model, type):
        what, cure = f"the class {model.__qualname__}", ": give an object of it"
    elif isinstance(model, nnx.State | tuple):
        cure = ": give the module, nnx.merge(graphdef, state)"
    raise ContractError(f"{who} takes a Flax NNX module, not {what}{cure}")


def call(
    loss_fn: Callable[..., Any],
    model: Any,
    batch: Mapping[str, jax.Array],
    *,
    token_losses: bool = False,
) -> tuple[jax.Array, ...]:
    """Calls a loss function and checks its result; losses without counts get counts of 1.

    Args:
      loss_fn: the loss function, `(model, batch) -> (loss_sum_B, count_B)` or `loss_sum_B`.
      model: the model to call it with.
      batch: the batch, with a field `mask` that has the shape of losses and counts.
      token_losses: whether a third array, with a value for every token, is allowed.

    Raises:
      ContractError: the loss function reads a field that the batch does not have, or its result
        has another type or shape.

    Example:
      >>> batch = {"x": jnp.ones((2, 1)), "mask": jnp.ones(2, bool)}
      >>> call(lambda model, batch: batch["x"].mean(), None, batch)
      Traceback (most recent call last):
      easy_jax.core.losses.ContractError: <lambda> returned a scalar; it must return (loss, count), each with one value for every example, here of shape (2,), or the losses alone: leave out the mean or sum over the batch
    """  # noqa: E501
    name = name_of(loss_fn)
    try:
        returned = loss_fn(model, batch)
    except KeyError as error:
        if not error.args or not isinstance(error.args[0], str) or error.args[0] in batch:
            raise
        raise ContractError(
            f"{name} looks for a field {error.args[0]!r}, and the batch has "
            f"{', '.join(sorted(batch))}: rename the source's fields, or give a loss function that "
            "uses these"
        ) from error
    wanted = batch["mask"].shape
    parts = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    sizes = (2, 3) if token_losses else (2,)
    if isinstance(returned, tuple | list):
        fits = len(parts) in sizes and all(_shape(part) == wanted for part in parts[:2])
    else:
        fits = _shape(returned) == wanted
    if not fits or not all(isinstance(part, jax.Array | np.ndarray) for part in parts):
        raise ContractError(_wrong(name, returned, parts, wanted))
    loss = jnp.asarray(parts[0])
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ContractError(f"{name} returned losses of dtype {loss.dtype}; they must be floats")
    if len(parts) == 1:
        return loss, jnp.ones(wanted, jnp.float32)
    count = jnp.asarray(parts[1])
    if not jnp.issubdtype(count.dtype, jnp.floating):
        count = count.astype(jnp.float32)
    return (loss, count, *parts[2:])


def _shape(value: Any) -> tuple[int, ...] | None:
    return getattr(value, "shape", None)


def _wrong(name: str, returned: Any, parts: tuple[Any, ...], wanted: tuple[int, ...]) -> str:
    """Returns the error message for a result that is neither losses nor losses and counts."""
    is_pair = isinstance(returned, tuple | list)
    found = _described(returned)
    if is_pair:
        found = f"{len(parts)} values ({', '.join(map(_described, parts[:4]))})"
    first = _shape(parts[0]) if parts else None
    if returned is None:
        cure = "is its return missing?"
    elif first == ():
        cure = "leave out the mean or sum over the batch"
    elif first == (*wanted, 1):
        cure = "take [..., 0] of the losses"
    elif first == wanted and is_pair and len(parts) == 2:
        cure = f"the second must be an array of the same shape: jnp.ones({wanted})"
    elif first == wanted:
        cure = "return the first two alone"
    else:
        cure = "sum over all but the examples"
    return (
        f"{name} returned {found}; it must return (loss, count), each with one value for every "
        f"example, here of shape {wanted}, or the losses alone: {cure}"
    )


def _described(value: Any) -> str:
    shape = _shape(value)
    if shape == ():
        return "a scalar"
    if shape is not None:
        return f"an array of shape {shape}"
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(str, value))}"
    if isinstance(value, bool | int | float):
        return f"the number {value}"
    return "None" if value is None else f"a {type(value).__name__}"


def check_apart(
    run: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, ...]],
    batch: Arrays,
    name: str,
) -> None:
    """Checks that the loss of an example does not depend on the others in its batch.

    One half of the examples is replaced by copies of the other half, and one of them is masked;
    then the halves are exchanged. A batch of one example passes. All processes must call this.

    Args:
      run: the compiled step, from a batch like `batch` to losses and counts of this process's rows.
      batch: this process's rows, with `example_id` and `mask`.
      name: the name of the loss function, for the message.

    Raises:
      ContractError: a loss or count has changed, in any process; raised in all processes.
    """
    arrays = {key: value for key, value in batch.items() if key != "example_id"}
    rows = np.flatnonzero(batch["mask"].reshape(len(batch["mask"]), -1).any(axis=1))
    # Random halves, not every second row: a loss may depend on the row two places away.
    rows = np.random.default_rng(0).permutation(rows)
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    first = run(arrays)
    worst: list[tuple[int, float, float]] = []
    for kept, replaced in (halves, halves[::-1]):
        source = np.arange(len(batch["mask"]))
        changed = dict(arrays)
        if kept.size and replaced.size:
            source[replaced] = np.resize(kept, replaced.size)
            changed = {key: value[source] for key, value in arrays.items()}
            if len(rows) > 2:
                changed["mask"][replaced[-1]] = False
        second = run(changed)
        mask = batch["mask"][kept]
        for before, after in zip(first[:2], second[:2], strict=True):
            worst += _changes(
                before[kept][mask], after[kept][mask], batch["example_id"][kept][mask]
            )
    parts = processes.gather("a check of the first batch", sorted(worst)[:1])
    found = sorted(tuple(change) for part in parts for change in part)
    if found:
        example, before, after = found[0]
        raise ContractError(
            f"what {name} returns of an example depends on the others in its batch: of example id "
            f"{int(example)} it was {before:.6g}, and {after:.6g} when others were replaced. "
            "It must return each example's own loss and count, before any mean over the batch"
        )


def knows(model: nnx.Module, loss_fn: Callable[..., Any]) -> bool:
    """Returns whether model and loss are parts of easy_jax, whose losses are per example."""
    loss = inspect.unwrap(loss_fn)
    modules = type(model).__module__, getattr(loss, "__module__", "")
    return not isinstance(loss, functools.partial) and all(
        module.startswith("easy_jax.") for module in modules
    )


def _changes(before: np.ndarray, after: np.ndarray, ids: np.ndarray) -> list[Any]:
    """Returns `(id, before, after)` of losses that differ by more than rounding."""
    if before.size == 0:
        return []
    low_precision = before.dtype.itemsize < 4
    before, after = before.astype(np.float64), after.astype(np.float64)
    finite = before[np.isfinite(before)]
    share = _LOOSE if low_precision else _TIGHT
    if before.size > 1 and (before == before[0]).all():
        share = min(share, _CONSTANT) if not low_precision else share
    scale = np.abs(finite).max() if finite.size else 0.0
    same = np.isclose(before, after, rtol=0, atol=share * scale, equal_nan=True)
    return [
        (int(i), float(b), float(a))
        for i, b, a in zip(ids[~same], before[~same], after[~same], strict=True)
        if i >= 0  # negative ids are padding
    ]
