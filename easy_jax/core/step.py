"""The weighted training step, which reduces per-example losses.

With per-example losses `(loss_sum_i, count_i)`, weights w_i and mask m_i of a global batch:

  token_mean    sum m w loss_sum / sum m count         the language objective of arXiv:2502.02797
  example_mean  sum m w loss_sum/count / sum m         its vision objective
  weight_mean   sum m w loss_sum / sum m w count       weights change the direction of a step only

`_weighted_sum` computes the numerator, and `_coefficients` the factors and the denominator of each
reduction. Denominators do not depend on the parameters, so the gradients of the numerator are
summed over micro-batches and devices and divided once: any split gives the same gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from easy_jax.core import batches, contract, model_weights
from easy_jax.core.anchors import FrozenState, frozen_of
from easy_jax.core.causal_lm import CausalLMLoss
from easy_jax.core.config import Reduction
from easy_jax.core.held_params import OldState, find
from easy_jax.core.losses import ContractError, LossFn, WeightedSumLoss
from easy_jax.core.train_state import TrainState, init_train_state
from easy_jax.core.weightings.rule import Weighting
from easy_jax.io.checks import ConfigError
from easy_jax.io.code_fingerprint import name_of
from easy_jax.parallel import sharding

__all__ = ["Metrics", "StepFn", "TrainState", "init_train_state", "make_train_step"]

Metrics = dict[str, jax.Array]
StepFn = Callable[["TrainState", Mapping[str, jax.Array]], tuple["TrainState", Metrics]]


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    reduction: Reduction,
    weighting: Weighting | None = None,
    micro_batches: int = 1,
    mesh: Mesh | None = None,
) -> StepFn:
    """Returns a jitted weighted training step, which donates the state.

    Args:
      graphdef: graph definition of the model in training mode, `nnx.graphdef(train_mode(model))`,
        or in eval mode, to freeze BatchNorm.
      loss_fn: the unreduced loss function, `(model, batch) -> (loss_sum_B, count_B)`; or
        `loss_sum_B` only, with counts of 1. For packed text both are [rows, segments], as are
        `weight` and `mask`. In its batch, examples of weight 0 are masked like padding.
      optimizer: the optimizer given to `init_train_state`. With `anchor("kl", strength)`, the step
        adds `strength * KL(p0 || p)` to the loss, at the target tokens of examples of a weight
        above 0, averaged by the reduction as losses of weight 1 (by `weight_mean`: as losses).
      reduction: see the module's docstring. If all weights or counts of a batch are 0, so are
        the loss and its gradient.
      weighting: computes further weights from the current model (`easy_jax.weightings`), without
        a gradient through them. If it reads `frozen_nll`, batches must have this field.
      micro_batches: number of parts of a batch whose gradients are accumulated; BatchNorm's
        statistics are those of a part.
      mesh: the device mesh of state and batches. It is required by models that shard their
        computation explicitly; without it the compiler decides. On a mesh of CPUs the step cannot
        be called inside another `jax.jit`.

    Returns:
      `step(state, batch) -> (state, metrics)`. A batch has the fields that the loss reads and
      `weight` (float) and `mask` (bool), [B]. Metrics are scalars: `loss`, weighted and without
      anchors; `grad_norm`, of the gradient before the optimizer; with the anchor `kl` the mean
      divergence `kl`, in nats; and with a weighting those of `model_weights.metrics`.

    Raises:
      ValueError: the reduction is unknown; or, while tracing, a batch does not divide into
        micro-batches.
      ConfigError, ContractError: the weighting needs something that the step or the loss function
        does not provide; or, while tracing, the loss function's result is invalid.

    Example:
      >>> from easy_jax.core.losses import squared_error
      >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.ones((1, 1))
      >>> optimizer = optax.sgd(0.5)
      >>> loss_fn = lambda model, batch: squared_error(model(batch["x"]), batch["y"])
      >>> step = make_train_step(nnx.graphdef(model), loss_fn, optimizer, reduction="example_mean")
      >>> batch = {"x": jnp.ones((1, 1)), "y": jnp.zeros((1, 1)),
      ...          "weight": jnp.ones(1), "mask": jnp.ones(1, bool)}
      >>> mesh = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])
      >>> state, metrics = step(init_train_state(model, optimizer, mesh=mesh), batch)
      >>> float(metrics["loss"])
      1.0
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}")
    if weighting is not None and weighting.level == "none":
        weighting = None
    if weighting is not None:
        model_weights.check(weighting, loss_fn)
    first = weighting if weighting is not None and weighting.needs_pass() else None
    rule = weighting if first is None else None
    gradient = jax.value_and_grad(_weighted_sum(graphdef, loss_fn, reduction, rule), has_aux=True)
    has_old = weighting is not None and "old" in weighting.needs
    before = None if first is None else _first_pass(graphdef, loss_fn, first, micro_batches)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(  # `io.terminal` recognises the compilation by this name
        state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, Metrics]:
        held = _held(loss_fn, state.opt_state, weighting if has_old else None)
        return _step(before, gradient, optimizer, micro_batches, mesh, held, state, batch)

    return jax.jit(step, donate_argnums=0, compiler_options=sharding.compiler_options(mesh))


