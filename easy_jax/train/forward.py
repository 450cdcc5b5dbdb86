"""Jitted, mesh-sharded forward pass over the data, shared by scoring and evaluation."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easy_jax import data
from easy_jax.core import contract
from easy_jax.data.packing import split_tokens
from easy_jax.io.throughput import Throughput
from easy_jax.parallel import sharding

_SPEED_EVERY = 50  # batches


@functools.lru_cache(maxsize=32)
def make_score_step(
    graphdef: nnx.GraphDef[Any],
    loss_fn: Callable[..., tuple[jax.Array, ...]],
    mesh: Mesh,
    loss: str = "",
) -> Callable[[nnx.State, Mapping[str, jax.Array]], tuple[jax.Array, ...]]:
    """Returns the jitted forward pass `(state, batch) -> (loss_sum_B, count_B)`.

    It is cached: passes with the same model structure, loss and shapes share one compilation.
    `loss`, the fingerprint of the loss function, is part of the key, so that a callable whose
    attributes have changed is compiled again. On a mesh of CPUs the step cannot be called inside
    another `jax.jit`.
    """
    del loss
    return forward_step(
        graphdef, functools.partial(contract.call, loss_fn, token_losses=True), mesh
    )


def forward_step(
    graphdef: nnx.GraphDef[Any],
    function: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]],
    mesh: Mesh,
) -> Callable[[nnx.State, Mapping[str, jax.Array]], tuple[jax.Array, ...]]:
    """Jits `(state, batch) -> function(model, batch)`, without a cache.

    Args:
      graphdef: the graph definition of the model in eval mode.
      function: returns arrays with the leading axes of the batch's mask.
      mesh: the device mesh that holds state and batches.
    """

    def score_step(  # `io.terminal` recognises the compilation by this name
        state: nnx.State, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, ...]:
        with sharding.tracing_on(mesh):
            return function(nnx.merge(graphdef, state, copy=True), batch)

    return jax.jit(
        score_step,
        out_shardings=sharding.batch_sharding(mesh),
        compiler_options=sharding.compiler_options(mesh),
    )


def per_example(
    step: Callable[[nnx.State, Mapping[str, jax.Array]], tuple[jax.Array, ...]],
    state: nnx.State,
    loader: data.Loader,
    mesh: Mesh,
    name: str = "scoring",
    check: str = "",
) -> Iterator[tuple[Any, ...]]:
    """Runs a compiled step over a loader and yields `(ids, first, second)` of every batch.

    Padding is removed, and every example is yielded once, by one of the processes. Results are
    read one batch late, so that the devices stay busy.

    Args:
      step: `(state, batch) -> (first, second)`: arrays whose leading axes are those of the
        batch's mask. It may return a third array, with a value for every token of packed rows;
        then a list with each example's values at its target tokens is yielded as well.
      state: the model's variables in eval mode, on the mesh.
      loader: a scoring loader of the rows `sharding.process_rows`.
      mesh: the device mesh on which the batches are placed.
      name: the name of the pass, for the warning that devices wait for data.
      check: the name of the loss function, to check on the first batch that it is per example
        (`contract.check_apart`); empty for no check.
    """
    pending: tuple[data.loader.Batch, tuple[jax.Array, ...]] | None = None
    throughput = Throughput(name)
    with contextlib.closing(iter(loader)) as batches:
        for number in range(1, loader.steps + 1):
            batch = throughput.fetch(batches)
            if check and number == 1:
                check_first_batch(step, state, batch, mesh, check)
            arrays = {name: array for name, array in batch.items() if name != "example_id"}
            result = step(state, sharding.shard_batch(arrays, mesh))
            if pending is not None:
                yield _collect(*pending, mesh)
            pending = (batch, result)
            if number % _SPEED_EVERY == 0:
                throughput.read(result)  # warns where the devices wait for data
    if pending is not None:
        yield _collect(*pending, mesh)


def check_first_batch(
    score_step: Callable[..., tuple[jax.Array, ...]],
    state: nnx.State,
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    name: str,
) -> None:
    """Runs `contract.check_apart` on a compiled score step of the loss function `name`."""

    def run(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        results = score_step(state, sharding.shard_batch(arrays, mesh))
        return tuple(sharding.local_rows(array) for array in results[:2])

    contract.check_apart(run, batch, name)


def _collect(
    batch: Mapping[str, np.ndarray], result: tuple[jax.Array, ...], mesh: Mesh
) -> tuple[Any, ...]:
    first, second, *tokens = (sharding.local_rows(array) for array in result)
    mask = batch["mask"]
    if jax.process_count() > 1:  # some rows may be replicated in other processes
        owned_b = sharding.owned_rows(result[0].shape[0], mesh)
        mask = mask & owned_b.reshape(-1, *[1] * (mask.ndim - 1))
    rows = (batch["example_id"][mask], first[mask], second[mask])
    return (*rows, *(split_tokens({**batch, "mask": mask}, values) for values in tokens))
