"""What accelerator.py computes on the accelerator and, as the reference, on a CPU.

Errors are of whole arrays, ‖ours − reference‖ / ‖reference‖. The reference is float32 on a CPU.
On the accelerator everything runs twice: with JAX's default precision of float32 products (TF32 on
NVIDIA GPUs) and with `highest`.
"""

import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import easy_jax as ej
from easy_jax.kernels.convolution import convolve, max_pool
from easy_jax.kernels.linear_cross_entropy import weighted_linear_cross_entropy
from easy_jax.kernels.splash import attend
from easy_jax.train.forward import make_score_step

Arrays = dict[str, np.ndarray]
# Of values (losses, outputs) and of gradients, by precision.
TOLERANCE = {"highest": (1e-5, 1e-4), "default": (1e-2, 5e-2), "bfloat16": (2e-2, 1e-1)}
WAIT = 300.0  # seconds, for a case of the reference
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch")


def versions() -> dict[str, Any]:
    """Of the libraries, the device and its driver."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for name in (*PACKAGES, "transformers", "jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    found["platform_version"] = jax.devices()[0].client.platform_version
    return {**found, "devices": jax.device_count(), "cores": os.cpu_count()}


def image_model(name: str) -> nnx.Module:
    """The quickstart's small network, or a thin one of the blocks and the stem of ResNet-50."""
    config = ej.ResNetConfig()
    if name == "bottleneck":
        config = ej.ResNetConfig(3, 16, (1, 1, 1, 1), "bottleneck", "imagenet")
    return nnx.jit(lambda: ej.ResNet(config, 10, rngs=nnx.Rngs(0)))()


def image_batch(name: str) -> Arrays:
    """Random images with random weights; the last one is padding, one has weight 0."""
    rng = np.random.default_rng(0)
    shape = (16, 16, 16, 1) if name == "small" else (16, 64, 64, 3)
    weight = rng.uniform(0.1, 1.0, 16).astype(np.float32)
    weight[3] = 0.0
    return {
        "image": rng.normal(size=shape).astype(np.float32),
        "label": rng.integers(0, 10, 16).astype(np.int32),
        "weight": weight,
        "mask": np.arange(16) < 15,
    }


def language_model(dtype: Any = jnp.float32, family: str = "llama") -> ej.Transformer:
    """Four layers; of Gemma 2 with windows, soft caps and norms of its own."""
    sizes: Any = {"vocab": 4001, "embed": 128, "mlp": 384, "layers": 4, "heads": 6, "kv_heads": 2}
    sizes |= {"head_dim": 32, "query_scale": 32**-0.5}
    if family == "gemma2":
        sizes |= {"windows": (64, None), "attention_cap": 50.0, "final_cap": 30.0}
    config = ej.TransformerConfig(family, **sizes)
    return nnx.jit(lambda: ej.Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))()


def packed_batch(vocab: int, rows: int, length: int, longest: int, seed: int = 0) -> Arrays:
    """Rows of packed random texts with random weights, as the loader makes them."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(longest // 4, longest + 1, 4 * rows * length // longest + rows)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    source = ej.PackedSource(
        ej.TokenSource(
            rng.integers(0, vocab, offsets[-1]).astype(np.int32), offsets, sizes // 8 + 1
        ),
        length,
    )
    weight = rng.uniform(0.1, 1.0, len(sizes)).astype(np.float32)
    loader = ej.training_loader(source, rows, epochs=1, seed=0, weight_N=weight)
    batch = next(iter(loader))
    batch.pop("example_id")
    return batch


def losses(model: nnx.Module, loss_fn: Any, batch: Arrays) -> Arrays:
    """The values that scoring gives for every example."""
    mesh = ej.make_mesh()
    graphdef, state = nnx.split(ej.eval_view(model))
    results = make_score_step(graphdef, loss_fn, mesh)(state, ej.shard_batch(batch, mesh))
    return {f"value {i}": np.asarray(x, np.float32) for i, x in enumerate(results)}


def unfused_losses(dtype: Any) -> Arrays:
    """The language model's losses from all of its logits."""
    model = language_model(dtype)
    batch = packed_batch(4001, 4, 256, 100)

    @jax.jit
    def run(batch: Any) -> jax.Array:
        logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.where(batch["targets"] >= 0, nll, 0.0)

    return {"value": np.asarray(run(batch))}


