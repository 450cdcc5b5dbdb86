"""`linear_cross_entropy` against the plain optax loss: memory, CPU time, gradients. See README.md.

python benchmarks/linear_cross_entropy.py [--vocab=131072] [--rounds=2]
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import exit_unless, interleave, median_ratio

import easy_jax as ej

TOKENS = 2048
FEATURES = 2304
MEMORY_BOUND = 1 / 8
TIME_BOUND = 1.2
GRADIENT_BOUND = 1e-5


def plain(hidden_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array) -> jax.Array:
    """What one would write without the library: all logits at once."""
    return optax.softmax_cross_entropy_with_integer_labels(hidden_ND @ head_VD.T, targets_N)


def weighted_gradient(loss: Callable[..., jax.Array], *arrays: jax.Array) -> Any:
    """The compiled value and gradient of sum(weight * nll), for hidden and head."""

    def total(
        hidden_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array, weight_N: jax.Array
    ) -> jax.Array:
        return jnp.sum(weight_N * loss(hidden_ND, head_VD, targets_N))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arrays).compile()


def run(vocab: int, rounds: int) -> bool:
    rng = np.random.default_rng(0)
    arrays = (
        jnp.asarray(rng.normal(size=(TOKENS, FEATURES)), jnp.float32),
        jnp.asarray(rng.normal(size=(vocab, FEATURES)) / FEATURES**0.5, jnp.float32),
        jnp.asarray(rng.integers(vocab, size=TOKENS), jnp.int32),
        jnp.asarray(rng.random(TOKENS), jnp.float32),
    )
    programs = {
        "ours": weighted_gradient(ej.linear_cross_entropy, *arrays),
        "optax": weighted_gradient(plain, *arrays),
    }
    temporary = {n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()}
    results: dict[str, Any] = {}

    def call(name: str) -> Callable[[], None]:
        def once() -> None:
            results.pop(name, None)  # a gradient of the head takes gigabytes
            results[name] = jax.block_until_ready(programs[name](*arrays))

        return once

    seconds = interleave({name: call(name) for name in programs}, rounds, warm_up=False)
    memory = temporary["ours"] / temporary["optax"]
    time = median_ratio(seconds["ours"].wall, seconds["optax"].wall)
    time_cpu = median_ratio(seconds["ours"].cpu, seconds["optax"].cpu)
    difference = max(
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(results["ours"][1], results["optax"][1], strict=True)
    )
    print(
        f"linear_cross_entropy: {TOKENS} tokens, vocabulary {vocab}, {FEATURES} features: "
        f"temporary memory {temporary['ours'] / 1e6:.0f} MB, optax "
        f"{temporary['optax'] / 1e6:.0f} MB, RATIO {memory:.3f} (bound {MEMORY_BOUND}); CPU time "
        f"{np.median(seconds['ours'].cpu):.1f} s, optax {np.median(seconds['optax'].cpu):.1f} s, "
        f"RATIO {time_cpu:.3f} (bound {TIME_BOUND}; of wall time {time:.3f}); gradients differ by "
        f"{difference:.1e} of their largest entry (bound {GRADIENT_BOUND})",
        flush=True,
    )
    return memory <= MEMORY_BOUND and time_cpu <= TIME_BOUND and difference <= GRADIENT_BOUND


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    held = [run(vocab, options.rounds) for vocab in options.vocab or (131_072, 262_144)]
    exit_unless(
        all(held),
        f"memory <= {MEMORY_BOUND}, CPU time <= {TIME_BOUND}, gradients within {GRADIENT_BOUND}",
    )


if __name__ == "__main__":
    main()
