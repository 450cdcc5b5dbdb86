"""The train state: step, parameters, other variables and optimizer state."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from easy_jax.core.merge import average_of
from easy_jax.parallel import sharding


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step reads and writes; a JAX pytree.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: the trainable parameters, which the optimizer updates.
      non_trainable: frozen parameters and other variables, such as BatchNorm's statistics.
      opt_state: the optimizer's state, for `params` only.

    Example:
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> state = init_train_state(model, optax.sgd(0.1), trainable=nnx.PathContains("kernel"))
      >>> sorted(state.params), sorted(state.model_state())
      (['kernel'], ['bias', 'kernel'])
    """

    step: jax.Array
    params: nnx.State
    non_trainable: nnx.State
    opt_state: optax.OptState

    def model_state(self) -> nnx.State:
        """Returns all variables of the model, as `nnx.state(model)` does.

        If the optimizer averages the parameters (`easy_jax.core.merge.ema`), these are the average.
        """
        average = average_of(self.opt_state)
        params = self.params if average is None else average
        return nnx.merge_state(params, self.non_trainable)

    @property
    def rest(self) -> nnx.State:
        """The former name of `non_trainable`."""
        message = "TrainState.rest is now TrainState.non_trainable"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.non_trainable

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        """Returns the fields under the keys that they have in checkpoints and fingerprints."""
        values = (self.step, self.params, self.non_trainable, self.opt_state)
        keys = map(jax.tree_util.GetAttrKey, ("step", "params", "rest", "opt_state"))
        return tuple(zip(keys, values, strict=True)), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, ...]) -> "TrainState":
        """Creates a state from the children that `tree_flatten_with_keys` returned."""
        del aux
        return cls(*children)


def init_train_state(
    model: nnx.Module | nnx.State,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Any = nnx.Param,
    mesh: Mesh | None = None,
) -> TrainState:
    """Copies a model's variables onto the mesh and initialises the optimizer.

    Args:
      model: a module or its state; it is not changed.
      optimizer: the optimizer of the trainable parameters.
      trainable: NNX filter of the trainable parameters; all others are frozen.
      mesh: the device mesh; default: all devices on the data axis.

    Raises:
      ValueError: the filter selects no parameter.

    Example:
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> int(init_train_state(model, optax.sgd(0.1)).step)
      0
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    model_state = model if isinstance(model, nnx.State) else nnx.state(model)
    params, non_trainable = nnx.split_state(model_state, trainable, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"the filter {trainable!r} selects no parameter to train")

    return _make_init(optimizer, mesh)(params, non_trainable)


@functools.lru_cache(maxsize=32)
def _make_init(
    optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[nnx.State, nnx.State], TrainState]:
    """Returns the jitted `(params, non_trainable) -> TrainState`; a sweep compiles it once."""

    def make(params: nnx.State, non_trainable: nnx.State) -> TrainState:
        # Copies, because jit returns unchanged inputs as they are, and the step donates its state.
        params, non_trainable = jax.tree.map(jnp.copy, (params, non_trainable))
        return TrainState(jnp.zeros((), jnp.int32), params, non_trainable, optimizer.init(params))

    return sharding.jit_init(make, mesh)


def set_learning_rate(state: TrainState, learning_rate: float, mesh: Mesh) -> TrainState:
    """Sets the peak learning rate in the optimizer's state (see `optim.make_optimizer`)."""
    rate = jax.device_put(np.float32(learning_rate), sharding.replicated(mesh))
    opt_state: Any = state.opt_state
    opt_state = opt_state._replace(hyperparams={"learning_rate": rate})
    return dataclasses.replace(state, opt_state=opt_state)