def step(model: nnx.Module, loss_fn: Any, batch: Arrays, reduction: Any, filter_: Any) -> Arrays:
    """One weighted step of SGD with momentum: metrics, and the gradient, which is its trace."""
    mesh = ej.make_mesh()
    optimizer = optax.sgd(0.1, momentum=0.9)
    run = ej.make_train_step(
        nnx.graphdef(model), loss_fn, optimizer, reduction=reduction, mesh=mesh
    )
    state = ej.init_train_state(model, optimizer, trainable=filter_, mesh=mesh)
    state, metrics = run(state, ej.shard_batch(batch, mesh))
    leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(state.opt_state)]
    rest = [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(state.rest)]
    found = {f"value {name}": np.asarray(x) for name, x in metrics.items()}
    found |= {"value rest": np.concatenate([*rest, np.zeros(1, np.float32)])}
    return {**found, "gradient": np.concatenate(leaves)}


def language_step(family: str, adapters: bool, dtype: Any = jnp.float32) -> Arrays:
    model = language_model(dtype, family)
    if adapters:
        ej.lora.add_adapters(model, rank=4, alpha=4.0, rngs=nnx.Rngs(1))
        rng = np.random.default_rng(2)
        for block in model.blocks:  # zero at first, which would leave A without a gradient
            for name in ej.lora.TARGETS:
                b = getattr(block, name).lora_b
                b[...] = jnp.asarray(0.02 * rng.normal(size=b.shape), jnp.float32)
    batch = packed_batch(4001, 4, 256, 100)
    filter_ = nnx.LoRAParam if adapters else nnx.Param
    return step(model, ej.causal_lm_loss, batch, "token_mean", filter_)


def head(cap: float | None) -> Arrays:
    """The fused head: a weighted sum and its gradients; a vocabulary without near divisors."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 700, 96)).astype(np.float32)
    weights = (3 * rng.normal(size=(10_007, 96)) / 96**0.5).astype(np.float32)
    targets = rng.integers(-1, 10_007, (3, 700)).astype(np.int32)
    cotangent = rng.uniform(0, 1, (3, 700)).astype(np.float32)

    def total(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        return weighted_linear_cross_entropy(hidden, weights, targets, cotangent, soft_cap=cap)

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, weights)
    nll = jax.jit(functools.partial(ej.linear_cross_entropy, soft_cap=cap))(
        hidden, weights, targets
    )
    values = {"value sum": np.asarray(value), "value": np.asarray(nll)}
    return values | {f"gradient {i}": np.asarray(g) for i, g in enumerate(gradients)}


def attention(window: int | None, cap: float | None, dtype: Any = jnp.float32) -> Arrays:
    """Values and gradients of attention within segments, two heads of queries to one of keys."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1030, n, 64)), dtype) for n in (4, 2, 2))
    segments = np.cumsum(rng.random((2, 1030)) < 0.01, axis=1).astype(np.int32)
    cotangent = jnp.asarray(rng.normal(size=q.shape), dtype)
    options = {"segment_ids_BT": segments, "scale": 0.125, "window": window, "cap": cap}
    y, backward = jax.vjp(jax.jit(functools.partial(attend, **options)), q, k, v)
    found = {"value": np.asarray(y, np.float32)}
    gradients = enumerate(backward(cotangent))
    return found | {f"gradient {i}": np.asarray(g, np.float32) for i, g in gradients}


def windows() -> Arrays:
    """The maximum over windows with equal maxima, and a kernel larger than its image."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (4, 15, 16, 8)).astype(np.float32)
    y, backward = jax.vjp(jax.jit(max_pool), x)
    cotangent = rng.normal(size=y.shape).astype(np.float32)
    small = rng.normal(size=(4, 2, 2, 8)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 8, 8)).astype(np.float32)
    conv = functools.partial(convolve, strides=(1, 1), padding=((1, 1), (1, 1)))
    conv = functools.partial(conv, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    z, conv_backward = jax.vjp(jax.jit(conv), small, kernel)
    gradients = [*backward(cotangent), *conv_backward(jnp.ones_like(z))]
    found = {"value max": np.asarray(y), "value convolution": np.asarray(z)}
    return found | {f"gradient {i}": np.asarray(g) for i, g in enumerate(gradients)}


def weights() -> Arrays:
    """FLOW's weights of given losses, from very small to very large, and of a loss table."""
    rng = np.random.default_rng(0)
    found: Arrays = {}
    for exponent in (-36, -10, 0, 10, 30):
        loss = (10.0**exponent * rng.gamma(1.0, size=1001)).astype(np.float32)
        found[f"value 1e{exponent}"] = np.asarray(ej.flow_weights(loss))
    batch = image_batch("small")
    source = ej.ArraySource({name: batch[name] for name in ("image", "label")}, 10)
    with tempfile.TemporaryDirectory() as folder:
        model = image_model("small")
        table = ej.score(
            model, source, folder, loss_fn=ej.classification_loss, batch_size=8, progress=False
        )
        found["value table"] = table.flow_weights()
    return found


