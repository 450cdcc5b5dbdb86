"""What fits on which slice, and scaling on paper, from programs that `easy-jax compile` compiled.

  python benchmarks/scale.py runs/scale

compiles what is not in the folder yet and prints docs/scale.md's tables. See README.md.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from easy_jax.ahead_of_time.chips import GIB, parse_topology

MODELS = ("gemma2_2b", "llama32_3b")  # of configs/metamath.py
ROWS = 4  # on each chip
GROUP = 16  # chips that share one copy of the state: the mesh axis fsdp
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:4x4")
METHODS = {"standard": "all", "lora": "train"}  # of a configuration -> programs to compile

V5E = parse_topology("v5e:4x4")
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SLICE = 256  # chips of the largest v5e slice; larger runs are several, joined by the network
NETWORK = 3.1e9  # bytes per second and chip between slices: 25 Gbit/s
RING = 2 * V5E.chip.link_bandwidth  # bytes per second of a closed axis, both directions
EPOCH = 395_000  # MetaMathQA's examples, a row each
PASS = 10**9  # examples of the scoring pass, a row each

Result = dict[str, Any]


def compiled(folder: Path, model: str, method: str, topology: str) -> Result:
    """What `easy-jax compile` wrote, now or before."""
    workdir = folder / f"{model}-{method}-{topology.replace(':', '-')}"
    if not (workdir / "compile.json").exists():
        chips = parse_topology(topology).num_chips
        command = [
            sys.executable,
            "-m",
            "easy_jax.main",
            "compile",
            f"--topology={topology}",
            f"--config=configs/metamath.py:{model},{method}",
            f"--program={METHODS[method]}",
            f"--config.mesh.data={chips // GROUP}",
            f"--config.mesh.fsdp={GROUP}",
            f"--config.finetune.batch_size={ROWS * chips}",
            f"--config.scoring.batch_size={ROWS * chips}",
            f"--workdir={workdir}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: Result = json.loads((workdir / "compile.json").read_text(encoding="utf-8"))
    return result


def print_table(title: str, head: list[str], lines: list[list[str]]) -> None:
    print(f"{title}\n")
    for cells in (head, ["---"] * len(head), *lines):
        print("| " + " | ".join(cells) + " |")
    print()


def fits(result: Result) -> list[list[str]]:
    """A line per program: memory, time and what the interconnect does to it."""
    found = []
    for program in result["programs"]:
        cost = program["cost"]
        found.append(
            [
                result["model"],
                program["name"],
                result["topology"],
                f"{program['rows']:,}",
                f"{'yes' if program['fits'] else 'no'}: {program['needs'] / GIB:.2f} of "
                f"{program['has'] / GIB:.2f} GiB",
                f"{program['compile_seconds']:.0f} s",
                f"{cost['seconds'] * 1e3:.0f} ms",
                f"{program['utilisation']:.1%}",
                f"{cost['unhidden_seconds'] * 1e3:.0f} ms",
                f"{program['utilisation_waiting']:.1%}",
                f"{cost['interconnect_bytes'] / 1e9:.1f} GB",
            ]
        )
    return found


def all_reduce_seconds(gradient_bytes: float, chips: int) -> float:
    """Summing a chip's share of the gradients over the copies: rings inside a slice, then, for a
    share of the share, the network between slices."""
    copies = min(chips, SLICE) // GROUP
    slices = math.ceil(chips / SLICE)
    inside = 2 * gradient_bytes * (copies - 1) / copies / RING
    between = 2 * gradient_bytes / copies * (slices - 1) / slices / NETWORK
    return inside + between


def scaled(program: Result, chips: int, examples: int, extra: float) -> list[str]:
    """A line: a compiled program on that many chips, each with as many rows as were compiled;
    `extra` seconds are added to the interconnect's."""
    cost, chip = program["cost"], V5E.chip
    seconds = cost["seconds"] + cost["unhidden_seconds"] + extra
    rows = program["rows"] // program["chips"] * chips
    times = {
        "compute": cost["flops"] / chip.peak_flops,
        "HBM": cost["hbm_bytes"] / chip.hbm_bandwidth,
        "interconnect": cost["interconnect_bytes"] / RING + extra,
    }
    hours = math.ceil(examples / rows) * seconds / 3600
    return [
        f"{chips:,}",
        f"{rows:,}",
        *(f"{t * 1e3:.0f} ms" for t in times.values()),
        max(times, key=lambda name: times[name]),
        f"{seconds * 1e3:.0f} ms",
        f"{program['model_flops'] / chip.peak_flops / seconds:.1%}",
        f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min",
        f"{hours * chips:,.0f}",
    ]


def scaling(small: Result, slice_: Result) -> None:
    """16 to 4,096 chips, from the program of 16; that of 256 beside it."""
    for program, whole in zip(small["programs"], slice_["programs"], strict=True):
        is_training = program["name"] != "score"
        examples = EPOCH if is_training else PASS
        # Gradients of all trainable parameters in bfloat16; AdamW's moments say how many there are.
        gradients = program["memory"]["optimizer"] / 4 if is_training else 0.0
        lines = [
            scaled(program, chips, examples, all_reduce_seconds(gradients, chips))
            for chips in SIZES
        ]
        check = scaled(whole, whole["chips"], examples, 0.0)
        lines.insert(SIZES.index(SLICE) + 1, [f"{check[0]}, compiled", *check[1:]])
        head = [
            "chips",
            "rows",
            "compute",
            "HBM",
            "interconnect",
            "bound",
            "step",
            "utilisation",
            f"{examples:,} rows",
            "chip-hours",
        ]
        print_table(f"**{small['model']}, {program['name']}**", head, lines)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/scale.py FOLDER")
    folder = Path(sys.argv[1])
    results = {
        (model, method, topology): compiled(folder, model, method, topology)
        for model in MODELS
        for topology in TOPOLOGIES
        for method in METHODS
    }
    head = [
        "model",
        "program",
        "topology",
        "rows",
        "fits",
        "compile",
        "step",
        "utilisation",
        "unhidden",
        "utilisation with it",
        "sent",
    ]
    print_table("**What fits**", head, [line for r in results.values() for line in fits(r)])
    for model in MODELS:
        scaling(*(results[model, "standard", topology] for topology in TOPOLOGIES[:2]))


if __name__ == "__main__":
    main()
