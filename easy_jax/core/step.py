"""The weighted training step: the one place where per-example losses are reduced.

With per-example losses `(nll_sum_i, count_i)`, weights w_i and mask m_i of a global batch:

  token_mean    sum m w nll_sum / sum m count          the paper's language objective
  example_mean  sum m w nll_sum/count / sum m          its vision objective
  weight_mean   sum m w nll_sum / sum m w count        re-weighting without a smaller step

The denominators do not depend on the parameters, so gradients of the numerator are summed
over micro-batches and devices and divided once: any split gives the same gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from easy_jax.core import contract
from easy_jax.core.config import Reduction
from easy_jax.core.losses import LossFn, WeightedSumLoss
from easy_jax.parallel import sharding

Metrics = dict[str, jax.Array]
StepFn = Callable[["TrainState", Mapping[str, jax.Array]], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a training step reads and writes.

    Attributes:
      step: int32 scalar, steps taken.
      params: the trainable parameters, what the optimiser sees.
      rest: frozen parameters and other variables, such as BatchNorm's statistics.
      opt_state: the optimiser's state, for `params` only.

    Example:
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> state = init_train_state(model, optax.sgd(0.1), trainable=nnx.PathContains("kernel"))
      >>> sorted(state.params), sorted(state.model_state())
      (['kernel'], ['bias', 'kernel'])
    """

    step: jax.Array
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState

    def model_state(self) -> nnx.State:
        """Parameters and other variables together, as `nnx.split(model)` would give them."""
        return nnx.merge_state(self.params, self.rest)