class _Held(NamedTuple):
    """Parameters of other times that the optimizer's state holds, where the step reads them."""

    frozen: FrozenState | None
    old: nnx.State | None


def _held(loss_fn: LossFn, opt_state: Any, reads_old: Weighting | None) -> _Held:
    frozen = frozen_of(opt_state)
    if frozen is not None and not isinstance(loss_fn, CausalLMLoss):
        raise ContractError(
            "the anchor 'kl' compares distributions over a vocabulary, and "
            f"{name_of(loss_fn)} gives losses only: take causal_lm_loss, or the anchor 'l2_sp'"
        )
    if reads_old is None:
        return _Held(frozen, None)
    old = find(opt_state, OldState)
    if old is None:
        raise ConfigError(
            f"{reads_old} reads the model of earlier steps: put easy_jax.hold_old(8) last in the "
            "optimizer's chain"
        )
    return _Held(frozen, old.params)


def _step(
    before: Callable[..., Any] | None,
    gradient: Callable[..., Any],
    optimizer: optax.GradientTransformationExtraArgs,
    micro_batches: int,
    mesh: Mesh | None,
    held: _Held,
    state: TrainState,
    batch: Mapping[str, jax.Array],
) -> tuple[TrainState, Metrics]:
    with sharding.tracing_on(mesh):
        sums: model_weights.Sums = {}
        if before is not None:
            batch, sums = before(state, held.old, batch)
            held = held._replace(old=None)  # its weights are in the batch now
        total, denominator, non_trainable, more, grads = _accumulate(
            gradient, state, held, batch, micro_batches
        )
    sums = {**more, **sums}
    denominator = jnp.where(denominator > 0, denominator, 1.0)
    grads = jax.tree.map(lambda g: g / denominator.astype(g.dtype), grads)
    has_divergence = {} if held.frozen is None else {"has_divergence": True}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **has_divergence)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": total / denominator, "grad_norm": optax.tree.norm(grads)}
    if held.frozen is not None:
        metrics["kl"] = sums.pop("kl") / denominator
        metrics["loss"] = sums.pop("loss") / denominator
    metrics |= model_weights.metrics(sums)
    state = TrainState(state.step + 1, params, non_trainable, opt_state)
    if mesh is not None:
        # Otherwise XLA may change the layout of small parameters, and the next step recompiles.
        state = jax.lax.with_sharding_constraint(state, sharding.tree_shardings(state, mesh))
    return state, metrics


