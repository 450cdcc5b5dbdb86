"""The training step of Gemma 2 2B on v5e:4x4 against google-tunix's, compiled alike. See README.md.

python benchmarks/tunix_ahead_of_time.py
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from typing import Any

from easy_jax.ahead_of_time import chips, command, cost, language_programs

TOPOLOGY = chips.parse_topology("v5e:4x4")
MODEL = "google/gemma-2-2b"
ROWS, LENGTH = 64, 1024
SIDES = ("tunix", "full", "outputs")  # the peer; ours by what the backward pass computes again
# Ours / tunix, at most: temporaries, step time, compile time, interconnect bytes, flops.
BOUNDS = {
    "full": {"temporaries": 0.3, "step": 0.65, "compile": 0.4, "interconnect": 1.1, "flops": 1.0},
    "outputs": {"temporaries": 0.8, "step": 0.6, "compile": 0.4, "interconnect": 1.1, "flops": 1.0},
}
UTILISATION = 0.6  # of ours with `outputs`, at least


def ours(remat: str) -> Any:
    """The product's training step: float32 parameters and AdamW, bfloat16 computation."""
    from easy_jax.config import (
        LanguageConfig,
        LanguageModelConfig,
        MeshConfig,
        MethodConfig,
        OptimizerConfig,
        StageConfig,
        TextConfig,
    )
    from easy_jax.parallel import sharding

    config = LanguageConfig(
        mesh=MeshConfig(data=1, fsdp=-1),
        model=LanguageModelConfig(path=MODEL, remat=remat),
        text=TextConfig(row_length=LENGTH, max_length=LENGTH, max_segments=1),
        finetune=StageConfig(
            reduction="token_mean", optimizer=OptimizerConfig(name="adamw", weight_decay=0.1)
        ),
    )
    mesh = sharding.make_mesh(config.mesh, command.devices(TOPOLOGY))
    return language_programs.train_program(config, MethodConfig(), mesh, ROWS).lowered


def _placed(leaf: Any, spec: Any, mesh: Any) -> Any:
    """Returns the abstract array in bfloat16, sharded along the axes that its shape divides by."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    axes = tuple(spec) if isinstance(spec, PartitionSpec) else ()
    axes += (None,) * (len(leaf.shape) - len(axes))
    fits = [
        a if a and size % mesh.shape[a] == 0 else None
        for a, size in zip(axes, leaf.shape, strict=True)
    ]
    sharding = NamedSharding(mesh, PartitionSpec(*fits))
    dtype = jnp.bfloat16 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _sharded(model: Any, mesh: Any) -> tuple[Any, Any]:
    """Returns the abstract model and its optimiser with shardings on the mesh."""
    import jax
    import optax
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    graphdef, state = nnx.split(model)
    specs = {
        path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.get_partition_spec(state))
    }
    placed = {
        path: leaf.replace(_placed(leaf.get_value(), specs[path], mesh))
        for path, leaf in nnx.to_flat_state(state)
    }
    model = nnx.merge(graphdef, nnx.from_flat_state(list(placed.items())))
    optimizer = nnx.eval_shape(
        lambda model: nnx.Optimizer(model, optax.adamw(1e-5, weight_decay=0.1), wrt=nnx.Param),
        model,
    )
    optimizer_def, optimizer_state = nnx.split(optimizer)
    moments = []
    for path, leaf in nnx.to_flat_state(optimizer_state):
        value = leaf.get_value()
        same = [p for name, p in placed.items() if path[-len(name) :] == name]
        sharding = same[0].get_value().sharding if same and value.ndim else None
        sharding = sharding or NamedSharding(mesh, PartitionSpec())
        moments.append(
            (path, leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)))
        )
    optimizer = nnx.merge(optimizer_def, nnx.from_flat_state(moments))
    return model, optimizer


def tunix() -> Any:
    """The step of tunix's trainer with its loss, model and rematerialised decoder, in bfloat16."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec
    from tunix.models.gemma import model as gemma
    from tunix.sft import peft_trainer, utils

    mesh = jax.sharding.Mesh(np.array(command.devices(TOPOLOGY)).reshape(-1, 1), ("fsdp", "tp"))
    # Tunix shards activations on TPUs only, and takes the platform of this process for it.
    gemma.shard = lambda x, spec: jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, PartitionSpec(*spec))
    )
    sizes = dataclasses.replace(
        gemma.ModelConfig.gemma2_2b(), remat_config=gemma.RematConfig.DECODER
    )
    model = nnx.eval_shape(lambda: gemma.Gemma(sizes, rngs=nnx.Rngs(0)))

    model, optimizer = _sharded(model, mesh)

    def inputs_of(batch: Any) -> dict[str, Any]:
        mask = batch["input_mask"]
        return {
            **batch,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    trainer = types.SimpleNamespace(
        gen_model_input_fn=inputs_of,
        loss_fn=peft_trainer._default_loss_fn,
        _lora_enabled=False,
        _has_aux=False,
    )

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        return peft_trainer.PeftTrainer._train_step(trainer, model, optimizer, batch)

    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    batch = {
        "input_tokens": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=rows),
        "input_mask": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_, sharding=rows),
    }
    with mesh:
        return nnx.jit(step, donate_argnames=("optimizer",)).lower(model, optimizer, batch)


