"""A resumable training stage: loader -> weighted step -> log and checkpoints."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from easy_jax import data
from easy_jax.core import contract, optim
from easy_jax.core.config import OptimizerConfig, Reduction
from easy_jax.core.losses import LossFn
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.core.step import StepFn, make_train_step
from easy_jax.core.train_state import TrainState, init_train_state, set_learning_rate
from easy_jax.core.weightings.rule import Weighting
from easy_jax.io import files
from easy_jax.io.code_fingerprint import name_of
from easy_jax.io.metrics_log import MetricsLog
from easy_jax.io.progress import Part
from easy_jax.io.terminal import shown
from easy_jax.io.throughput import Throughput
from easy_jax.models.modes import eval_mode
from easy_jax.parallel import lock, processes, sharding
from easy_jax.train import checkpoint, checks, forward, identity
from easy_jax.train.checkpoint import Checkpointer
from easy_jax.train.config import StageConfig
from easy_jax.train.hooks import (
    Bar,
    Hook,
    Hooks,
    Loop,
    Metrics,
    Speed,
    standard_hooks,
)
from easy_jax.train.identity import ANCHORED
from easy_jax.train.loss_table import LossTable
from easy_jax.train.weights import StageWeights, resolve


@dataclasses.dataclass(frozen=True)
class Fit:
    """Result of a finished training stage.

    Attributes:
      model_state: the trained model's variables, on the mesh.
      steps: number of steps of the stage.
      seconds: time spent in the training loop, over all runs of the stage.
      resumed_from: the step that this call started from; `steps` if nothing was left to do.

    Example:
      >>> result = fit(model, source, "checkpoints", stage=stage, loss_fn=loss_fn)  # doctest: +SKIP
      >>> nnx.update(model, result.model_state)  # doctest: +SKIP
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
    weighting: Weighting | None = None,
    table: LossTable | None = None,
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
    hooks: Sequence[Hook] = (),
) -> Fit:
    """Trains a model on weighted examples; resumes from the latest checkpoint in the directory.

    A finished stage is not trained again: its result is returned. Checkpoints record everything
    that the result depends on (`easy_jax.train.identity`): the model's variables and structure,
    the data, the loss function's code and closed-over values, the trainable parameters, the
    weights, the stage and the seed. Checkpoints of any other run are refused. To compute the
    fingerprint of the data, a source without a method `fingerprint` is read once.

    Args:
      model: the model, in the mode to train it in (`easy_jax.models.train_mode` or `eval_mode`);
        its variables are copied, not changed.
      source: the training data.
      directory: where this stage's checkpoints are written.
      stage: epochs, batches, reduction and optimiser.
      loss_fn: the loss function, `(model, batch) -> (loss_sum_B, count_B)`.
      weight_N: weights by example id; default: 1. NaN leaves an example out.
      token_weight: weights of a packed source's target tokens by example id; default: 1.
      weighting: rule for further weights (`easy_jax.weightings`), which are computed once from
        `table`, or in every step from the current model.
      table: the source's loss table, for weightings that read the frozen model's losses; examples
        that scoring dropped are left out.
      online: computes further weights for every batch, which are multiplied in.
      trainable: NNX filter of the parameters to train.
      anchored: NNX filter of the parameters that the anchor pulls back.
      sfa_beta: if given, after every quarter of the steps the trainable parameters become
        `(1 - beta) * current + beta * starting` (SFA, arXiv:2502.02797).
      seed: random seed of the order of the examples.
      mesh: the device mesh; default: all devices on the data axis.
      name: the stage's name in logs and errors.
      overwrite: whether to delete the checkpoints in the directory and start from step 0.
      log: where metrics and speed are written.
      log_every_steps, save_every_steps: steps between two log entries and two checkpoints.
      keep, keep_best: number of latest checkpoints to keep (with 1, a damaged one has no
        replacement); and whether to keep the one with the lowest mean loss since the checkpoint
        before it, too.
      on_epoch: called with the number of epochs done and the model's variables; may raise
        `Stopped`, and is not called again for that epoch.
      progress: whether to show a progress bar on standard error (outside terminals and notebooks,
        one line per minute); or a function that is called with the number of steps done since
        the last call.
      on_speed: called every `log_every_steps` with `examples_per_second`, `steps_per_second` and
        `input_wait`, the share of time in which the devices waited for data
        (`easy_jax.io.throughput`).
      hooks: further hooks (`easy_jax.train.hooks.Hook`), called after those of `fit` itself.

    Raises:
      TrainingError: the loss, its gradient, or a value that is about to be saved, is not finite.
      ContractError: the model is not a Flax NNX module; or the loss function does not return
        losses and counts, or its losses depend on the other examples of the batch.
      CheckpointError: the directory has a checkpoint of another run (the message names what
        differs), or cannot be written.
      LockError: another run is using the directory, or has taken it over.
      DisagreementError: processes differ in their data, weights or checkpoints.
      Stopped: the process received a SIGTERM; the state is saved (`processes.stop_on_sigterm`).
      ConfigError, DataError: the loader or the mesh refuses an argument, or the head has other
        classes than the data (`easy_jax.train.compatibility`).

    Warns:
      InputBoundWarning: the devices spend more than a fifth of the time waiting for data.
      LostUpdatesWarning: the learning rate is too small for the precision of most parameters.

    Example:
      >>> import tempfile
      >>> from easy_jax.core.losses import squared_error
      >>> from easy_jax.train.config import StageConfig
      >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> source = data.ArraySource({"x": np.ones((16, 1), "f"), "y": np.ones((16, 1), "f")})
      >>> result = fit(model, source, tempfile.mkdtemp(), stage=StageConfig(epochs=2, batch_size=8),
      ...              loss_fn=lambda model, batch: squared_error(model(batch["x"]), batch["y"]))
      >>> result.steps
      4
    """
    checks.check_call("fit", model, source)
    mesh = sharding.make_mesh() if mesh is None else mesh
    given = StageWeights(weight_N, token_weight)
    is_online = online is not None
    weights = resolve(weighting, table, source, given, online=is_online, seed=seed)
    loader = _loader(source, stage, weights, seed, mesh, name)
    checks.check_match(model, source, loss_fn, weights.used_N())
    optional = {"trainable": trainable, "anchored": anchored, "sfa_beta": sfa_beta, "seed": seed}
    run = identity.of_stage(model, source, stage, loss_fn, weights, online, **optional)
    if table is not None:
        table.check(data=run["the training data"])
    if overwrite:
        processes.broadcast(f"the start of {name}", lambda: checkpoint.clear(directory))
    rule = weights.weighting
    steps = loader.steps
    state, train_step = _start(model, loss_fn, stage, run, trainable, anchored, rule, steps, mesh)
    speed = Speed(
        log, log_every_steps, weights.mean_batch(source, stage.epochs, loader.steps), on_speed
    )
    with (
        contextlib.closing(iter(loader)) as batches,
        Checkpointer(directory, run, keep, keep_best) as checkpointer,
        shown(progress, name, "steps", quiet=not processes.is_main_process()) as part,
    ):
        loop = Loop(name, loader.steps, stage.epochs, state)
        _restore(loop, checkpointer, batches, run)
        saving = _Saving(checkpointer, batches, save_every_steps, Metrics(log, log_every_steps))
        place = functools.partial(_placed, online=online, mesh=mesh)
        check = functools.partial(_check_first_batch, model, loss_fn, run, stage, mesh)
        own = standard_hooks(state, sfa_beta, saving.metrics, speed, Bar(part), on_epoch)
        return _train(loop, batches, train_step, place, check, saving, Hooks([*own, *hooks]))


