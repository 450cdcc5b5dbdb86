"""Parameters of an earlier step, held in the optimizer's state.

There they are sharded like the parameters and saved with them, so that a resumed run is
bit-identical to an uninterrupted one.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

State = TypeVar("State")


class OldState(NamedTuple):
    """The parameters at the last refresh, and the number of steps taken."""

    params: Any
    steps: jax.Array


def hold_old(refresh_steps: int) -> optax.GradientTransformation:
    """Holds the parameters of up to `refresh_steps` steps ago; last in an optimizer's chain.

    They are replaced by the current ones after every `refresh_steps` steps. Weightings that read
    `old_nll`, such as `psft`, compare the current model with them.

    Args:
      refresh_steps: at least 1.

    Raises:
      ValueError: a smaller number; `update` called without parameters.

    Example:
      >>> optimizer = optax.chain(optax.sgd(1.0), hold_old(2))
      >>> params = {"w": jnp.ones(1)}
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params["w"][0]), float(find(state, OldState).params["w"][0])
      (-2.0, -1.0)
    """
    if refresh_steps < 1:
        raise ValueError(f"refresh_steps is {refresh_steps}; it must be at least 1")

    def init(params: Any) -> OldState:
        return OldState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: OldState, params: Any = None) -> tuple[Any, OldState]:
        if params is None:
            raise ValueError("hold_old needs params: optimizer.update(grads, state, params)")
        steps = state.steps + 1
        is_due = steps % refresh_steps == 0
        moved = optax.apply_updates(params, updates)
        old = jax.tree.map(lambda new, old: jnp.where(is_due, new, old), moved, state.params)
        return updates, OldState(old, steps)

    return optax.GradientTransformation(init, update)


def find(opt_state: Any, kind: type[State]) -> State | None:
    """Returns the first state of a kind within an optimizer's state; None if there is none.

    Example:
      >>> find(optax.sgd(0.1).init({"w": jnp.ones(1)}), OldState) is None
      True
    """
    return next(iter(find_all(opt_state, kind)), None)


def find_all(opt_state: Any, kind: type[State]) -> list[State]:
    """Returns all states of a kind within an optimizer's state."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]
