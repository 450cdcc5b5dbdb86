"""One jitted, mesh-sharded forward pass over the data: scoring and evaluation run on it."""

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
    `loss`, the fingerprint of the loss function, distinguishes what one object computes before
    and after a change of its attributes. On a mesh of CPUs the step cannot be called inside
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
      graphdef: of the model in eval mode.
      function: returns arrays with the leading axes of the batch's mask.
      mesh: where state and batches are.
    """

    def score_step(  # by this name `io.terminal` knows the compilation
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

    Padding is removed, and every example comes once, in one of the processes. Results are read
    one batch late, so that the devices stay busy. Scoring and evaluation both run on this.

    Args:
      step: `(state, batch) -> (first, second)`: arrays whose leading axes are those of the
        batch's mask. A third array has a value for every token of packed rows; then a list of
        arrays follows, with each example's values at its target tokens.
      state: the model's variables in eval mode, on the mesh.
      loader: a scoring loader of `sharding.process_rows`.
      mesh: where the batches go.
      name: of the pass, for the warning that devices wait for data.
      check: the name of a loss function, to check on the first batch that it is per example
        (`contract.check_apart`).
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
    """`contract.check_apart` of a compiled score step; `name` is the loss function's."""

    def run(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        results = score_step(state, sharding.shard_batch(arrays, mesh))
        return tuple(sharding.local_rows(array) for array in results[:2])

    contract.check_apart(run, batch, name)


def _collect(
    batch: Mapping[str, np.ndarray], result: tuple[jax.Array, ...], mesh: Mesh
) -> tuple[Any, ...]:
    first, second, *tokens = (sharding.local_rows(array) for array in result)
    mask = batch["mask"]
    if jax.process_count() > 1:  # other processes may hold some of the rows, too
        owned_b = sharding.owned_rows(result[0].shape[0], mesh)
        mask = mask & owned_b.reshape(-1, *[1] * (mask.ndim - 1))
    rows = (batch["example_id"][mask], first[mask], second[mask])
    return (*rows, *(split_tokens({**batch, "mask": mask}, values) for values in tokens))