def _train(
    loop: Loop,
    batches: Iterator[dict[str, np.ndarray]],
    train_step: StepFn,
    place: Callable[[dict[str, np.ndarray], Loop], Mapping[str, jax.Array]],
    check: Callable[[TrainState, dict[str, np.ndarray]], None],
    saving: "_Saving",
    hooks: Hook,
) -> Fit:
    """Runs the training loop from step `loop.first` to `loop.total`, or until it is stopped."""
    hooks.on_start(loop)
    loop.throughput = Throughput(loop.name)
    loop.restart_clock()
    with jax.transfer_guard("disallow"):
        for step in range(loop.first + 1, loop.total + 1):
            loop.step = step
            batch = loop.throughput.fetch(batches)
            if loop.step == 1:
                check(loop.state, batch)
            loop.state, loop.metrics = train_step(loop.state, place(batch, loop))
            hooks.on_step(loop)
            if loop.ends_epoch():
                hooks.on_epoch(loop)
            loop.stopped = loop.stopped or processes.should_stop(f"{loop.name}, step {loop.step}")
            if saving.is_due(loop):
                hooks.on_save(loop)
                saving.save(loop)
            if loop.stopped:
                break
    hooks.on_stop(loop)
    if loop.stopped:
        raise processes.Stopped(
            f"{loop.name}: stopped after step {loop.step} of {loop.total}, which is saved"
        )
    return Fit(loop.state.model_state(), loop.total, loop.saved_seconds, loop.first)


