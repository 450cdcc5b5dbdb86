"""Speed of ResNet-50's training step on the accelerator, for accelerator.py."""

import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from accelerator_language import ROUNDS, STEPS, memory, several
from flax import nnx
from timing import interleave, median_ratio
from weighted_step import make_plain_step

import easy_jax as ej


def step(small: bool, dtype: Any) -> dict[str, Any]:
    """The weighted step in turn with an unweighted one written by hand, in images per second."""
    batch, size = (4, 32) if small else (128, 224)
    mesh = ej.make_mesh()
    config = ej.ResNetConfig.named("resnet18" if small else "resnet50", dtype=dtype)
    model = ej.train_view(nnx.jit(lambda: ej.ResNet(config, 1000, rngs=nnx.Rngs(0)))())
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.standard_normal((batch, size, size, 3), np.float32),
        "label": rng.integers(0, 1000, batch).astype(np.int32),
    }
    more = {"weight": rng.uniform(0.1, 1.0, batch).astype(np.float32), "mask": np.ones(batch, bool)}
    optimizer = optax.sgd(1e-3, momentum=0.9)
    weighted = ej.make_train_step(
        nnx.graphdef(model), ej.classification_loss, optimizer, reduction="example_mean", mesh=mesh
    )
    state = ej.init_train_state(model, optimizer, mesh=mesh)
    placed = ej.shard_batch({**arrays, **more}, mesh)
    compiled = weighted.lower(state, placed).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    params, rest = jax.tree.map(jnp.copy, nnx.split(model, nnx.Param, ...)[1:])
    plain_state = (params, rest, optimizer.init(params))
    plain = make_plain_step(nnx.graphdef(model), optimizer, mesh)
    functions = {
        "weighted": several(compiled, state, placed),
        "plain": several(plain, plain_state, ej.shard_batch(arrays, mesh)),
    }
    seconds = interleave(functions, ROUNDS)
    found: dict[str, Any] = {"batch": batch, "size": size, "temporary_gb": temporary / 1e9}
    for name, times in seconds.items():
        one = statistics.median(times.wall) / STEPS
        found[name] = {"ms": round(1e3 * one, 2), "images_per_second": round(batch / one)}
    ratio = median_ratio(seconds["weighted"].wall, seconds["plain"].wall)
    return {**found, "weighted / plain": ratio, **memory()}


def images(small: bool, shared: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    del shared
    for dtype in ("bfloat16", "float32"):
        yield f"ResNet-50, {dtype}", functools.partial(step, small, dtype)


PARTS = {"images": images}
