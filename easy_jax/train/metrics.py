"""Metrics of image classifiers: functions of logits and labels, averaged over examples.

To add a metric, register it in `METRICS`. `config.metrics` names the metrics that an experiment
measures on both tasks in addition to accuracy; its tables get a column for each.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from easy_jax.core import losses
from easy_jax.io.registry import Registry


@dataclasses.dataclass(frozen=True)
class Metric:
    """A quantity that is measured for each example separately.

    Attributes:
      title: column heading in tables, with the unit.
      per_example: `(logits_BK, label_B) -> value_B`: float logits [B, K], int labels [B], and one
        float value per example. A data set's value is their mean.
      better: whether higher or lower values are better.

    Example:
      >>> half = Metric("probability above 1/2 (%)", lambda logits_BK, label_B: 100.0 * (
      ...     jax.nn.softmax(logits_BK)[jnp.arange(len(label_B)), label_B] > 0.5))
      >>> half.per_example(jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1])).tolist()
      [100.0, 0.0]
    """

    title: str
    per_example: Callable[[jax.Array, jax.Array], jax.Array]
    better: Literal["higher", "lower"] = "higher"


METRICS: Registry[Metric] = Registry("metric")


def _accuracy(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
    return 100.0 * (jnp.argmax(logits_BK, axis=1) == label_B)


def _cross_entropy(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
    return losses.softmax_cross_entropy(logits_BK, label_B)[0]


METRICS.register("accuracy")(Metric("accuracy (%)", _accuracy))
METRICS.register("loss")(Metric("cross-entropy (nats)", _cross_entropy, better="lower"))
