"""Speed of a language model of SmolLM2-135M's shape on the accelerator, for accelerator.py."""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from accelerator_numbers import packed_batch
from flax import nnx
from plain_language_step import make_plain_step
from timing import interleave, median_ratio

import easy_jax as ej
from easy_jax.ahead_of_time.language_programs import model_flops
from easy_jax.train.forward import make_score_step

# Dense bfloat16 operations per second, from the makers' data sheets.
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
STEPS = 5  # timed together
ROUNDS = 4
SMOLLM2 = ej.TransformerConfig(
    "llama",
    vocab=49_152,
    embed=576,
    mlp=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=100_000.0,
    query_scale=64**-0.5,
)
SMALL = ej.TransformerConfig(
    "llama", vocab=512, embed=64, mlp=128, layers=2, heads=2, kv_heads=1, head_dim=32
)


def shape(small: bool, length: int = 2048) -> tuple[ej.TransformerConfig, int, int]:
    """The model, and rows and length of a batch of 16,384 tokens."""
    return (SMALL, 2, 128) if small else (SMOLLM2, 16_384 // length, length)


def memory() -> dict[str, float]:
    """The most memory in use so far, in GB; nothing on CPUs."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": round(stats["peak_bytes_in_use"] / 1e9, 2)} if stats else {}


def language_model(config: ej.TransformerConfig, remat: Any = "none") -> ej.Transformer:
    """Random weights in float32, computation in bfloat16."""

    def make() -> ej.Transformer:
        return ej.Transformer(config, dtype=jnp.bfloat16, remat=remat, rngs=nnx.Rngs(0))

    return nnx.jit(make)()


def several(step: Callable[..., Any], state: Any, batch: Any) -> Callable[[], None]:
    """A call that takes `STEPS` steps, each on the state that the last one left."""

    def run() -> None:
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def rates(
    seconds: float, config: ej.TransformerConfig, rows: int, length: int, passes: float
) -> dict[str, float]:
    """Tokens per second, and the share of the chip's peak by the operations of the formula."""
    found = {"ms": round(1e3 * seconds, 2), "tokens_per_second": round(rows * length / seconds)}
    peak = PEAK.get(jax.devices()[0].device_kind)
    if peak:
        share = model_flops(config, rows, length, passes) / seconds / peak
        found["utilisation"] = round(share, 4)
    return found


def weighted_step(
    small: bool, length: int, remat: str, learning_rate: float
) -> tuple[nnx.Module, Any, Any, Any]:
    """A model, its optimizer, its weighted step, and a batch on the devices."""
    config, rows, length = shape(small, length)
    mesh = ej.make_mesh()
    model = language_model(config, remat)
    placed = ej.shard_batch(packed_batch(config.vocab, rows, length, min(length, 512)), mesh)
    optimizer = optax.adamw(learning_rate, weight_decay=0.0)
    step = ej.make_train_step(
        nnx.graphdef(model), ej.causal_lm_loss, optimizer, reduction="token_mean", mesh=mesh
    )
    return model, optimizer, step, placed


def train(small: bool, length: int, remat: str, *, plain: bool) -> dict[str, Any]:
    """The weighted step; `plain`: in turn with an unweighted one written by hand."""
    config, rows, length = shape(small, length)
    model, optimizer, step, placed = weighted_step(small, length, remat, 1e-5)
    state = ej.init_train_state(model, optimizer)
    start = time.perf_counter()
    compiled = step.lower(state, placed).compile()
    compiling = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes
    functions = {"weighted": several(compiled, state, placed)}
    if plain:
        params = jax.tree.map(jnp.copy, nnx.state(model))
        plain_step = make_plain_step(nnx.graphdef(model), optimizer)
        functions["plain"] = several(plain_step, (params, optimizer.init(params)), placed)
    seconds = interleave(functions, ROUNDS)
    found = {
        name: rates(statistics.median(times.wall) / STEPS, config, rows, length, 3.0)
        for name, times in seconds.items()
    }
    if plain:
        found["weighted / plain"] = median_ratio(seconds["weighted"].wall, seconds["plain"].wall)
    targets = int((placed["targets"] >= 0).sum())
    sizes: dict[str, Any] = {"rows": rows, "length": length, "targets": targets, "remat": remat}
    sizes["compiled_in"] = round(compiling, 1)
    return {**sizes, **found, "temporary_gb": round(temporary / 1e9, 2), **memory()}


def score(small: bool, length: int) -> dict[str, Any]:
    """The scoring pass's jitted step, batches placed already."""
    config, rows, length = shape(small, length)
    mesh = ej.make_mesh()
    graphdef, state = nnx.split(ej.eval_mode(language_model(config)))
    placed = ej.shard_batch(packed_batch(config.vocab, rows, length, min(length, 512)), mesh)
    step = make_score_step(graphdef, ej.causal_lm_token_losses, mesh)

    def run() -> None:
        for _ in range(STEPS):
            result = step(state, placed)
        jax.block_until_ready(result)

    seconds = statistics.median(interleave({"score": run}, ROUNDS)["score"].wall) / STEPS
    return {"rows": rows, "length": length, **rates(seconds, config, rows, length, 1.0), **memory()}


def parts(small: bool, length: int) -> dict[str, Any]:
    """Value and gradient of the body alone, and of the head with its loss alone."""
    config, rows, length = shape(small, length)
    model = language_model(config)
    graphdef, params = nnx.split(model)
    batch = packed_batch(config.vocab, rows, length, min(length, 512))
    batch = {name: jnp.asarray(array) for name, array in batch.items()}

    def body(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params, copy=True)
        hidden = model.hidden_states(batch["tokens"], batch["positions"], batch["segment_ids"])
        return jnp.sum(hidden.astype(jnp.float32))

    def head(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        return ej.linear_cross_entropy(hidden, weights, batch["targets"]).sum()

    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, length, config.embed)), jnp.bfloat16)
    functions = {
        "body": functools.partial(jax.jit(jax.value_and_grad(body)), params),
        "head": functools.partial(
            jax.jit(jax.value_and_grad(head, argnums=(0, 1))), hidden, model.head_VD()
        ),
    }
    calls = {
        name: lambda function=function: jax.block_until_ready(function())
        for name, function in functions.items()
    }
    seconds = interleave(calls, 3 * ROUNDS)
    return {f"{n}_ms": round(1e3 * statistics.median(s.wall), 2) for n, s in seconds.items()}


def repeated(small: bool, length: int) -> dict[str, Any]:
    """How far the parameters of two times the same steps are apart: ‖a − b‖ / ‖b‖, the largest."""
    model, optimizer, step, placed = weighted_step(small, length, "dots", 1e-3)

    def trained() -> Any:
        state = ej.init_train_state(model, optimizer)
        for _ in range(STEPS):
            state, _ = step(state, placed)
        return jax.device_get(state.params)

    pairs = zip(*(jax.tree.leaves(trained()) for _ in range(2)), strict=True)
    apart = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    return {"steps": STEPS, "apart": apart, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def language(small: bool, shared: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    del shared
    yield "training", functools.partial(train, small, 2048, "none", plain=True)
    yield "scoring", functools.partial(score, small, 2048)
    yield "parts", functools.partial(parts, small, 2048)
    yield "training, remat dots", functools.partial(train, small, 2048, "dots", plain=False)
    yield "training, rows of 8192", functools.partial(train, small, 8192, "dots", plain=False)
    yield "repeated", functools.partial(repeated, small, 2048)


PARTS = {"language": language}