def _accumulate(
    gradient: Callable[..., Any],
    state: TrainState,
    held: _Held,
    batch: Mapping[str, jax.Array],
    micro_batches: int,
) -> tuple[jax.Array, jax.Array, nnx.State, model_weights.Sums, nnx.State]:
    """Sums numerator, denominator, sums of weights, and gradients over micro-batches.

    Returns:
      `(total, denominator, non_trainable, sums, grads)`; `non_trainable` are the variables after
      the last micro-batch, and `sums` is empty without a weighting.
    """
    if micro_batches == 1:
        (total, (denominator, non_trainable, sums)), grads = gradient(
            state.params, state.non_trainable, batch, held
        )
        return total, denominator, non_trainable, sums, grads

    def add(carry: Any, micro_batch: Mapping[str, jax.Array]) -> tuple[Any, model_weights.Sums]:
        total, denominator, non_trainable, grads = carry
        (more, (more_denominator, non_trainable, sums)), more_grads = gradient(
            state.params, non_trainable, micro_batch, held
        )
        grads = jax.tree.map(jnp.add, grads, more_grads)
        return (total + more, denominator + more_denominator, non_trainable, grads), sums

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, state.non_trainable, jax.tree.map(jnp.zeros_like, state.params))
    result, sums = jax.lax.scan(add, start, batches.split(batch, micro_batches))
    total, denominator, non_trainable, grads = result
    return total, denominator, non_trainable, jax.tree.map(jnp.sum, sums), grads


def _first_pass(
    graphdef: nnx.GraphDef[Any], loss_fn: LossFn, weighting: Weighting, micro_batches: int
) -> Callable[..., tuple[dict[str, jax.Array], Any]]:
    """Returns `(state, old, batch) -> (batch with the weighting's weights, their sums)`."""
    more = weighting.reads_distribution()

    def before(
        state: TrainState, old: nnx.State | None, batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], model_weights.Sums]:
        def stats_of(part: Mapping[str, jax.Array]) -> Any:
            part = batches.without_removed(part)
            if old is not None:
                old_model = nnx.merge(graphdef, old, state.non_trainable, copy=True)
                part = model_weights.with_old_losses(loss_fn, old_model, part)
            model = nnx.merge(graphdef, state.params, state.non_trainable, copy=True)
            return model_weights.statistics(loss_fn, more, model, part)

        if micro_batches == 1:
            stats = stats_of(batch)
        else:
            stats = model_weights.over_micro_batches(stats_of, batches.split(batch, micro_batches))
        stats = dataclasses.replace(jax.lax.stop_gradient(stats), step=state.step)
        return model_weights.weighted_batch(weighting, stats, batch)

    return before


def _weighted_sum(
    graphdef: nnx.GraphDef[Any],
    loss_fn: LossFn,
    reduction: Reduction,
    weighting: Weighting | None = None,
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, nnx.State, model_weights.Sums]]]:
    """Returns the numerator of a reduction, `(params, non_trainable, batch) -> (total, aux)`.

    Losses are multiplied by weights only here: `total = sum_i coefficient_i * loss_sum_i`, with
    the weights of a weighting of the current model as further factors. `aux` is
    `(denominator, non_trainable after the forward pass, sums of the weighting's weights)`.
    """
    is_fused = WeightedSumLoss if weighting is None else CausalLMLoss
    if isinstance(loss_fn, is_fused):
        return _fused_sum(graphdef, loss_fn, reduction, weighting)

    def forward(
        params: nnx.State, non_trainable: nnx.State, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array, Any, nnx.State]:
        # copy=True: variables of an outer trace cannot be written, and BatchNorm writes.
        model = nnx.merge(graphdef, params, non_trainable, copy=True)
        if weighting is None:
            loss_sum_B, count_B = contract.call(loss_fn, model, batch)
            found: Any = loss_sum_B, count_B, None
        else:
            more = weighting.reads_distribution()
            found = model_weights.losses_and_stats(loss_fn, more, model, batch)
        return *found, _like(non_trainable, nnx.state(model))

    if reduction == "token_mean":
        forward = jax.jit(forward)  # called twice, traced once

    def weighted_sum(
        params: nnx.State,
        non_trainable: nnx.State,
        batch: Mapping[str, jax.Array],
        held: _Held,
    ) -> tuple[jax.Array, tuple[jax.Array, nnx.State, model_weights.Sums]]:
        seen = batches.without_removed(batch)
        if held.old is not None:
            old_model = nnx.merge(graphdef, held.old, non_trainable, copy=True)
            seen = model_weights.with_old_losses(loss_fn, old_model, seen)
        loss_sum_B, count_B, stats, updated = forward(params, non_trainable, seen)
        if reduction == "token_mean":
            # The denominator also counts the tokens of examples of weight 0. The compiler removes
            # everything in this second pass that the counts do not need.
            count_B = forward(jax.lax.stop_gradient(params), non_trainable, batch)[1]
        coefficient_B, denominator = _coefficients(reduction, batch, count_B)
        sums = {}
        if weighting is not None:
            weight_B = weighting(stats)
            sums = model_weights.measured(weight_B, stats.mask)
            coefficient_B = coefficient_B * weight_B
        # where, not a product: the loss of an example of weight 0 may be NaN.
        total = jnp.sum(jnp.where(coefficient_B != 0, coefficient_B * loss_sum_B, 0.0))
        return total, (denominator, updated, sums)

    return weighted_sum