def init_train_state(
    model: nnx.Module | nnx.State,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Any = nnx.Param,
    mesh: Mesh | None = None,
) -> TrainState:
    """A training state on the mesh, made of *copies*: the model given stays as it is.

    Args:
      model: a module, or the state of one.
      optimizer: for the trainable parameters.
      trainable: NNX filter; everything else is frozen.
      mesh: default: all devices on the data axis.

    Raises:
      ValueError: the filter selects no parameter.

    Example:
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> int(init_train_state(model, optax.sgd(0.1)).step)
      0
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    model_state = model if isinstance(model, nnx.State) else nnx.state(model)
    params, rest = nnx.split_state(model_state, trainable, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"the filter {trainable!r} selects no parameter to train")

    return _make_init(optimizer, mesh)(params, rest)


@functools.lru_cache(maxsize=32)
def _make_init(
    optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[nnx.State, nnx.State], TrainState]:
    """Jitted `(params, rest) -> TrainState`; cached, so that a sweep compiles it once."""

    def make(params: nnx.State, rest: nnx.State) -> TrainState:
        # Copies, because jit hands unchanged inputs back and the step will donate them.
        params, rest = jax.tree.map(jnp.copy, (params, rest))
        return TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))

    return sharding.jit_init(make, mesh)


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    reduction: Reduction,
    micro_batches: int = 1,
    mesh: Mesh | None = None,
) -> StepFn:
    """One jitted weighted step; the state is donated.

    Args:
      graphdef: of the model in the mode to train it in (`model.train()`, then `nnx.split`).
      loss_fn: `(model, batch) -> (loss_sum_B, count_B)`, unreduced (losses alone count 1 each);
        [rows, segments] of packed text, and so are `weight` and `mask` below. Examples of weight 0
        are masked in the batch that it is given, as padding is.
      optimizer: the one given to `init_train_state`.
      reduction: see the module's docstring. Where every weight or count of a batch is
        zero the loss and its gradient are 0.
      micro_batches: split a batch and accumulate; BatchNorm sees one micro-batch at a time.
      mesh: where state and batches will be, for models that shard their computation by hand;
        without it the compiler decides. On a mesh of CPUs the step has compiler options, with
        which JAX lets no other `jit` call it.

    Returns:
      `step(state, batch) -> (state, metrics)`. A batch has the loss's fields and `weight`
      (float) and `mask` (bool), [B]. Metrics are scalars: `loss`, the weighted one, and
      `grad_norm`, of its gradient, before the optimiser.

    Raises:
      ValueError: an unknown reduction; while tracing, a batch that does not divide into
        micro-batches.
      ContractError: while tracing, a loss function that returns anything else.

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
    if reduction not in ("token_mean", "example_mean", "weight_mean"):
        raise ValueError(f"unknown reduction {reduction!r}")

    def per_example(
        params: nnx.State, rest: nnx.State, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array, nnx.State]:
        # copy=True: variables of an outer trace cannot be written, and BatchNorm writes.
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss_sum_B, count_B = contract.call(loss_fn, model, batch)
        return loss_sum_B, count_B, _like(rest, nnx.state(model))

    if reduction == "token_mean":
        per_example = jax.jit(per_example)  # called twice, traced once

    def numerator(
        params: nnx.State, rest: nnx.State, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, nnx.State]]:
        def coefficients(count_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            chex.assert_equal_shape([count_B, batch["weight"], batch["mask"]])
            return _coefficients(count_B, batch["weight"], batch["mask"], reduction)

        if isinstance(loss_fn, WeightedSumLoss):
            model = nnx.merge(graphdef, params, rest, copy=True)
            total, size = loss_fn.weighted_sum(model, batch, coefficients)
            return total, (size, _like(rest, nnx.state(model)))
        loss_sum_B, count_B, new_rest = per_example(params, rest, _without_removed(batch))
        if reduction == "token_mean":  # its denominator counts an example of weight 0 all the same
            count_B = per_example(jax.lax.stop_gradient(params), rest, batch)[1]
        coefficient_B, size = coefficients(count_B)
        # where, not a product: the loss of what is removed may be anything, NaN included.
        total = jnp.sum(jnp.where(coefficient_B != 0, coefficient_B * loss_sum_B, 0.0))
        return total, (size, new_rest)

    def accumulate(
        state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array, nnx.State, nnx.State]:
        gradient = jax.value_and_grad(numerator, has_aux=True)
        if micro_batches == 1:
            (total, (size, rest)), grads = gradient(state.params, state.rest, batch)
            return total, size, rest, grads

        def one(carry: Any, micro_batch: Mapping[str, jax.Array]) -> tuple[Any, None]:
            total, size, rest, grads = carry
            (more, (more_size, rest)), more_grads = gradient(state.params, rest, micro_batch)
            grads = jax.tree.map(jnp.add, grads, more_grads)
            return (total + more, size + more_size, rest, grads), None

        zero = jnp.zeros((), jnp.float32)
        start = (zero, zero, state.rest, jax.tree.map(jnp.zeros_like, state.params))
        result, _ = jax.lax.scan(one, start, _split(batch, micro_batches))
        return result

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        with sharding.tracing_on(mesh):
            total, size, rest, grads = accumulate(state, batch)
        denominator = jnp.where(size > 0, size, 1.0)
        grads = jax.tree.map(lambda g: g / denominator.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total / denominator, "grad_norm": optax.tree.norm(grads)}
        state = TrainState(state.step + 1, params, rest, opt_state)
        if mesh is not None:
            # Else XLA may lay small parameters out anew, and the next step is compiled again.
            state = jax.lax.with_sharding_constraint(state, sharding.tree_shardings(state, mesh))
        return state, metrics

    options = sharding.compiler_options(mesh)
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def _coefficients(
    count_B: jax.Array, weight_B: jax.Array, mask_B: jax.Array, reduction: Reduction
) -> tuple[jax.Array, jax.Array]:
    """What a reduction multiplies each nll_sum by, and what it divides the sum by."""
    count_B = jnp.where(mask_B, count_B, 0.0)
    weight_B = jnp.where(mask_B, weight_B, 0.0)
    if reduction == "token_mean":
        return weight_B, jnp.sum(count_B)
    if reduction == "example_mean":
        return weight_B / jnp.where(count_B > 0, count_B, 1.0), jnp.sum(mask_B, dtype=jnp.float32)
    return weight_B, jnp.sum(weight_B * count_B)


def _without_removed(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with examples of weight 0 masked like padding, and their content taken out.

    A factor of 0 alone does not remove an example: its infinite loss or gradient times 0 is NaN.
    Floats become 1 and integers 0, which is no place where a logarithm or a root goes wrong. Rows
    of packed text hold several examples; there only the mask knows.
    """
    seen = batch["mask"] & (batch["weight"] != 0)
    cleaned = {**batch, "mask": seen}
    for name, array in batch.items():
        if seen.ndim == 1 and array.dtype != jnp.bool_ and name != "weight":
            fill = jnp.asarray(jnp.issubdtype(array.dtype, jnp.floating), array.dtype)
            cleaned[name] = jnp.where(seen.reshape(-1, *[1] * (array.ndim - 1)), array, fill)
    return cleaned


def _split(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """[B, ...] -> [parts, B / parts, ...] such that no example leaves its device.

    Micro-batch m takes the examples m, m + parts, ...: the sharded leading axis stays the
    leading axis of the reshape, and each device holds a share of every micro-batch.
    """
    split = {}
    for name, array in batch.items():
        if array.shape[0] % parts:
            raise ValueError(f"a batch of {array.shape[0]} does not divide into {parts}")
        shape = (array.shape[0] // parts, parts, *array.shape[1:])
        split[name] = jnp.swapaxes(array.reshape(shape), 0, 1)
    return split


def _like(rest: nnx.State, full: nnx.State) -> nnx.State:
    """The variables of `full` at the paths of `rest`."""
    values = dict(nnx.to_flat_state(full))
    return nnx.from_flat_state([(path, values[path]) for path, _ in nnx.to_flat_state(rest)])
