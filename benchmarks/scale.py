"""Scaling on paper, from programs measured by `easy-jax compile` on v5e:4x4. See README.md.

easy-jax compile --config=configs/gemma2_2b_metamath.py --topology=v5e:4x4 --workdir=runs/scale
python benchmarks/scale.py runs/scale/compile.json
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from easy_jax.ahead_of_time.chips import parse_topology

TOPOLOGY = parse_topology("v5e:4x4")
GROUP = TOPOLOGY.num_chips  # share one copy of the state: the mesh axis fsdp
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SLICE = 256  # chips of the largest v5e slice; larger runs are several, joined by the network
NETWORK = 3.1e9  # bytes per second and chip between slices: 25 Gbit/s
RING = 2 * TOPOLOGY.chip.link_bandwidth  # bytes per second of a closed axis, both directions
EPOCH = 395_000  # MetaMathQA's examples, a row each
PASS = 10**9  # examples of the scoring pass, a row each


def all_reduce_seconds(gradient_bytes: float, chips: int) -> float:
    """Summing a chip's share of the gradients over the copies: rings inside a slice, then, for a
    share of the share, the network between slices."""
    copies = min(chips, SLICE) // GROUP
    slices = math.ceil(chips / SLICE)
    inside = 2 * gradient_bytes * (copies - 1) / copies / RING
    between = 2 * gradient_bytes / copies * (slices - 1) / slices / NETWORK
    return inside + between


def lines(program: dict[str, Any], examples: int) -> list[list[str]]:
    """One line per number of chips, with as many rows on each as were compiled."""
    chip = TOPOLOGY.chip
    cost = program["cost"]
    is_training = program["name"] != "score"
    # Gradients of all trainable parameters in bfloat16; AdamW's moments say how many there are.
    gradients = program["memory"]["optimizer"] / 4 if is_training else 0.0
    found = []
    for chips in SIZES:
        extra = all_reduce_seconds(gradients, chips)
        waiting = cost["unhidden_seconds"] + extra
        seconds = cost["seconds"] + waiting
        rows = program["rows"] // program["chips"] * chips
        times = {
            "compute": cost["flops"] / chip.peak_flops,
            "HBM": cost["hbm_bytes"] / chip.hbm_bandwidth,
            "interconnect": cost["interconnect_bytes"] / RING + extra,
        }
        hours = math.ceil(examples / rows) * seconds / 3600
        took = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        found.append([
            f"{chips:,}", f"{rows:,}", *(f"{t * 1e3:.0f} ms" for t in times.values()),
            max(times, key=lambda name: times[name]), f"{seconds * 1e3:.0f} ms",
            f"{program['model_flops'] / chip.peak_flops / seconds:.1%}", took,
            f"{hours * chips:,.0f}",
        ])  # fmt: skip
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/scale.py COMPILE.JSON")
    content = json.loads(Path(sys.argv[1]).read_text())
    mesh = {"data": 1, "fsdp": GROUP, "tensor": 1}
    if content["topology"] != TOPOLOGY.name or content["mesh"] != mesh:
        sys.exit(f"scale.py starts from {TOPOLOGY.name} with the mesh data=1, fsdp={GROUP}")
    for program in content["programs"]:
        examples = PASS if program["name"] == "score" else EPOCH
        head = ["chips", "rows", "compute", "HBM", "interconnect", "bound", "step", "utilisation",
                f"{examples:,} rows", "chip-hours"]  # fmt: skip
        print(f"{content['model']}, {program['name']}\n")
        for cells in (head, ["---"] * len(head), *lines(program, examples)):
            print("| " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