def one(side: str) -> None:
    """Compiles one side and prints what it gave as JSON."""
    lowered = tunix() if side == "tunix" else ours(side)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    found = cost.cost_of(compiled.as_text(), TOPOLOGY)
    values = {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "step": found.seconds,
        "compile": seconds,
        "interconnect": found.interconnect_bytes,
        "flops": found.flops,
        "unhidden": found.unhidden_seconds,
    }
    print(json.dumps(values))


def main() -> None:
    if len(sys.argv) > 1:
        one(sys.argv[1])
        return
    environment = {**os.environ, **command.environment(TOPOLOGY), "PYTHONWARNINGS": "ignore"}
    found = {}
    for side in SIDES:  # one after the other, each alone on the machine
        arguments = [sys.executable, __file__, side]
        done = subprocess.run(
            arguments, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        found[side] = json.loads(done.stdout.splitlines()[-1])
        values = found[side]
        print(
            f"tunix_ahead_of_time: {side}: "
            f"temporaries {values['temporaries'] / chips.GIB:.2f} GiB, "
            f"step {values['step'] * 1e3:.0f} ms, unhidden interconnect "
            f"{values['unhidden'] * 1e3:.0f} ms, interconnect "
            f"{values['interconnect'] / 1e9:.2f} GB, {values['flops'] / 1e12:.1f} Tflop, compile "
            f"{values['compile']:.0f} s",
            flush=True,
        )
    model_flops = language_programs.model_flops(
        language_programs.KNOWN[MODEL], ROWS, LENGTH, passes=3.0
    )
    ideal = model_flops / TOPOLOGY.num_chips / TOPOLOGY.chip.peak_flops
    missed = []
    for side, bounds in BOUNDS.items():
        ratios = {name: found[side][name] / found["tunix"][name] for name in bounds}
        waiting = [found[s]["step"] + found[s]["unhidden"] for s in (side, "tunix")]
        missed += [f"{side} {name}" for name, bound in bounds.items() if ratios[name] > bound]
        print(
            f"tunix_ahead_of_time: {side} / tunix: "
            + ", ".join(f"{name} {ratios[name]:.3f} (bound {bounds[name]})" for name in bounds)
            + f"; step with unhidden interconnect {waiting[0] / waiting[1]:.3f}; utilisation "
            f"{ideal / found[side]['step']:.3f}, with unhidden {ideal / waiting[0]:.3f}"
        )
    if ideal / found["outputs"]["step"] < UTILISATION:
        missed.append("outputs utilisation")
    if missed:
        print(f"MISSED: {', '.join(missed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
