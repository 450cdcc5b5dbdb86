"""One training stage: loader -> weighted step -> log and checkpoints. Resumable."""

import contextlib
import dataclasses
import functools
import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from easy_jax import data
from easy_jax.core import compatibility, contract, merge, optim
from easy_jax.core.config import OptimizerConfig, Reduction
from easy_jax.core.losses import LossFn
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.core.step import StepFn, TrainState, init_train_state, make_train_step
from easy_jax.data.loader import PADDING_ID
from easy_jax.io import files
from easy_jax.io.code_fingerprint import name_of
from easy_jax.io.metrics_log import MetricsLog
from easy_jax.io.progress import Part
from easy_jax.io.terminal import shown
from easy_jax.io.throughput import Throughput
from easy_jax.models.modes import eval_view
from easy_jax.parallel import lock, processes, sharding
from easy_jax.train import checkpoint, identity, scoring
from easy_jax.train.checkpoint import Checkpointer
from easy_jax.train.config import StageConfig
from easy_jax.train.identity import ANCHORED


class TrainingError(RuntimeError):
    """Training cannot go on; the message names stage, step and examples."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A finished stage.

    Attributes:
      model_state: the trained model's variables, on the mesh.
      steps: how many were taken in all.
      seconds: spent in the stage's loop, over all its runs.
      resumed_from: the step this call started from; `steps` if nothing was left to do.
    """

    model_state: nnx.State
    steps: int
    seconds: float
    resumed_from: int


