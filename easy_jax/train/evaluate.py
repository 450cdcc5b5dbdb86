"""Evaluation on the fine-tuning and the pre-training task, and replacement of a model's head."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easy_jax import data
from easy_jax.core import causal_lm, losses
from easy_jax.models.modes import eval_mode
from easy_jax.parallel import processes, sharding
from easy_jax.train import compatibility, forward
from easy_jax.train.metrics import METRICS, Metric

_Evaluator = Callable[[Any, Mapping[str, jax.Array]], dict[str, losses.PerExampleLoss]]


@dataclasses.dataclass(frozen=True)
class _ImageMetrics:
    """Evaluator `(model, batch) -> {name: (sum_B, count_B)}` of some of `METRICS`."""

    metrics: tuple[tuple[str, Metric], ...]

    def __call__(
        self, model: Any, batch: Mapping[str, jax.Array]
    ) -> dict[str, losses.PerExampleLoss]:
        logits_BK, label_B = losses.image_logits(model, batch), batch["label"]
        values = {}
        for name, metric in self.metrics:
            value_B = jnp.asarray(metric.per_example(logits_BK, label_B), jnp.float32)
            if value_B.shape != label_B.shape:
                raise losses.ContractError(
                    f"the metric {name!r} returned an array of shape {value_B.shape}; it must "
                    f"return one value for every example, here {label_B.shape}"
                )
            values[name] = (value_B, jnp.ones_like(value_B))
        return values


def _language_metrics(
    model: Any, batch: Mapping[str, jax.Array]
) -> dict[str, losses.PerExampleLoss]:
    return {"nll": causal_lm.causal_lm_loss(model, batch)}


def classification(
    model: nnx.Module,
    source: data.Source,
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    group_N: np.ndarray | None = None,
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures accuracy, mean loss and other metrics over every example once, in eval mode.

    Args:
      model: an image classifier, `model(image, mask) -> logits`.
      source: a source of records with the fields `image` and `label`.
      batch_size: examples per batch, over all devices and processes.
      mesh: the device mesh; default: all devices on the data axis.
      group_N: int group of every example, counted from 0; no group may be empty.
      metrics: names of further metrics (`easy_jax.train.metrics.METRICS`).

    Returns:
      `accuracy` in percent, `loss` in nats, each further metric by its name, and `count`, the
      number of examples; with groups, also `group_accuracy`, a list.

    Raises:
      ConfigError: a metric is unknown, or the batch size does not divide over the mesh.
      ContractError: a metric does not return one value for every example.
      DataError: the head has other classes than the data (`easy_jax.train.compatibility`).

    Example:
      >>> source = data.ArraySource({"image": np.eye(2, dtype="f"), "label": np.arange(2)})
      >>> class Identity(nnx.Module):
      ...   def __call__(self, x, mask): return x
      >>> classification(Identity(), source, batch_size=8)["accuracy"]
      100.0
    """
    compatibility.check_classifier(model, source, losses.classification_loss)
    names = tuple(dict.fromkeys(("accuracy", "loss", *metrics)))
    evaluator = _ImageMetrics(tuple((name, METRICS.find(name, "metrics")) for name in names))
    sums = _sums(model, source, evaluator, names, batch_size, mesh, group_N)
    result: dict[str, Any] = {
        name: float(sum_G.sum() / count_G.sum()) for name, (sum_G, count_G) in sums.items()
    }
    accuracy_G, count_G = sums["accuracy"]
    result["count"] = int(count_G.sum())
    if group_N is not None:
        result["group_accuracy"] = (accuracy_G / count_G).tolist()
    return result


def loss_groups(loss_N: np.ndarray, groups: int = 10) -> np.ndarray:
    """Divides examples by loss into groups of equal size (to within one).

    Ten groups are the deciles of arXiv:2502.02797, Table 5.

    Args:
      loss_N: losses, at least as many as groups; equal losses are sorted by example id.
      groups: number of groups.

    Returns:
      int [N], 0 for the smallest losses, `groups - 1` for the largest.

    Raises:
      ValueError: there are fewer losses than groups, or a loss is not finite.

    Example:
      >>> loss_groups(np.array([3.0, 1.0, 2.0, 4.0]), groups=2).tolist()
      [1, 0, 0, 1]
    """
    loss_N = np.asarray(loss_N)
    if len(loss_N) < groups or not np.isfinite(loss_N).all():
        raise ValueError(f"{len(loss_N)} losses, not all finite or fewer than {groups} groups")
    group_N = np.empty(len(loss_N), np.int64)
    group_N[np.argsort(loss_N, kind="stable")] = np.arange(len(loss_N)) * groups // len(loss_N)
    return group_N


