"""Training steps by weighting, in turn with the unweighted step, for accelerator.py and CPUs.

python benchmarks/accelerator_weightings.py [--rounds=9]

On a CPU: a smaller model, ratios of processor time. On a GPU: SmolLM2-135M's shape, wall time.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from accelerator_language import SMOLLM2, language_model, several
from accelerator_numbers import packed_batch
from flax import nnx
from timing import interleave, median_ratio

import easy_jax as ej

RULES = ("flow", "dft", "eaft", "deft", "iw_token", "talr")
ON_CPU = ej.TransformerConfig(
    "llama", vocab=8192, embed=192, mlp=512, layers=4, heads=3, kv_heads=1, head_dim=64
)


def steps(on_cpu: bool, rounds: int) -> dict[str, Any]:
    """The time and the temporary memory of each step over those of the plain step.

    Weightings, and the anchor `kl`, over the unweighted step; `kl, adapters` over the unweighted
    step of low-rank adapters.
    """
    config, rows, length = (ON_CPU, 4, 256) if on_cpu else (SMOLLM2, 8, 2048)
    model, adapted = language_model(config), language_model(config)
    ej.lora.add_adapters(adapted, rank=16, alpha=16.0, rngs=nnx.Rngs(0))
    batch = packed_batch(config.vocab, rows, length, min(length, 512))
    rng = np.random.default_rng(1)
    batch["frozen_nll"] = rng.gamma(2.0, size=batch["targets"].shape).astype(np.float32)
    cases = {name: _compiled(model, name, batch) for name in ("none", *RULES, "kl")}
    cases |= {f"{name}, adapters": _compiled(adapted, name, batch) for name in ("none", "kl")}
    programs = {name: case[0] for name, case in cases.items()}
    seconds = interleave({name: several(*case) for name, case in cases.items()}, rounds)
    kind = "cpu" if on_cpu else "wall"
    found: dict[str, Any] = {}
    for name in cases:
        plain = "none, adapters" if "adapters" in name else "none"
        if name != plain:
            ratio = median_ratio(getattr(seconds[name], kind), getattr(seconds[plain], kind))
            sizes = [programs[n].memory_analysis().temp_size_in_bytes for n in (name, plain)]
            found[name] = {"time": ratio, "temporary": round(sizes[0] / sizes[1], 4)}
    return found


def _compiled(model: nnx.Module, name: str, batch: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
    """The compiled step of a weighting or of the anchor `kl`, its state, and its batch."""
    mesh, batch = ej.make_mesh(), dict(batch)
    adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    optimizer = optax.adamw(1e-5, weight_decay=0.0)
    if name == "kl":
        optimizer = optax.chain(ej.anchor("kl", 0.05), optimizer)
    weighting = None if name in ("none", "flow", "kl") else ej.weightings.get(name)
    if weighting is None or "frozen" not in weighting.needs:
        batch.pop("frozen_nll")
    if name in ("none", "kl"):
        batch["weight"] = np.ones_like(batch["weight"])
    step = ej.make_train_step(
        nnx.graphdef(model),
        ej.causal_lm_loss,
        optimizer,
        reduction="token_mean",
        weighting=weighting,
        mesh=mesh,
    )
    placed = ej.shard_batch(batch, mesh)
    trainable = nnx.LoRAParam if adapters else nnx.Param
    state = ej.init_train_state(model, optimizer, trainable=trainable, mesh=mesh)
    return step.lower(state, placed).compile(), state, placed


def numbers(cap: float | None) -> dict[str, Any]:
    """Statistics of the fused head against those of all logits in float64 on the host."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((4, 128, 64), np.float32)
    head = rng.standard_normal((49_152, 64), np.float32)
    targets = rng.integers(0, len(head), (4, 128))
    logits = np.einsum("btd,vd->btv", np.float64(hidden), np.float64(head))
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    expected = {
        "nll": -np.take_along_axis(log_p, targets[..., None], -1)[..., 0],
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
        "collision": np.exp(2 * log_p).sum(-1),
        "max_prob": np.exp(log_p.max(-1)),
    }
    found = {}
    for precision in ("highest", "default"):
        with jax.default_matmul_precision(precision):
            stats = jax.jit(ej.linear_cross_entropy_stats, static_argnums=3)(
                hidden, head, targets, cap
            )
        for name, values in expected.items():
            error = np.abs(np.float64(getattr(stats, name)) - values).max()
            found[f"{name}, {precision}"] = float(f"{error:.1e}")
    return found


def weightings(small: bool, shared: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Checks of accelerator.py."""
    del shared
    for cap in (None, 30.0):
        yield f"statistics, cap {cap}", functools.partial(numbers, cap)
    yield "steps", functools.partial(steps, small, 4)


PARTS = {"weightings": weightings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for name, figures in steps(jax.default_backend() == "cpu", rounds).items():
        print(name, figures)


if __name__ == "__main__":
    main()