def _loader(
    source: data.AnySource,
    stage: StageConfig,
    weights: StageWeights,
    seed: int,
    mesh: Mesh,
    name: str,
) -> data.Loader:
    sharding.check_batch_size(stage.batch_size // stage.micro_batches, mesh, f"{name} batch_size")
    return data.training_loader(
        source,
        stage.batch_size,
        epochs=stage.epochs,
        seed=seed,
        weight_N=weights.weight_N,
        token_weight=weights.token_weight,
        frozen_nll=weights.frozen_nll,
        rows=sharding.process_rows(stage.batch_size, mesh),
    )


def _start(
    model: nnx.Module,
    loss_fn: LossFn,
    stage: StageConfig,
    run: dict[str, Any],
    trainable: Any,
    anchored: Callable[[Any, Any], bool] | None,
    weighting: Weighting | None,
    total_steps: int,
    mesh: Mesh,
) -> tuple[TrainState, StepFn]:
    """Returns the state before the first step, on the mesh, and the compiled step."""
    rate = stage.optimizer.learning_rate
    optimizer, train_step = _compiled(
        nnx.graphdef(model),
        loss_fn,
        anchored,
        weighting,
        (run["the loss function"], run[ANCHORED], run.get("the weighting")),
        dataclasses.replace(stage.optimizer, learning_rate=0.0),
        total_steps,
        stage.reduction,
        stage.micro_batches,
        mesh,
    )
    state = init_train_state(model, optimizer, trainable=trainable, mesh=mesh)
    optim.warn_of_lost_updates(state.params, rate)
    return set_learning_rate(state, rate, mesh), train_step


def _restore(
    loop: Loop, checkpointer: Checkpointer, batches: Iterator[Any], run: dict[str, Any]
) -> None:
    """Restores the latest checkpoint, if there is one; its step must be equal in all processes."""
    latest = checkpointer.latest_step()
    processes.assert_equal_across_processes(
        f"the start of {loop.name}", **{**run, "steps": loop.total, "checkpoint": latest}
    )
    if latest is not None:
        loop.state, saved = checkpointer.restore(loop.state, batches)
        loop.first = int(jax.device_get(loop.state.step))
        loop.seconds = loop.saved_seconds = saved["seconds"]


def _placed(
    batch: dict[str, np.ndarray], loop: Loop, *, online: OnlineWeights | None, mesh: Mesh
) -> Mapping[str, jax.Array]:
    """Returns a batch on the devices, with the weights of `online`; stores its ids in `loop`."""
    loop.example_id = batch.pop("example_id")
    weights = [batch[name] for name in ("weight", "token_weight") if name in batch]
    loop.weightless = online is not None or not all(weight.any() for weight in weights)
    placed = sharding.shard_batch(batch, mesh)
    return placed if online is None else online(placed)


@dataclasses.dataclass(frozen=True)
class _Saving:
    """Schedule and writer of the checkpoints."""

    checkpointer: Checkpointer
    batches: Iterator[Any]
    every: int
    metrics: Metrics

    def is_due(self, loop: Loop) -> bool:
        return loop.stopped or loop.step % self.every == 0 or loop.step == loop.total

    def save(self, loop: Loop) -> None:
        loop.saved_seconds = loop.elapsed()
        with jax.transfer_guard("allow"):
            checks.check_finite(loop.name, loop.step, loop.state)
            seconds, mean = {"seconds": loop.saved_seconds}, self.metrics.mean_loss()
            self.checkpointer.save(loop.state, self.batches, loop.step, seconds, mean)
        loop.throughput.restart()


@functools.lru_cache(maxsize=32)
def _compiled(
    graphdef: nnx.GraphDef[Any],
    loss_fn: LossFn,
    anchored: Callable[[Any, Any], bool] | None,
    weighting: Weighting | None,
    fingerprints: tuple[str | None, ...],  # of the objects above, whose behaviour may change
    optimizer_config: OptimizerConfig,
    total_steps: int,
    reduction: Reduction,
    micro_batches: int,
    mesh: Mesh,
) -> tuple[optax.GradientTransformation, StepFn]:
    """Returns optimiser and jitted step; stages with other learning rates or weights share them."""
    del fingerprints
    refresh_steps = 0 if weighting is None else weighting.old_steps()
    optimizer = optim.make_optimizer(optimizer_config, total_steps, anchored, refresh_steps)
    step = make_train_step(
        graphdef,
        loss_fn,
        optimizer,
        reduction=reduction,
        weighting=weighting,
        micro_batches=micro_batches,
        mesh=mesh,
    )
    return optimizer, step


def _check_first_batch(
    model: nnx.Module,
    loss_fn: LossFn,
    run: dict[str, Any],
    stage: StageConfig,
    mesh: Mesh,
    state: TrainState,
    batch: dict[str, np.ndarray],
) -> None:
    """Checks, in eval mode (no BatchNorm statistics), that the loss function is per example."""
    if contract.knows(model, loss_fn):
        return
    graphdef = nnx.graphdef(eval_mode(model))
    score_step = forward.make_score_step(graphdef, loss_fn, mesh, run["the loss function"])
    rows = len(batch["mask"]) // stage.micro_batches  # as many as training has memory for
    part = {name: array[:rows] for name, array in batch.items()}
    forward.check_first_batch(score_step, state.model_state(), part, mesh, name_of(loss_fn))
