"""Anchors: distances to the model at the start, whose gradient pulls the parameters back.

An anchor to the weights is a function of the difference to the start, `value(difference) ->
scalar`; the distance is its sum over the arrays of parameters. To add one, register such a
function here or in a module that is imported here. The anchor `kl` is a distance between
distributions: the optimizer's state holds the parameters at the start, and the training step
computes the divergence in the head (`easy_jax.kernels.divergence`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from easy_jax.core.config import FORMER_ANCHORS
from easy_jax.core.held_params import find_all
from easy_jax.io.registry import Registry

Distance = Callable[[jax.Array], jax.Array]


class Divergence:
    """Marker of an anchor to the distribution of the model at the start, not to its weights."""


ANCHORS: Registry[Distance | Divergence] = Registry("anchor")
# Directories and checkpoints use the names of version 0.1.
_STORED = {now: former for former, now in FORMER_ANCHORS.items()}


@ANCHORS.register("none")
def no_distance(difference: jax.Array) -> jax.Array:
    """Returns 0: the parameters are not pulled."""
    return jnp.zeros((), difference.dtype)


@ANCHORS.register("l1_sp", former=(_STORED["l1_sp"],))
def l1_distance(difference: jax.Array) -> jax.Array:
    """Returns the sum of |theta - theta*| (arXiv:2502.02797).

    Example:
      >>> float(l1_distance(jnp.array([1.0, -2.0])))
      3.0
    """
    return jnp.sum(jnp.abs(difference))


@ANCHORS.register("l2_sp", former=(_STORED["l2_sp"],))
def l2_distance(difference: jax.Array) -> jax.Array:
    """Returns the sum of (theta - theta*)^2: L2-SP (arXiv:1802.01483; arXiv:2502.02797).

    Example:
      >>> float(l2_distance(jnp.array([1.0, -2.0])))
      5.0
    """
    return jnp.sum(jnp.square(difference))


ANCHORS.register("kl")(Divergence())


def stored_name(name: str) -> str:
    """Returns the name of an anchor in paths and identities, where renamed anchors keep theirs.

    Example:
      >>> stored_name("l2_sp"), stored_name("none")
      ('l2', 'none')
    """
    return _STORED.get(name, name)


class AnchorState(NamedTuple):
    """Optimizer state with the weights that `anchor` pulls the parameters towards."""

    reference: Any


class FrozenState(NamedTuple):
    """Optimizer state of the anchor `kl`: the parameters at the start and the KL's factor."""

    reference: Any
    strength: jax.Array


def anchor(
    name: str,
    strength: float,
    *,
    per_parameter: bool = False,
    anchored: Callable[[Any, Any], bool] | None = None,
) -> optax.GradientTransformation:
    """Adds the gradient of `strength * distance`, the distance to the parameters at `init`.

    The distance is a term of the loss, so the anchor must come before momentum or Adam in a chain
    (arXiv:2502.02797).

    With `kl` the term is `strength * KL(p0 || p)`, averaged as the reduction averages losses, where
    p0 is the model's distribution with the parameters at `init`; with low-rank adapters, which
    have no effect at `init`, it is that of the base model. The term is computed in the step of
    `make_train_step` with `causal_lm_loss`. With DFT's weights this is ASFT (arXiv:2509.23753).

    Args:
      name: the name of a registered anchor, such as `l2_sp`.
      strength: lambda, at least 0. With `kl` and `optax.inject_hyperparams`, a new value takes
        effect one step later.
      per_parameter: whether to divide lambda by the number of parameters; not for `kl`.
      anchored: NNX filter `(path, variable) -> bool` of the parameters that are pulled; default:
        all parameters; not for `kl`.

    Returns:
      A gradient transformation; its `update` needs the parameters.

    Raises:
      ConfigError: there is no such anchor.
      ValueError: `update` is called without parameters; or, with `kl`, by another step than that
        of `make_train_step`, which would not add the divergence.

    Example:
      >>> pull = anchor("l2_sp", 0.5)
      >>> state = pull.init({"w": jnp.zeros(1)})
      >>> updates, _ = pull.update({"w": jnp.zeros(1)}, state, {"w": jnp.ones(1)})
      >>> float(updates["w"][0])
      1.0
    """
    if isinstance(strength, int | float) and not 0 <= strength < math.inf:
        raise ValueError(f"strength is {strength}; it must be finite and at least 0")
    distance = ANCHORS.find(name)
    if isinstance(distance, Divergence):
        if anchored is not None:
            raise ValueError(f"the anchor {name!r} is of the whole model: it takes no `anchored`")
        return _divergence(name, strength)
    slope = jax.grad(distance)

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


def _divergence(name: str, strength: float) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that holds the parameters at `init` for the training step."""

    def init(params: chex.ArrayTree) -> FrozenState:
        return FrozenState(jax.tree.map(jnp.copy, params), jnp.asarray(strength, jnp.float32))

    def update(
        updates: Any, state: Any, params: Any = None, *, has_divergence: bool = False, **others: Any
    ) -> tuple[Any, Any]:
        del params, others
        if not has_divergence:
            raise ValueError(
                f"the anchor {name!r} is computed in the step of make_train_step; this step does "
                "not, or a wrapper hides it from the anchor: put it outside of optax.MultiSteps"
            )
        return updates, state._replace(strength=jnp.asarray(strength, jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)


def frozen_of(opt_state: Any) -> FrozenState | None:
    """Returns the state of the anchor `kl` in an optimizer's state; None without that anchor.

    Example:
      >>> state = optax.chain(anchor("kl", 0.5), optax.sgd(0.1)).init({"w": jnp.ones(1)})
      >>> found = frozen_of(state)
      >>> float(found.strength), frozen_of(optax.sgd(0.1).init({"w": jnp.ones(1)}))
      (0.5, None)
    """
    found = find_all(opt_state, FrozenState)
    if len(found) > 1:
        raise ValueError(
            f"the optimizer has {len(found)} anchors 'kl'; give one with the sum of their strengths"
        )
    if found and any(isinstance(leaf, optax.MaskedNode) for leaf in _nodes(found[0].reference)):
        raise ValueError("the anchor 'kl' is of the whole model: put it outside of optax.masked")
    return found[0] if found else None


def _nodes(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _nnx_path(path: Any) -> tuple[Any, ...]:
    """Converts a JAX key path to a path for NNX filters."""
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)
