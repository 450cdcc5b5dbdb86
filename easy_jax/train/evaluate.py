"""What was learnt and what was forgotten: metrics on both tasks, and the swap of task parts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easy_jax import data
from easy_jax.core import losses
from easy_jax.models.modes import eval_mode
from easy_jax.parallel import processes, sharding
from easy_jax.train import compatibility, scoring


def nll_and_correct(model: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Per example: negative log-likelihood in nats, and 1 where the top class is the label."""
    logits_BK = losses.image_logits(model, batch)
    nll_B, _ = losses.softmax_cross_entropy(logits_BK, batch["label"])
    return nll_B, (jnp.argmax(logits_BK, axis=1) == batch["label"]).astype(jnp.float32)


def classification(
    model: nnx.Module,
    source: data.Source,
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    group_N: np.ndarray | None = None,
) -> dict[str, Any]:
    """Accuracy and mean loss over every example exactly once; in eval mode.

    Args:
      model: an image classifier, `model(image, mask) -> logits`.
      source: records with `image` and `label`.
      batch_size: global.
      mesh: default: all devices on the data axis.
      group_N: a group for every example, from 0, each with an example at least.

    Returns:
      `accuracy` in percent, `loss` in nats, `count`; with groups, also `group_accuracy`, a list.

    Raises:
      ConfigError: a batch size that does not divide over the mesh.
      DataError: a head that is not of the data's classes (`easy_jax.train.compatibility`).

    Example:
      >>> source = data.ArraySource({"image": np.eye(2, dtype="f"), "label": np.arange(2)})
      >>> class Identity(nnx.Module):
      ...   def __call__(self, x, mask): return x
      >>> classification(Identity(), source, batch_size=8)["accuracy"]
      100.0
    """
    compatibility.check_classifier(model, source, nll_and_correct)
    nll_G, correct_G, count_G = _sums(model, source, nll_and_correct, batch_size, mesh, group_N)
    count = count_G.sum()
    result = {
        "accuracy": float(100.0 * correct_G.sum() / count),
        "loss": float(nll_G.sum() / count),
        "count": int(count),
    }
    if group_N is not None:
        result["group_accuracy"] = (100.0 * correct_G / count_G).tolist()
    return result


def loss_groups(loss_N: np.ndarray, groups: int = 10) -> np.ndarray:
    """Groups of equal size (to within one) by loss: the deciles of the paper's Table 5.

    Args:
      loss_N: at least as many as groups; of equal ones, the first come first.

    Returns:
      int [N], 0 for the smallest losses, `groups - 1` for the largest.

    Raises:
      ValueError: fewer losses than groups, or one that is not finite.

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
    """Cross-entropy of a causal language model over every target token exactly once.

    Args:
      model: like `easy_jax.models.transformer.Transformer`.
      source: packed examples.
      batch_size: global, in rows.
      mesh: default: all devices on the data axis.

    Returns:
      `nll`, nats per target token; `perplexity`, its exponential; `tokens`, their number.

    Raises:
      ConfigError: a batch size that does not divide over the mesh.
    """
    sums = _sums(model, source, losses.causal_lm_loss, batch_size, mesh)
    nll, tokens = (float(each.item()) for each in sums[:2])
    return {"nll": nll / tokens, "perplexity": math.exp(nll / tokens), "tokens": int(tokens)}


def _sums(
    model: nnx.Module,
    source: data.AnySource,
    function: Callable[..., tuple[jax.Array, ...]],
    batch_size: int,
    mesh: Mesh | None,
    group_N: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over each group of examples, [G] in float64, of the two values that a function gives
    per example, and how many there are; without groups all are one.

    Raises:
      ConfigError: a batch size that does not divide over the mesh.
      DisagreementError: processes with more or fewer examples than others.
      Stopped: after a SIGTERM.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    sharding.check_batch_size(batch_size, mesh, "eval_batch_size")
    graphdef, state = nnx.split(eval_mode(model))
    loader = data.scoring_loader(source, batch_size, rows=sharding.process_rows(batch_size, mesh))
    processes.assert_equal_across_processes(
        "the start of an evaluation", examples=len(source), batches=loader.steps
    )
    state = sharding.shard_tree(state, mesh)
    group_N = np.zeros(len(source), np.int64) if group_N is None else group_N
    sums_3G = np.zeros((3, group_N.max() + 1))
    results = scoring.per_example(graphdef, state, function, loader, mesh, "evaluation")
    for batch, (ids, first_b, second_b) in enumerate(results, 1):
        for sums_G, value_b in zip(sums_3G, (first_b, second_b, np.ones(len(ids))), strict=True):
            np.add.at(sums_G, group_N[ids], value_b)
        if processes.should_stop(f"evaluation, batch {batch}"):
            raise processes.Stopped("stopped while evaluating, before its result")
    parts = processes.gather("evaluation", sums_3G.tolist())
    first_G, second_G, count_G = np.sum(np.array(parts), axis=0)
    return first_G, second_G, count_G


def with_task_parts(
    body: nnx.State, task: nnx.State, is_task_specific: Callable[..., bool]
) -> nnx.State:
    """The body of one model with the task-specific parts of another.

    Evaluation on the pre-training task: `body` is the fine-tuned model, `task` the
    pre-trained one, whose head and BatchNorm are put back (arXiv:2502.02797).

    Args:
      body: everything else is taken from here.
      task: what the filter selects is taken from here.
      is_task_specific: NNX filter `(path, variable) -> bool`.

    Raises:
      ValueError: the rest of the two differs in its paths.

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
