"""FLOW's weights of transformed images, computed by the frozen model in every step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from easy_jax.core import contract, weightings
from easy_jax.io import code_fingerprint
from easy_jax.io import fingerprint as fingerprints
from easy_jax.models.modes import eval_mode
from easy_jax.parallel import sharding


class OnlineWeights:
    """Function that computes FLOW's weights of a training batch, as in the authors' code.

    With random image transforms, each transformed image gets its own weight. Unlike the weights
    of a loss table, this needs a forward pass of the frozen model in every step.

    Args:
      model: the frozen model, which runs in eval mode, whatever mode it is in.
      loss_fn: the loss function, `(model, batch) -> (loss_sum_B, count_B)`.
      tau: the temperature, in nats.
      mesh: the device mesh of the batches.

    Raises:
      ValueError: tau is not positive and finite, or devices would round it to 0 or infinity.
      ContractError: the model is not a Flax NNX module, or the loss function does not return
        losses and counts.
    """

    def __init__(self, model: nnx.Module, *, loss_fn: Callable[..., Any], tau: float, mesh: Mesh):
        contract.check_model(model, "OnlineWeights")
        weightings.flow_weights([0.0], tau)  # raises
        if not 1e-37 < tau < 1e37:
            raise ValueError(f"tau is {tau}, which devices take for 0 or infinity; give another")
        graphdef, state = nnx.split(eval_mode(model))
        self._state = sharding.shard_tree(state, mesh)
        loss = code_fingerprint.of_function(loss_fn)
        self._weigh = _make_weigh(graphdef, loss_fn, loss, tau, mesh)
        structure = code_fingerprint.of_structure(graphdef)
        self._identity = {"online": loss, "tau": tau, "structure": structure}

    def __call__(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the batch with `weight` [B] multiplied by exp(-loss / tau); 0 for padding."""
        return {**batch, "weight": self._weigh(self._state, batch)}

    def fingerprint(self) -> str:
        """Returns a fingerprint of the model, the loss function and the temperature."""
        return fingerprints.of_json({**self._identity, "model": fingerprints.of_state(self._state)})


@functools.lru_cache(maxsize=32)
def _make_weigh(
    graphdef: nnx.GraphDef[Any], loss_fn: Callable[..., Any], loss: str, tau: float, mesh: Mesh
) -> Callable[[nnx.State, Mapping[str, jax.Array]], jax.Array]:
    del loss

    def weigh(state: nnx.State, batch: Mapping[str, jax.Array]) -> jax.Array:
        with sharding.tracing_on(mesh):
            model = nnx.merge(graphdef, state, copy=True)
            loss_sum_B, count_B = contract.call(loss_fn, model, batch)
        seen = batch["mask"] & (batch["weight"] != 0)
        loss_B = jnp.where(seen, loss_sum_B / count_B, 0.0)
        weight_B = batch["weight"] * weightings.flow_weights(loss_B, tau)
        return jnp.where(seen, weight_B, 0.0)

    return jax.jit(
        weigh,
        out_shardings=sharding.batch_sharding(mesh),
        compiler_options=sharding.compiler_options(mesh),
    )
