"""The fused head and attention on the accelerator beside others, for accelerator.py."""

import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleave

import easy_jax as ej
from easy_jax.kernels.attention import causal_attention
from easy_jax.kernels.splash import attend

Check = tuple[str, Callable[[], dict[str, Any]]]
ROUNDS = 8
BLOCKS = ((2048, 512), (4096, 4096), (8192, 2048), (16_384, 4096))  # of the vocabulary, tokens


def measured(program: Callable[..., Any], *arrays: Any) -> tuple[dict[str, Any], Any]:
    """Milliseconds and temporary memory of a compiled program, and its result."""
    compiled = jax.jit(program).lower(*arrays).compile()
    result = jax.block_until_ready(compiled(*arrays))
    run = functools.partial(compiled, *arrays)
    seconds = interleave({"": lambda: jax.block_until_ready(run())}, ROUNDS)[""].wall
    temporary = compiled.memory_analysis().temp_size_in_bytes
    found = {"ms": round(1e3 * statistics.median(seconds), 2)}
    return {**found, "temporary_gb": round(temporary / 1e9, 3)}, result


def difference(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖, over all arrays; the largest."""
    errors = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        errors.append(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
    return max(errors)


# The head.


def materialised(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """All logits at once, in float32, and optax's loss."""
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _of_head(arrays: Any, kept: list[Any], loss: Any) -> dict[str, Any]:
    """Figures of one loss; `kept` gets the gradients of the first, to compare the others with."""

    def total(hidden: Any, weights: Any, targets: Any, cotangent: Any) -> jax.Array:
        return jnp.sum(cotangent * loss(hidden, weights, targets))

    figures, (_, gradients) = measured(jax.value_and_grad(total, argnums=(0, 1)), *arrays)
    if not kept:
        kept.append(gradients)
    return {**figures, "apart": difference(gradients, kept[0])}


def head(small: bool, shared: Path) -> Iterator[Check]:
    """Value and gradients of the weighted loss, of 8,192 tokens in bfloat16."""
    del shared
    rows, length = (2, 64) if small else (8, 1024)
    for vocab, features in ((512, 64),) if small else ((49_152, 576), (256_000, 2304)):
        rng = np.random.default_rng(0)
        shapes = ((rows, length, features), (vocab, features))
        hidden = jnp.asarray(rng.standard_normal(shapes[0], np.float32), jnp.bfloat16)
        weights = jnp.asarray(rng.standard_normal(shapes[1], np.float32) / features**0.5)
        weights = weights.astype(jnp.bfloat16)
        targets = jnp.asarray(rng.integers(vocab, size=(rows, length)), jnp.int32)
        cotangent = jnp.asarray(rng.random((rows, length)), jnp.float32)
        arrays = (hidden, weights, targets, cotangent)
        run = functools.partial(_of_head, arrays, [])
        name = f"vocabulary {vocab}, features {features}"
        yield f"{name}, materialised", functools.partial(run, materialised)
        yield f"{name}, ours", functools.partial(run, ej.linear_cross_entropy)
        for block, chunk in BLOCKS:
            options = {"vocab_block": block, "token_chunk": chunk}
            loss = functools.partial(ej.linear_cross_entropy, **options)
            yield f"{name}, ours {block} x {chunk}", functools.partial(run, loss)


# Attention.


def xla(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, **options: Any) -> jax.Array:
    """JAX's own, with a mask of the segments if it is to know them."""
    segmented = options.pop("segmented")
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    mask = mask if segmented else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, **options)


def triton(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """JAX's example of a Pallas kernel for GPUs, which wants as many heads of keys as of queries"""
    from jax.experimental.pallas.ops.gpu.attention import mha

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return mha(q, k, v, segments, sm_scale=q.shape[3] ** -0.5, causal=True)


def forms() -> dict[str, Callable[..., jax.Array]]:
    """Name -> attention(q, k, v, segment ids)."""

    def scaled(form: Any) -> Callable[..., jax.Array]:
        return lambda q, *rest: form(q, *rest, scale=q.shape[3] ** -0.5)

    return {
        "ours": scaled(attend),
        "cudnn, no segments": functools.partial(xla, segmented=False, implementation="cudnn"),
        "cudnn, a mask of segments": functools.partial(xla, segmented=True, implementation="cudnn"),
        "triton": triton,
        "xla": functools.partial(xla, segmented=True, implementation="xla"),
        "ours, in blocks of queries": scaled(causal_attention),
    }


def _of_attention(arrays: Any, kept: list[Any], form: Any) -> dict[str, Any]:
    """Figures of one form; `kept` gets the result of the first, to compare the others with."""

    def program(q: Any, k: Any, v: Any, segments: Any, cotangent: Any) -> Any:
        y, backward = jax.vjp(lambda *qkv: form(*qkv, segments), q, k, v)
        return y, backward(cotangent)

    figures, result = measured(program, *arrays)
    if not kept:
        kept.append(result)
    return {**figures, "apart": difference(result, kept[0])}


def attention(small: bool, shared: Path) -> Iterator[Check]:
    """Values and gradients in bfloat16: heads of SmolLM2 and of Llama 3.2 3B."""
    del shared
    shapes = ((8, 2048, 9, 3, 64), (2, 8192, 9, 3, 64), (4, 2048, 24, 8, 128))
    for rows, length, heads, kv_heads, size in ((2, 256, 4, 2, 32),) if small else shapes:
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.standard_normal((rows, length, n, size), np.float32), jnp.bfloat16)
            for n in (heads, kv_heads, kv_heads)
        )
        segments = jnp.asarray(np.cumsum(rng.random((rows, length)) < 1 / 300, axis=1), jnp.int32)
        cotangent = jnp.asarray(rng.standard_normal(q.shape, np.float32), jnp.bfloat16)
        arrays = (q, k, v, segments, cotangent)
        run = functools.partial(_of_attention, arrays, [])
        for name, form in forms().items():
            label = f"{rows} x {length}, heads {heads} and {kv_heads} of {size}, {name}"
            yield label, functools.partial(run, form)


PARTS = {"head": head, "attention": attention}
