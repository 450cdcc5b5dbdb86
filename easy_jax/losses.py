"""Per-example losses: unreduced `(nll_sum_B, count_B)`, written once for every use.

Scoring, training and evaluation all call these; nothing here averages over the batch.
The score of an example is `nll_sum / count`. Reductions live in `easy_jax.step`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PerExampleLoss = tuple[jax.Array, jax.Array]
LossFn = Callable[[Any, Mapping[str, jax.Array]], PerExampleLoss]


def softmax_cross_entropy(
    logits_BK: Float[Array, "B K"], label_B: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Negative log-likelihood of one label per example, in nats.

    Args:
      logits_BK: unnormalised log-probabilities; computed in float32.
      label_B: the class, in [0, K). A label outside gives NaN, which scoring and
        training report with the example's id; it is never clipped into range.

    Returns:
      `(nll_sum_B, count_B)`, float32; the count is 1.

    Example:
      >>> nll, count = softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
      >>> round(float(nll[0]), 4), float(count[0])  # log(4)
      (1.3863, 1.0)
    """
    logits_BK = logits_BK.astype(jnp.float32)
    num_classes = logits_BK.shape[1]
    # A masked sum, not a gather: it fuses, and its gradient needs no scatter.
    is_label_BK = jnp.arange(num_classes)[None, :] == label_B[:, None]
    chosen_B = jnp.sum(jnp.where(is_label_BK, logits_BK, 0.0), axis=1)
    chosen_B = jnp.where((label_B >= 0) & (label_B < num_classes), chosen_B, jnp.nan)
    nll_B = jax.nn.logsumexp(logits_BK, axis=1) - chosen_B
    # Rounding can leave -1e-9 where the model is certain; the loss is non-negative.
    nll_B = jnp.where(nll_B < 0, 0.0, nll_B)
    return nll_B, jnp.ones_like(nll_B)


def squared_error(
    prediction_BD: Float[Array, "B D"], target_BD: Float[Array, "B D"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Squared Euclidean distance per example (the loss of the theory, section 7).

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


def classification_loss(model: Any, batch: Mapping[str, jax.Array]) -> PerExampleLoss:
    """`softmax_cross_entropy` of an image model on a batch with `image`, `label`, `mask`."""
    logits_BK = model(batch["image"], batch["mask"])
    return softmax_cross_entropy(logits_BK, batch["label"])