def _fused_sum(
    graphdef: nnx.GraphDef[Any],
    loss_fn: LossFn,
    reduction: Reduction,
    weighting: Weighting | None,
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, nnx.State, model_weights.Sums]]]:
    """Returns the numerator for a loss function that computes the weighted sum itself."""

    def fused(
        params: nnx.State,
        non_trainable: nnx.State,
        batch: Mapping[str, jax.Array],
        held: _Held,
    ) -> tuple[jax.Array, tuple[jax.Array, nnx.State, model_weights.Sums]]:
        model = nnx.merge(graphdef, params, non_trainable, copy=True)
        frozen = held.frozen
        of_batch = functools.partial(_coefficients, reduction, batch)
        sums: model_weights.Sums = {}
        if weighting is None and frozen is None:
            assert isinstance(loss_fn, WeightedSumLoss)
            total, denominator = loss_fn.weighted_sum(model, batch, of_batch)
            return total, (denominator, _like(non_trainable, nnx.state(model)), sums)
        assert isinstance(loss_fn, CausalLMLoss)
        options: dict[str, Any] = {}
        if weighting is not None:
            options |= {"rule": weighting, "more": weighting.reads_distribution()}
        if held.old is not None:
            old_model = nnx.merge(graphdef, held.old, non_trainable, copy=True)
            batch = model_weights.with_old_losses(loss_fn, old_model, batch)
        if frozen is not None:
            options["frozen"] = nnx.merge(graphdef, frozen.reference, non_trainable, copy=True)
            options["kl_strength"] = frozen.strength
            options["kl_coefficients"] = functools.partial(_kl_coefficients, reduction, batch)
        found = loss_fn.sums(model, batch, of_batch, **options)
        if found.rule_RT is not None:
            sums = model_weights.measured(found.rule_RT, found.seen_RT)
        if found.kl is not None:
            sums |= {"kl": jax.lax.stop_gradient(found.kl), "loss": found.loss}
        return found.total, (found.denominator, _like(non_trainable, nnx.state(model)), sums)

    return fused


def _coefficients(
    reduction: Reduction, batch: Mapping[str, jax.Array], count_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the factors by which a reduction multiplies each loss_sum, and its denominator."""
    weight_B, mask_B = batch["weight"], batch["mask"]
    chex.assert_equal_shape([count_B, weight_B, mask_B])
    count_B = jnp.where(mask_B, count_B, 0.0)
    weight_B = jnp.where(mask_B, weight_B, 0.0)
    if reduction == "token_mean":
        return weight_B, jnp.sum(count_B)
    if reduction == "example_mean":
        return weight_B / jnp.where(count_B > 0, count_B, 1.0), jnp.sum(mask_B, dtype=jnp.float32)
    return weight_B, jnp.sum(weight_B * count_B)


def _kl_coefficients(
    reduction: Reduction, batch: Mapping[str, jax.Array], count_B: jax.Array
) -> jax.Array:
    """Returns the factors by which a reduction multiplies each example's sum of divergences."""
    if reduction != "weight_mean":
        batch = {**batch, "weight": (batch["weight"] != 0).astype(jnp.float32)}
    return _coefficients(reduction, batch, count_B)[0]


def _like(state: nnx.State, full: nnx.State) -> nnx.State:
    """Returns the variables of `full` at the paths of `state`."""
    values = dict(nnx.to_flat_state(full))
    return nnx.from_flat_state([(path, values[path]) for path, _ in nnx.to_flat_state(state)])