@lock.alone(files.check_folder)
def fit(
    model: nnx.Module,
    source: data.AnySource,
    directory: str | os.PathLike[str],
    *,
    stage: StageConfig,
    loss_fn: LossFn,
    weight_N: np.ndarray | None = None,
    token_weight: data.Ragged | None = None,
    online: OnlineWeights | None = None,
    trainable: Any = nnx.Param,
    anchored: Callable[[Any, Any], bool] | None = None,
    sfa_beta: float | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    name: str = "fit",
    overwrite: bool = False,
    log: MetricsLog | None = None,
    log_every_steps: int = 10,
    save_every_steps: int = 100,
    keep: int = 2,
    keep_best: bool = False,
    on_epoch: Callable[[int, nnx.State], None] | None = None,
    progress: bool | Callable[[int], None] | Part = True,
    on_speed: Callable[[dict[str, float]], None] | None = None,
) -> Fit:
    """Trains a model on weighted examples; called again, it continues or returns the result.

    All that the result depends on is recorded with it (`easy_jax.train.identity`): the model's
    variables and structure, the data, the loss function's code and closed-over values, what is
    trained, the weights, the stage and the seed. A directory with a checkpoint of
    anything else is refused. A source without a method `fingerprint` is read once for this.

    Args:
      model: in the mode to train it in (`easy_jax.models.train_view` or `eval_view`); its
        variables are copied, not changed.
      source: the training data.
      directory: of this stage's checkpoints.
      stage: epochs, batches, reduction and optimiser.
      loss_fn: `(model, batch) -> (nll_sum_B, count_B)`.
      weight_N: by example id; default: 1. NaN leaves an example out.
      token_weight: by example id, of the target tokens of a packed source; default: 1.
      online: weighs every batch anew, on top of these.
      trainable: NNX filter of the parameters to train.
      anchored: NNX filter of those that the anchor pulls back.
      sfa_beta: if given, after every quarter of the steps the trainable parameters become
        `(1 - beta) * current + beta * starting` (SFA, paper.md section 3).
      seed: of the order of the examples.
      mesh: default: all devices on the data axis.
      name: in logs and errors.
      overwrite: delete the checkpoints in the directory and start anew.
      log: where metrics and speed go.
      log_every_steps, save_every_steps: intervals.
      keep, keep_best: how many checkpoints to keep, the latest (with one, there is none to go
        back to if it is damaged); and whether to keep the one with the lowest mean loss since
        the checkpoint before it, too.
      on_epoch: called with the number of epochs done and the model's variables; may raise
        `Stopped`, and is not called again for that epoch.
      progress: whether to show a bar, on standard error (elsewhere than in a terminal or a
        notebook: a line a minute); or a function that is called with the number of steps done
        since the last call.
      on_speed: called every `log_every_steps` with `examples_per_second`, `steps_per_second` and
        `input_wait`, the share of time in which the devices waited for data
        (`easy_jax.io.throughput`).

    Raises:
      TrainingError: the loss, its gradient, or something that is about to be saved, is not finite.
      ContractError: a model that is not NNX's; a loss function that returns anything but losses
        and counts, or whose losses depend on the other examples of the batch.
      CheckpointError: the directory has a checkpoint of another run (what differs is named), or
        cannot be written.
      LockError: another run is at work in the directory, or has taken it over.
      DisagreementError: several processes, and not the same data, weights or checkpoints in all.
      Stopped: after a SIGTERM, once the state is saved (`processes.stop_on_sigterm`).
      ConfigError, DataError: as the loaders and the mesh; a head that is not of the data's classes
        (`easy_jax.core.compatibility`).

    Warns:
      InputBoundWarning: the devices wait for data a fifth of the time.
      LostUpdatesWarning: most parameters are too coarse for the learning rate.
    """
    contract.check_model(model, "fit")
    contract.check_source(source)
    mesh = sharding.make_mesh() if mesh is None else mesh
    sharding.check_batch_size(stage.batch_size // stage.micro_batches, mesh, f"{name} batch_size")
    loader = data.training_loader(
        source,
        stage.batch_size,
        epochs=stage.epochs,
        seed=seed,
        weight_N=weight_N,
        token_weight=token_weight,
        rows=sharding.process_rows(stage.batch_size, mesh),
    )
    used_N = None if weight_N is None else ~np.isnan(weight_N)
    if token_weight is not None:  # an example without any was dropped while scoring
        used_N = np.diff(token_weight.offsets) > 0 if used_N is None else used_N
    contract.check_tokens(model, source, used_N)
    compatibility.check_classifier(model, source, loss_fn, used_N=used_N)
    total = loader.steps
    run = identity.of_stage(
        model,
        source,
        stage=stage,
        loss_fn=loss_fn,
        weight_N=weight_N,
        token_weight=token_weight,
        online=None if online is None else online.fingerprint(),
        trainable=trainable,
        anchored=anchored,
        sfa_beta=sfa_beta,
        seed=seed,
    )
    if overwrite:
        processes.broadcast(f"the start of {name}", lambda: checkpoint.clear(directory))
    optimizer, train_step = _compiled(
        nnx.graphdef(model),
        loss_fn,
        anchored,
        (run["the loss function"], run[ANCHORED]),
        _without_rate(stage.optimizer),
        total,
        stage.reduction,
        stage.micro_batches,
        mesh,
    )
    state = init_train_state(model, optimizer, trainable=trainable, mesh=mesh)
    optim.warn_of_lost_updates(state.params, stage.optimizer.learning_rate)
    state = _set_learning_rate(state, stage.optimizer.learning_rate, mesh)
    start_params = jax.tree.map(jnp.copy, state.params) if sfa_beta is not None else None
    average_at = merge.sfa_steps(total) if sfa_beta is not None else ()

    first, seconds = 0, 0.0
    steps_per_epoch = total / stage.epochs
    present = data.present_ids(source)
    weight_n = np.ones(len(present)) if weight_N is None else np.asarray(weight_N)[present]
    examples = np.count_nonzero(~np.isnan(weight_n))
    examples_per_step = examples / steps_per_epoch
    epoch_ends = {round(steps_per_epoch * epoch): epoch for epoch in range(1, stage.epochs + 1)}
    pending: _Step | None = None
    told = False  # of a step without any weight
    losses: list[float] = []  # since the last checkpoint
    stopped = False

    def record(step: _Step) -> None:
        nonlocal told
        values = _record(name, step, log, log_every_steps)
        losses.append(values["loss"])
        if step.weightless and values["loss"] == values["grad_norm"] == 0 and not told:
            told = True
            warnings.warn(
                f"{name}: nothing is learnt in step {step.number}: all weights of its batch are 0, "
                f"{step.examples()}. Later steps of the kind are not told",
                data.DataWarning,
                stacklevel=3,
            )

    with (
        contextlib.closing(iter(loader)) as batches,
        Checkpointer(directory, run, keep, keep_best) as checkpointer,
        shown(progress, name, "steps", quiet=not processes.is_main_process()) as part,
    ):
        latest = checkpointer.latest_step()
        processes.assert_equal_across_processes(
            f"the start of {name}", **{**run, "steps": total, "checkpoint": latest}
        )
        if latest is not None:
            state, saved = checkpointer.restore(state, batches)
            first, seconds = int(jax.device_get(state.step)), saved["seconds"]
        part.begin(total, first)
        elapsed = seconds
        throughput = Throughput(name)
        clock = time.perf_counter()
        with jax.transfer_guard("disallow"):
            for step in range(first + 1, total + 1):
                batch = throughput.fetch(batches)
                if step == 1 and not contract.knows(model, loss_fn):
                    _check_first_batch(model, state, loss_fn, run, batch, stage, mesh)
                example_id = batch.pop("example_id")
                weightless = online is not None or _is_weightless(batch)
                placed = sharding.shard_batch(batch, mesh)
                state, metrics = train_step(state, placed if online is None else online(placed))
                if step in average_at:
                    state = dataclasses.replace(
                        state, params=_average(state.params, start_params, sfa_beta)
                    )
                if pending is not None:  # one step late: the device is busy with the next one
                    record(pending)
                pending = _Step(step, example_id, metrics, weightless)
                if step % log_every_steps == 0:
                    speed = throughput.read(metrics)
                    speed["examples_per_second"] = examples_per_step * speed["steps_per_second"]
                    if log is not None:
                        log.write(name, "speed", step, speed)
                    if on_speed is not None:
                        on_speed(speed)
                part.advance(1)
                if step in epoch_ends and on_epoch is not None:
                    seconds += time.perf_counter() - clock
                    with jax.transfer_guard("allow"):
                        try:
                            on_epoch(epoch_ends[step], state.model_state())
                        except processes.Stopped:  # while it evaluated; what is trained is saved
                            stopped = True
                    clock = time.perf_counter()
                    throughput.restart()
                stopped = stopped or processes.should_stop(f"{name}, step {step}")
                if stopped or step % save_every_steps == 0 or step == total:
                    record(pending)
                    pending = None
                    if log is not None:
                        log.flush()  # steps before a checkpoint are not logged again
                    elapsed = seconds + time.perf_counter() - clock
                    with jax.transfer_guard("allow"):
                        _check_finite(name, step, state)
                        mean = sum(losses) / len(losses)
                        checkpointer.save(state, batches, step, {"seconds": elapsed}, mean)
                    losses = []
                    throughput.restart()
                if stopped:
                    break
    if stopped:
        raise processes.Stopped(f"{name}: stopped after step {step} of {total}, which is saved")
    return Fit(state.model_state(), total, elapsed, first)


@functools.lru_cache(maxsize=32)
def _compiled(
    graphdef: nnx.GraphDef[Any],
    loss_fn: LossFn,
    anchored: Callable[[Any, Any], bool] | None,
    fingerprints: tuple[str, str | None],  # of these two: what one object does may have changed
    optimizer_json: str,
    total_steps: int,
    reduction: Reduction,
    micro_batches: int,
    mesh: Mesh,
) -> tuple[optax.GradientTransformation, StepFn]:
    """Optimiser and jitted step; stages that differ in learning rate or weights share them."""
    del fingerprints
    config = OptimizerConfig(**json.loads(optimizer_json))
    optimizer = optim.make_optimizer(config, total_steps, anchored)
    step = make_train_step(
        graphdef, loss_fn, optimizer, reduction=reduction, micro_batches=micro_batches, mesh=mesh
    )
    return optimizer, step


def _check_first_batch(
    model: nnx.Module,
    state: TrainState,
    loss_fn: LossFn,
    run: dict[str, Any],
    batch: dict[str, np.ndarray],
    stage: StageConfig,
    mesh: Mesh,
) -> None:
    """Checks that a loss function is per example; in eval mode, where BatchNorm couples nothing."""
    graphdef = nnx.graphdef(eval_view(model))
    score_step = scoring.make_score_step(graphdef, loss_fn, mesh, run["the loss function"])
    rows = len(batch["mask"]) // stage.micro_batches  # no more than training has room for
    part = {name: array[:rows] for name, array in batch.items()}
    scoring.check_first_batch(score_step, state.model_state(), part, mesh, name_of(loss_fn))


def _without_rate(config: OptimizerConfig) -> str:
    return json.dumps(dataclasses.asdict(dataclasses.replace(config, learning_rate=0.0)))


def _set_learning_rate(state: TrainState, learning_rate: float, mesh: Mesh) -> TrainState:
    """The peak learning rate lives in the optimiser's state (see `optim.make_optimizer`)."""
    rate = jax.device_put(np.float32(learning_rate), sharding.replicated(mesh))
    opt_state: Any = state.opt_state
    opt_state = opt_state._replace(hyperparams={"learning_rate": rate})
    return dataclasses.replace(state, opt_state=opt_state)


@functools.partial(jax.jit, static_argnames="beta", donate_argnums=0)
def _average(params: Any, start: Any, beta: float) -> Any:
    return merge.interpolate(params, start, beta)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step that has been dispatched. `weightless`: every weight that the host gave it is 0."""

    number: int
    example_id: np.ndarray
    metrics: dict[str, jax.Array]
    weightless: bool

    def examples(self) -> str:
        ids = self.example_id[self.example_id != PADDING_ID]
        return f"example ids {ids[:10].tolist()}{' ...' if ids.size > 10 else ''}"


def _is_weightless(batch: dict[str, np.ndarray]) -> bool:
    return not all(batch[name].any() for name in ("weight", "token_weight") if name in batch)


def _record(
    name: str, step: _Step, log: MetricsLog | None, log_every_steps: int
) -> dict[str, float]:
    """Logs a step's metrics; returns them."""
    values = {key: float(value) for key, value in jax.device_get(step.metrics).items()}
    loss, norm = values["loss"], values["grad_norm"]
    if not np.isfinite(loss):
        raise TrainingError(
            f"{name}: the loss is {loss} at step {step.number}, on {step.examples()}. Either one "
            "of them is bad (a label out of range?), or training diverged: lower the learning rate"
        )
    if not np.isfinite(norm):
        raise TrainingError(
            f"{name}: the loss is {loss:.4g} at step {step.number}, but the norm of its gradient "
            f"is {norm}, on {step.examples()}. Either the loss of one of them has no derivative "
            "there (a root or a logarithm of 0?), or training diverged: lower the learning rate"
        )
    if log is not None and (step.number % log_every_steps == 0 or step.number == 1):
        log.write(name, "train", step.number, values)
    return values


def _check_finite(name: str, step: int, state: TrainState) -> None:
    """A checkpoint of a broken model would be resumed from: it is not saved."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_is_finite(state)))
    bad = [jax.tree_util.keystr(path) for path, finite in leaves if not finite]
    if bad:
        raise TrainingError(
            f"{name}: NaN or infinite values after step {step} in {', '.join(bad[:5])}"
            f"{' ...' if len(bad) > 5 else ''}, which is not saved. Training diverged: lower the "
            "learning rate"
        )


@jax.jit
def _is_finite(tree: Any) -> Any:
    inexact = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.inexact), tree)
    return jax.tree.map(lambda x, check: jnp.isfinite(x).all() if check else True, tree, inexact)