def cases() -> dict[str, Callable[[], Arrays]]:
    """Name -> what is computed, alike on every device."""
    packed = functools.partial(packed_batch, 4001, 4, 256, 100)
    found: dict[str, Callable[[], Arrays]] = {"flow weights": weights, "windows": windows}
    for name in ("small", "bottleneck"):
        found[f"{name} losses"] = lambda name=name: losses(
            image_model(name), ej.classification_loss, image_batch(name)
        )
        found[f"{name} step"] = lambda name=name: step(
            ej.train_view(image_model(name)),
            ej.classification_loss,
            image_batch(name),
            "example_mean",
            nnx.Param,
        )
    for family in ("llama", "gemma2"):
        found[f"{family} losses, fused"] = lambda family=family: losses(
            language_model(family=family), ej.causal_lm_token_losses, packed()
        )
        for adapters in (False, True):
            found[f"{family} step{', adapters' * adapters}"] = functools.partial(
                language_step, family, adapters
            )
    found["llama losses, unfused"] = lambda: unfused_losses(jnp.float32)
    for cap in (None, 20.0):
        found[f"head, cap {cap}"] = functools.partial(head, cap)
        for window in (None, 200):
            found[f"attention, window {window}, cap {cap}"] = functools.partial(
                attention, window, cap
            )
    return found


def bfloat16_cases() -> dict[str, Callable[[], Arrays]]:
    """The same computed in bfloat16, by the names of what they are compared with."""
    packed = functools.partial(packed_batch, 4001, 4, 256, 100)
    model = functools.partial(language_model, jnp.bfloat16)
    return {
        "llama losses, fused": lambda: losses(model(), ej.causal_lm_token_losses, packed()),
        "llama losses, unfused": lambda: unfused_losses(jnp.bfloat16),
        "llama step": lambda: language_step("llama", False, jnp.bfloat16),
        "gemma2 step": lambda: language_step("gemma2", False, jnp.bfloat16),
        **{
            f"attention, window {window}, cap None": functools.partial(
                attention, window, None, jnp.bfloat16
            )
            for window in (None, 200)
        },
    }


def compare(found: Arrays, reference: Arrays, precision: str) -> dict[str, Any]:
    """The largest error of values and of gradients, and whether they are within tolerance."""
    errors = {"value": 0.0, "gradient": 0.0}
    worst = dict.fromkeys(errors, "")
    for name, array in found.items():
        expected = reference[name].astype(np.float64)
        difference = np.linalg.norm(array.astype(np.float64) - expected)
        error = float(difference / max(np.linalg.norm(expected), 1e-30))
        kind = name.split()[0]
        if not error <= errors[kind]:
            errors[kind], worst[kind] = error, name
    bounds = dict(zip(errors, TOLERANCE[precision], strict=True))
    holds = all(errors[kind] <= bounds[kind] for kind in errors)
    return {"precision": precision, "errors": errors, "of": worst, "bounds": bounds, "ok": holds}


def reference(small: bool, shared: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    del small

    def write(name: str, case: Callable[[], Arrays]) -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            arrays = case()
        np.savez(shared / "writing.npz", **arrays)
        (shared / "writing.npz").rename(shared / f"{name}.npz")
        return {"device": jax.devices()[0].device_kind}

    for name, case in cases().items():
        yield name, functools.partial(write, name, case)


def numbers(
    small: bool, shared: Path, precision: str = "highest"
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    del small
    if precision == "highest":
        yield "versions", versions

    def run(name: str, case: Callable[[], Arrays], precision: str) -> dict[str, Any]:
        with jax.default_matmul_precision("highest" if precision == "highest" else "default"):
            found = case()
        end = time.monotonic() + WAIT
        while not (shared / f"{name}.npz").exists() and time.monotonic() < end:
            time.sleep(0.2)
        return compare(found, dict(np.load(shared / f"{name}.npz")), precision)

    for name, case in cases().items():
        yield f"{name}, {precision}", functools.partial(run, name, case, precision)
    if precision == "default":
        for name, case in bfloat16_cases().items():
            yield f"{name}, bfloat16", functools.partial(run, name, case, "bfloat16")


PARTS = {
    "reference": reference,
    "numbers": numbers,
    "numbers_default": functools.partial(numbers, precision="default"),
}
