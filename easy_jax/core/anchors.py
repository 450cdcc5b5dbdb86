"""Anchors: distances to the weights at the start, whose gradient pulls the parameters back.

An anchor is one function of the difference to the start, `value(difference) -> scalar`; the
distance is its sum over the arrays of parameters. A new one is such a function, registered here
or in a file of its own that is imported here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from easy_jax.core.config import FORMER_ANCHORS
from easy_jax.io.registry import Registry

Distance = Callable[[jax.Array], jax.Array]
ANCHORS: Registry[Distance] = Registry("anchor")
# Directories and checkpoints have the names of version 0.1.
_STORED = {now: former for former, now in FORMER_ANCHORS.items()}


@ANCHORS.register("none")
def no_distance(difference: jax.Array) -> jax.Array:
    """0: the parameters are free."""
    return jnp.zeros((), difference.dtype)


@ANCHORS.register("l1_sp", former=(_STORED["l1_sp"],))
def l1_distance(difference: jax.Array) -> jax.Array:
    """The sum of |theta - theta*| (arXiv:2502.02797).

    Example:
      >>> float(l1_distance(jnp.array([1.0, -2.0])))
      3.0
    """
    return jnp.sum(jnp.abs(difference))


@ANCHORS.register("l2_sp", former=(_STORED["l2_sp"],))
def l2_distance(difference: jax.Array) -> jax.Array:
    """The sum of (theta - theta*)^2: L2-SP (arXiv:1802.01483; arXiv:2502.02797).

    Example:
      >>> float(l2_distance(jnp.array([1.0, -2.0])))
      5.0
    """
    return jnp.sum(jnp.square(difference))


def stored_name(name: str) -> str:
    """Returns the name of an anchor in paths and identities, which stay when names change.

    Example:
      >>> stored_name("l2_sp"), stored_name("none")
      ('l2', 'none')
    """
    return _STORED.get(name, name)


class AnchorState(NamedTuple):
    """The weights that `anchor` pulls towards; sharded and saved with the optimizer."""

    reference: Any


def anchor(
    name: str,
    strength: float,
    *,
    per_parameter: bool = False,
    anchored: Callable[[Any, Any], bool] | None = None,
) -> optax.GradientTransformation:
    """Adds the gradient of `strength * distance` to the weights at `init`, the pre-trained ones.

    It is a term of the loss, so it stands before momentum or Adam in a chain
    (arXiv:2502.02797).

    Args:
      name: of a registered anchor, such as `l2_sp`.
      strength: lambda, at least 0.
      per_parameter: divide lambda by the number of parameters given to `init`.
      anchored: NNX filter `(path, variable) -> bool`; default: all parameters.

    Returns:
      A gradient transformation; its `update` needs the parameters.

    Raises:
      ConfigError: there is no such anchor.
      ValueError: `update` called without parameters.

    Example:
      >>> pull = anchor("l2_sp", 0.5)
      >>> state = pull.init({"w": jnp.zeros(1)})
      >>> updates, _ = pull.update({"w": jnp.zeros(1)}, state, {"w": jnp.ones(1)})
      >>> float(updates["w"][0])
      1.0
    """
    slope = jax.grad(ANCHORS.find(name))

    def init(params: chex.ArrayTree) -> AnchorState:
        return AnchorState(jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("anchor needs the parameters: optimizer.update(grads, state, params)")
        total = sum(leaf.size for leaf in jax.tree.leaves(params)) if per_parameter else 1
        scale = strength / total

        def pull(path: Any, update: Any, param: Any, reference: Any) -> Any:
            if anchored is not None and not anchored(_nnx_path(path), param):
                return update
            return jax.tree.map(lambda u, p, r: u + scale * slope(p - r), update, param, reference)

        updates = jax.tree_util.tree_map_with_path(
            pull, updates, params, state.reference, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        return updates, state

    return optax.GradientTransformation(init, update)


def _nnx_path(path: Any) -> tuple[Any, ...]:
    """JAX key path -> the path NNX filters see."""
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)
