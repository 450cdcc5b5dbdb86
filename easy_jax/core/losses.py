"""Per-example losses: unreduced `(loss_sum_B, count_B)`.

Scoring, training and evaluation use the same functions, which do not average over the batch.
The score of an example is `loss_sum / count`. Reductions are in `easy_jax.core.step`.
"""

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easy_jax.kernels import token_stats
from easy_jax.kernels.token_stats import TokenStats

PerExampleLoss = tuple[jax.Array, jax.Array]
LossFn = Callable[[Any, Mapping[str, jax.Array]], PerExampleLoss]


_outputs: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("outputs", default=None)


@contextlib.contextmanager
def recorded_outputs() -> Iterator[list[int]]:
    """Records the number of classes in each call of `softmax_cross_entropy` inside the context.

    `easy_jax.train.compatibility` uses it in an abstract trace to find the number of classes that
    a loss function expects.

    Example:
      >>> with recorded_outputs() as outputs:
      ...   _ = softmax_cross_entropy(jnp.zeros((2, 5)), jnp.zeros(2, int))
      >>> outputs
      [5]
    """
    found: list[int] = []
    token = _outputs.set(found)
    try:
        yield found
    finally:
        _outputs.reset(token)


class ContractError(ValueError):
    """Error raised if a model or loss function does not meet the requirements of easy_jax."""


@runtime_checkable
class WeightedSumLoss(Protocol):
    """Protocol of per-example losses that can also compute a weighted sum, with a cheaper gradient.

    `weighted_sum(model, batch, coefficients) -> (total, size)` returns the sum over the examples
    of coefficient * loss_sum, where `coefficients(count) -> (coefficient, size)`.
    """

    def __call__(self, model: Any, batch: Mapping[str, jax.Array]) -> PerExampleLoss: ...

    def weighted_sum(
        self,
        model: Any,
        batch: Mapping[str, jax.Array],
        coefficients: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    ) -> tuple[jax.Array, jax.Array]: ...


