"""Lowering of steps for a topology, without weights or data, for language and image models."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from easy_jax.core.step import TrainState
from easy_jax.parallel import sharding

STEPS = 1000  # length of the learning-rate schedule, a constant that does not affect the cost


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered step, and what its measurements need.

    Attributes:
      name: `train` with the kind of step, or `score`.
      lowered: the result of `jax.jit(...).lower`.
      state: abstract state with shardings: a `TrainState`, or the model's variables.
      rows: rows of the global batch.
      activation_bytes: bytes that a chip keeps from the forward pass for the backward pass.
      model_flops: operations of a step over all chips, by formula.
      resident_bytes: bytes of models that an experiment keeps in memory besides the state.
    """

    name: str
    lowered: Any
    state: Any
    rows: int
    activation_bytes: float
    model_flops: float
    resident_bytes: float


@dataclasses.dataclass(frozen=True)
class Lowering:
    """A step of a configuration that can be lowered.

    Attributes:
      lower: function from the rows of a global batch to the program.
      rows, micro_batches: batch size and number of micro-batches in the configuration.
    """

    lower: Callable[[int], Program]
    rows: int
    micro_batches: int = 1


@dataclasses.dataclass(frozen=True)
class Suite:
    """All steps of a configuration, with the name of its model and a description of a row."""

    model: str
    row: str
    lowerings: list[Lowering]


def tree_bytes(tree: Any) -> float:
    """Returns the bytes of a tree of abstract arrays on one chip."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def placed(tree: Any, mesh: Mesh) -> Any:
    """Returns abstract arrays with the shardings that a state has on the mesh."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        sharding.tree_shardings(tree, mesh),
    )


def train_state(
    states: Sequence[nnx.State], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the abstract state of a training step, from trainable and other variables."""
    params, rest = states
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, params)
    state: TrainState = placed(TrainState(scalar, params, rest, opt_state), mesh)
    return state


def batch_of(
    rows: int, mesh: Mesh, fields: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract global batch, from the shape of a row and the dtype of every field.

    Raises:
      ConfigError: the rows do not divide over the mesh.
    """
    sharding.check_batch_size(rows, mesh, "the batch")
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)
        for name, (shape, dtype) in fields.items()
    }


def activation_bytes(
    forward: Callable[[Any, Any, Any], jax.Array],
    state: TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    micro_batches: int,
    mesh: Mesh,
    is_activation: Callable[[tuple[int, ...], int], bool],
) -> float:
    """Returns the bytes that differentiation of a micro-batch keeps on a chip, before XLA.

    Args:
      forward: `(params, non_trainable, batch) -> array`, the part of the step that is counted.
      state, batch: abstract inputs of the step.
      micro_batches: number of parts of the batch.
      mesh: mesh over which activations are sharded like the batch.
      is_activation: `(shape, rows of the micro-batch) -> bool`; other arrays are parameters.
    """
    micro = {
        name: jax.ShapeDtypeStruct((x.shape[0] // micro_batches, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
    }
    (rows,) = {x.shape[0] for x in micro.values()}

    def backward(params: Any, rest: Any, batch: Any) -> Any:
        return jax.vjp(lambda params: forward(params, rest, batch), params)[1]

    with sharding.tracing_on(mesh):
        kept = jax.tree.leaves(jax.eval_shape(backward, state.params, state.non_trainable, micro))
    total = sum(x.size * x.dtype.itemsize for x in kept if is_activation(x.shape, rows))
    return float(total / sharding.num_shares(mesh))
