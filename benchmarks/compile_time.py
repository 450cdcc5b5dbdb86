"""Compile time of Gemma 2 2B's weighted training step: 26 layers against 4. See README.md.

python benchmarks/compile_time.py
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from timing import exit_unless, interleave, median_ratio

import easy_jax as ej

LAYERS, FEW = 26, 4
ROWS, LENGTH, SEGMENTS = 8, 1024, 8
ROUNDS = 5
BOUND = 1.3
GEMMA_2_2B = ej.TransformerConfig(
    "gemma2",
    vocab=256_000,
    embed=2304,
    mlp=9216,
    layers=LAYERS,
    heads=8,
    kv_heads=4,
    head_dim=256,
    query_scale=256**-0.5,
    attention_cap=50.0,
    final_cap=30.0,
    windows=(4096, None),
)


def compile_with(layers: int) -> Callable[[], None]:
    """A call that traces, lowers and compiles the step, from nothing and without weights."""
    config = dataclasses.replace(GEMMA_2_2B, layers=layers)
    model = nnx.eval_shape(
        lambda: ej.Transformer(config, dtype=jnp.bfloat16, remat="full", rngs=nnx.Rngs(0))
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(1e-5)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    state = ej.TrainState(scalar, params, rest, jax.eval_shape(optimizer.init, params))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    by_segment = (ROWS, SEGMENTS)
    batch = {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), tokens),
        "weight": jax.ShapeDtypeStruct(by_segment, jnp.float32),
        "mask": jax.ShapeDtypeStruct(by_segment, jnp.bool_),
    }

    def once() -> None:
        jax.clear_caches()
        step = ej.make_train_step(graphdef, ej.causal_lm_loss, optimizer, reduction="token_mean")
        step.lower(state, batch).compile()

    return once


def main() -> None:
    seconds = interleave({"many": compile_with(LAYERS), "few": compile_with(FEW)}, ROUNDS)
    many, few = (np.median(times.wall) for times in seconds.values())
    ratio = median_ratio(seconds["many"].wall, seconds["few"].wall)
    print(
        f"compile_time: {LAYERS} layers {many:.2f} s, {FEW} layers {few:.2f} s, RATIO {ratio:.3f} "
        f"(bound {BOUND})"
    )
    exit_unless(ratio <= BOUND, f"{LAYERS} layers / {FEW} layers <= {BOUND}")


if __name__ == "__main__":
    main()