def language(
    model: nnx.Module,
    source: data.PackedSource,
    *,
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Measures the cross-entropy of a causal language model over every target token once.

    Args:
      model: a language model with the call of `easy_jax.models.transformer.Transformer`.
      source: packed examples.
      batch_size: rows per batch, over all devices and processes.
      mesh: the device mesh; default: all devices on the data axis.

    Returns:
      `nll`, nats per target token; `perplexity`, its exponential; `tokens`, their number.

    Raises:
      ConfigError: the batch size does not divide over the mesh.
    """
    sums = _sums(model, source, _language_metrics, ("nll",), batch_size, mesh)
    nll, tokens = (float(each.item()) for each in sums["nll"])
    return {"nll": nll / tokens, "perplexity": math.exp(nll / tokens), "tokens": int(tokens)}


def _sums(
    model: nnx.Module,
    source: data.AnySource,
    evaluator: _Evaluator,
    names: tuple[str, ...],
    batch_size: int,
    mesh: Mesh | None,
    group_N: np.ndarray | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the sums of an evaluator's values and counts over each group of examples.

    Args:
      names: names of the evaluator's values to return.
      group_N: int group of every example; default: one group.

    Returns:
      `{name: (sum_G, count_G)}`, float64.

    Raises:
      ConfigError: the batch size does not divide over the mesh.
      DisagreementError: processes have different numbers of examples.
      Stopped: the process has received a SIGTERM.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    sharding.check_batch_size(batch_size, mesh, "eval_batch_size")
    graphdef, state = nnx.split(eval_mode(model))
    loader = data.scoring_loader(source, batch_size, rows=sharding.process_rows(batch_size, mesh))
    processes.assert_equal_across_processes(
        "the start of an evaluation", examples=len(source), batches=loader.steps
    )
    state = sharding.shard_tree(state, mesh)
    step = _make_step(graphdef, evaluator, names, mesh)
    group_N = np.zeros(len(source), np.int64) if group_N is None else group_N
    sums_2GM = np.zeros((2, group_N.max() + 1, len(names)))
    results = forward.per_example(step, state, loader, mesh, "evaluation")
    for number, (ids, *values_bM) in enumerate(results, 1):
        for sums_GM, value_bM in zip(sums_2GM, values_bM, strict=True):
            np.add.at(sums_GM, group_N[ids], value_bM)
        if processes.should_stop(f"evaluation, batch {number}"):
            raise processes.Stopped("stopped while evaluating, before its result")
    parts = processes.gather("evaluation", sums_2GM.tolist())
    sum_MG, count_MG = np.sum(np.array(parts), axis=0).transpose(0, 2, 1)
    return {name: (sum_MG[m], count_MG[m]) for m, name in enumerate(names)}


@functools.lru_cache(maxsize=32)
def _make_step(
    graphdef: nnx.GraphDef[Any], evaluator: _Evaluator, names: tuple[str, ...], mesh: Mesh
) -> Callable[[nnx.State, Mapping[str, jax.Array]], tuple[jax.Array, ...]]:
    """Returns the jitted `(state, batch) -> (sum_BM, count_BM)`, with a column for each name."""

    def stacked(model: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        values = evaluator(model, batch)
        sums, counts = zip(*(values[name] for name in names), strict=True)
        return jnp.stack(sums, axis=-1), jnp.stack(counts, axis=-1)

    return forward.forward_step(graphdef, stacked, mesh)


def with_task_parts(
    body: nnx.State, task: nnx.State, is_task_specific: Callable[..., bool]
) -> nnx.State:
    """Replaces the task-specific parts of one model by those of another.

    For evaluation on the pre-training task, `body` is the fine-tuned and `task` the pre-trained
    model, whose head and BatchNorm replace the fine-tuned ones (arXiv:2502.02797).

    Args:
      body: the model whose task-specific parts are replaced.
      task: the model that these parts are taken from.
      is_task_specific: NNX filter `(path, variable) -> bool` of these parts.

    Returns:
      The state of the combined model.

    Raises:
      ValueError: the two models differ in the paths of their other variables.

    Example:
      >>> tuned = nnx.State({"body": nnx.Param(1), "head": nnx.Param(2)})
      >>> before = nnx.State({"body": nnx.Param(3), "head": nnx.Param(4)})
      >>> nnx.to_pure_dict(with_task_parts(tuned, before, lambda path, _: path[0] == "head"))
      {'body': 1, 'head': 4}
    """
    ours = {path: v for path, v in nnx.to_flat_state(body) if not is_task_specific(path, v)}
    theirs = {path: v for path, v in nnx.to_flat_state(task) if is_task_specific(path, v)}
    expected = {path for path, _ in nnx.to_flat_state(task)}
    if ours.keys() | theirs.keys() != expected:
        odd = sorted(map(str, (ours.keys() | theirs.keys()) ^ expected))
        raise ValueError(f"the two models do not have the same body; they differ in {odd[:5]}")
    return nnx.from_flat_state(sorted({**ours, **theirs}.items(), key=lambda item: str(item[0])))