def softmax_cross_entropy(
    logits_BK: Float[Array, "B K"], label_B: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Computes the negative log-likelihood of one label per example, in nats.

    Args:
      logits_BK: unnormalised log-probabilities, which are cast to float32.
      label_B: classes in [0, K). A label out of range gives NaN, which scoring and training
        report with the example's id; it is not clipped into range.

    Returns:
      `(loss_sum_B, count_B)`, float32; the count is 1.

    Example:
      >>> nll, count = softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
      >>> round(float(nll[0]), 4), float(count[0])  # log(4)
      (1.3863, 1.0)
    """
    logits_BK = logits_BK.astype(jnp.float32)
    num_classes = logits_BK.shape[1]
    if (outputs := _outputs.get()) is not None:
        outputs.append(num_classes)
    # A masked sum, not a gather: it fuses, and its gradient needs no scatter.
    is_label_BK = jnp.arange(num_classes)[None, :] == label_B[:, None]
    chosen_B = jnp.sum(jnp.where(is_label_BK, logits_BK, 0.0), axis=1)
    chosen_B = jnp.where((label_B >= 0) & (label_B < num_classes), chosen_B, jnp.nan)
    nll_B = jax.nn.logsumexp(logits_BK, axis=1) - chosen_B
    # Rounding can give -1e-9 where the model is certain; the loss must be non-negative.
    nll_B = jnp.where(nll_B < 0, 0.0, nll_B)
    return nll_B, jnp.ones_like(nll_B)


def squared_error(
    prediction_BD: Float[Array, "B D"], target_BD: Float[Array, "B D"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Computes the squared Euclidean distance per example (arXiv:2502.02797, section 7).

    Args:
      prediction_BD, target_BD: float arrays of equal shape.

    Returns:
      `(sum_B, count_B)`: the sum of squares over D and the count 1, in the inputs' dtype.

    Example:
      >>> loss, count = squared_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]]))
      >>> float(loss[0])
      5.0
    """
    sum_B = jnp.sum(jnp.square(prediction_BD - target_BD), axis=1)
    return sum_B, jnp.ones_like(sum_B)


def normalised_images(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the normalised images of a batch, [B, H, W, C].

    uint8 pixels x become (x / 255 - image_mean) / image_std, float32, with the batch's fields of
    these names, [B, C]; float images are returned unchanged.

    Raises:
      ValueError: the images are uint8, and the batch does not have these fields.

    Example:
      >>> white = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
      >>> half = jnp.full((1, 3), 0.5)
      >>> batch = {"image": white, "image_mean": half, "image_std": half}
      >>> normalised_images(batch).tolist()
      [[[[1.0, 1.0, 1.0]]]]
    """
    image_BHWC = batch["image"]
    if image_BHWC.dtype != jnp.uint8:
        return image_BHWC
    if "image_mean" not in batch or "image_std" not in batch:
        raise ValueError(
            "images are uint8, and the batch has no fields image_mean and image_std to normalise "
            "them with; give these, or float images"
        )
    mean, std = (batch[name][:, None, None, :] for name in ("image_mean", "image_std"))
    return (image_BHWC.astype(jnp.float32) / 255.0 - mean) / std


def image_logits(model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns `model(image, mask)` for a batch with `label`, `mask` and `image`, which is
    normalised by `normalised_images`.

    Raises:
      ContractError: the model does not accept these arguments, or its result is not [B, K]; or
        the labels are not integers [B].
    """
    image_BHWC, mask_B, label_B = normalised_images(batch), batch["mask"], batch["label"]
    own = "give a loss function of your own: loss_fn(model, batch) -> losses, one an example"
    try:
        inspect.signature(model).bind(image_BHWC, mask_B)
    except TypeError as error:
        raise ContractError(
            f"classification_loss calls model(image, mask), and {_call(model)} does not take that: "
            f"give it a second argument, mask=None (bool [B], False for padding), or {own}"
        ) from error
    logits_BK = model(image_BHWC, mask_B)
    shape = getattr(logits_BK, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != mask_B.shape[0]:
        what = type(logits_BK).__name__ if shape is None else f"an array of shape {shape}"
        raise ContractError(
            f"classification_loss needs logits of shape ({mask_B.shape[0]}, classes), and "
            f"{type(model).__name__} returned {what}; {own}"
        )
    if label_B.shape != mask_B.shape or not jnp.issubdtype(label_B.dtype, jnp.integer):
        raise ContractError(
            f"field 'label' has shape {label_B.shape} and dtype {label_B.dtype}; "
            f"classification_loss needs integers of shape {mask_B.shape} (of one-hot labels their "
            f"argmax), or {own}"
        )
    return logits_BK


def _call(model: Any) -> str:
    cls = type(model)
    if not any("__call__" in vars(base) for base in cls.__mro__):
        return f"{cls.__name__}, which has no __call__,"
    return f"{cls.__name__}.__call__{inspect.signature(cls.__call__)}"


def classification_loss(model: Any, batch: Mapping[str, jax.Array]) -> PerExampleLoss:
    """Computes `softmax_cross_entropy` of an image model on a batch of labelled images.

    Args:
      model: an image classifier that is called as `model(image, mask)` and returns logits [B, K].
      batch: a batch with `image` [B, ...] (see `normalised_images`), `label` int [B] and `mask`
        bool [B].

    Returns:
      `(loss_sum_B, count_B)`, float32 [B]: negative log-likelihoods in nats, and counts of 1.

    Example:
      >>> def model(image, mask=None):
      ...     return jnp.zeros((len(image), 3))
      >>> batch = {"image": jnp.ones((1, 2, 2, 1)), "label": jnp.array([0])}
      >>> batch["mask"] = jnp.array([True])  # False for padding
      >>> loss_B, count_B = classification_loss(model, batch)
      >>> [round(float(loss), 4) for loss in loss_B]  # log 3
      [1.0986]
    """
    return softmax_cross_entropy(image_logits(model, batch), batch["label"])


def classification_stats(
    model: Any, batch: Mapping[str, jax.Array], more: bool = True
) -> TokenStats:
    """Returns statistics [B] of an image model's logits, with one entry per example.

    Args:
      model, batch: as in `classification_loss`; the batch may have `weight` and `frozen_nll`.
      more: whether to compute statistics of the distribution in addition to `nll`.
    """
    seen_B = batch["mask"] & (batch["weight"] != 0) if "weight" in batch else batch["mask"]
    stats = logit_stats(image_logits(model, batch), batch["label"], more)
    return dataclasses.replace(stats, mask=seen_B, frozen_nll=batch.get("frozen_nll"))


def logit_stats(
    logits_BK: Float[Array, "B K"], label_B: Int[Array, " B"], more: bool = True
) -> TokenStats:
    """Returns statistics of logits: the loss, and with `more` those of the distribution.

    Args:
      logits_BK, label_B: as in `softmax_cross_entropy`.
      more: whether to compute statistics of the distribution.

    Example:
      >>> stats = logit_stats(jnp.zeros((1, 4)), jnp.array([2]))
      >>> [round(float(x[0]), 4) for x in (stats.nll, stats.entropy, stats.collision)]
      [1.3863, 1.3863, 0.25]
    """
    nll_B, _ = softmax_cross_entropy(logits_BK, label_B)
    fields = token_stats.of_logits(logits_BK, label_B) if more else {}
    return TokenStats(nll_B, **fields, mask=jnp.ones(label_B.shape, bool))
