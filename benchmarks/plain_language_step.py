"""A language model's training step as one would write it without the library's weights."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

import easy_jax as ej


def make_plain_step(
    graphdef: nnx.GraphDef[Any], optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """The unweighted step on the same packed rows: the mean over all target tokens."""

    def loss_fn(params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(graphdef, params, copy=True)
        hidden_RTD = model.hidden_states(batch["tokens"], batch["positions"], batch["segment_ids"])
        nll_RT = ej.linear_cross_entropy(hidden_RTD, model.head_VD(), batch["targets"])
        return nll_RT.sum() / (batch["targets"] >= 0).sum()

    def step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.jit(step, donate_argnums=0)
