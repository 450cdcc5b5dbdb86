"""What was learnt and what was forgotten: metrics on both tasks, and the swap of task parts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easy_jax import data, distributed, losses, scoring, sharding
from easy_jax.models import eval_view


def nll_and_correct(model: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Per example: negative log-likelihood in nats, and 1 where the top class is the label."""
    logits_BK = model(losses.normalised_images(batch), batch["mask"])
    nll_B, _ = losses.softmax_cross_entropy(logits_BK, batch["label"])
    return nll_B, (jnp.argmax(logits_BK, axis=1) == batch["label"]).astype(jnp.float32)


def classification(
    model: nnx.Module,
    source: data.Source,
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Accuracy and mean loss over every example exactly once; in eval mode.

    Args:
      model: an image classifier, `model(image, mask) -> logits`.
      source: records with `image` and `label`.
      batch_size: global.
      mesh: default: all devices on the data axis.

    Returns:
      `accuracy` in percent, `loss` in nats, `count`.

    Raises:
      ConfigError: a batch size that does not divide over the mesh.

    Example:
      >>> source = data.ArraySource({"image": np.eye(2, dtype="f"), "label": np.arange(2)})
      >>> class Identity(nnx.Module):
      ...   def __call__(self, x, mask): return x
      >>> classification(Identity(), source, batch_size=8)["accuracy"]
      100.0
    """
    nll, correct, count = _sums(model, source, nll_and_correct, batch_size, mesh)
    return {"accuracy": 100.0 * correct / count, "loss": nll / count, "count": count}


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
    nll, tokens, _ = _sums(model, source, losses.causal_lm_loss, batch_size, mesh)
    return {"nll": nll / tokens, "perplexity": math.exp(nll / tokens), "tokens": int(tokens)}


def _sums(
    model: nnx.Module,
    source: data.AnySource,
    function: Callable[..., tuple[jax.Array, ...]],
    batch_size: int,
    mesh: Mesh | None,
) -> tuple[float, float, int]:
    """Sums of the two values that a function gives per example, and the number of examples.

    Raises:
      ConfigError: a batch size that does not divide over the mesh.
      DisagreementError: processes with more or fewer examples than others.
      Stopped: after a SIGTERM.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    sharding.check_batch_size(batch_size, mesh, "eval_batch_size")
    graphdef, state = nnx.split(eval_view(model))
    loader = data.scoring_loader(source, batch_size, rows=sharding.process_rows(batch_size, mesh))
    distributed.agree("the start of an evaluation", examples=len(source), batches=loader.steps)
    state = sharding.shard_tree(state, mesh)
    first, second, count = 0.0, 0.0, 0
    results = scoring.per_example(graphdef, state, function, loader, mesh)
    for batch, (ids, first_b, second_b) in enumerate(results, 1):
        first += float(first_b.sum(dtype=np.float64))
        second += float(second_b.sum(dtype=np.float64))
        count += len(ids)
        if distributed.should_stop(f"evaluation, batch {batch}"):
            raise distributed.Stopped("stopped while evaluating, before its result")
    sums = distributed.total("evaluation", first=first, second=second, count=count)
    return sums["first"], sums["second"], int(sums["count"])


def with_task_parts(
    body: nnx.State, task: nnx.State, is_task_specific: Callable[..., bool]
) -> nnx.State:
    """The body of one model with the task-specific parts of another.

    Evaluation on the pre-training task: `body` is the fine-tuned model, `task` the
    pre-trained one, whose head and BatchNorm are put back (paper.md section 2).

    Args:
      body: everything else is taken from here.
      task: what the filter selects is taken from here.
      is_task_specific: NNX filter `(path, variable) -> bool`.

    Raises:
      ValueError: the rest of the two differs in its paths.
    """
    ours = {path: v for path, v in nnx.to_flat_state(body) if not is_task_specific(path, v)}
    theirs = {path: v for path, v in nnx.to_flat_state(task) if is_task_specific(path, v)}
    expected = {path for path, _ in nnx.to_flat_state(task)}
    if ours.keys() | theirs.keys() != expected:
        odd = sorted(map(str, (ours.keys() | theirs.keys()) ^ expected))
        raise ValueError(f"the two models do not have the same body; they differ in {odd[:5]}")
    return nnx.from_flat_state(sorted({**ours, **theirs}.items(), key=lambda item: str(item[0])))
