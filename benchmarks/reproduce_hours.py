"""Hours that the paper's image experiments take, from programs that `easy-jax compile` compiled.

  python benchmarks/reproduce_hours.py runs/reproduce [--topology=v5e:1x1] [--models MODEL ...]

compiles what is not in the folder yet and prints docs/reproduce.md's tables. See README.md.
"""

import argparse
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from easy_jax.ahead_of_time.chips import GIB
from easy_jax.ahead_of_time.image_programs import kinds
from easy_jax.config import RESNETS, ExperimentConfig
from easy_jax.data.known_images import DATA_SETS
from easy_jax.experiments.plan import runs

CONFIG = "configs/resnet_transfer.py"
# Images of each data set's own splits: training, validation where it has one, and test.
IMAGES: dict[Any, dict[str, int]] = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "oxford_flowers102": {"train": 1_020, "validation": 1_020, "test": 6_149},
    "caltech101": {"train": 3_060, "test": 6_084},
    "stanford_dogs": {"train": 12_000, "test": 8_580},
    "cars196": {"train": 8_144, "test": 8_041},
}
IMAGENET_TEST = 50_000  # its validation split

Result = dict[str, Any]
get_config = runpy.run_path(CONFIG)["get_config"]


def compiled(folder: Path, model: str, topology: str) -> dict[str, Result]:
    """The programs that `easy-jax compile` wrote, now or before, by name.

    Of a data set they only know how many classes it has: one stands for all. Nor does the pull
    of `l2` show in them, which reads the parameters once more.
    """
    workdir = folder / f"{model}-{topology.replace(':', '-')}"
    if not (workdir / "compile.json").exists():
        command = [
            sys.executable,
            "-m",
            "easy_jax.main",
            "compile",
            f"--topology={topology}",
            f"--config={CONFIG}:{model},cifar10",
            "--config.only=linear_probe,standard",
            f"--workdir={workdir}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: Result = json.loads((workdir / "compile.json").read_text(encoding="utf-8"))
    return {program["name"]: program for program in result["programs"]}


def step_seconds(program: Result) -> float:
    seconds: float = program["cost"]["seconds"] + program["cost"]["unhidden_seconds"]
    return seconds


def sizes(name: Any) -> dict[str, int]:
    """Images of our three splits; what validates may be cut out of the training data."""
    data_set, images = DATA_SETS[name], IMAGES[name]
    if "validation" in images:
        return images
    validation = round(data_set.validation_share * images["train"])
    return {**images, "train": images["train"] - validation, "validation": validation}


def work(config: ExperimentConfig, size: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What a whole run does, by program: steps and images."""
    found: dict[str, tuple[int, int]] = {}
    trained = 0
    for name, stages in kinds(config).items():
        program = name.split(", ")[0]  # without the anchor
        steps, images = found.get(program, (0, 0))
        for stage in stages:
            assert stage.config is not None
            seen = size["train"] * stage.config.epochs
            steps, images = steps + math.ceil(seen / stage.config.batch_size), images + seen
            trained += 1
        found[program] = steps, images
    tests = len(list(runs(config)))
    passes = [  # how often, over how many
        (1, size["train"]),
        (1, size["test"]),  # the loss tables
        (trained, size["validation"]),  # the learning curves, once in a stage
        (1, IMAGENET_TEST),  # before fine-tuning
        (tests, IMAGENET_TEST),
        (tests, size["test"]),
        (tests, size["validation"]),
    ]
    batch = config.eval_batch_size
    assert batch == config.scoring.batch_size and config.eval_every_epochs == config.probe.epochs
    steps = sum(times * math.ceil(images / batch) for times, images in passes)
    found["score"] = steps, sum(times * images for times, images in passes)
    return found


def print_table(title: str, words: int, head: list[str], lines: list[list[str]]) -> None:
    """A Markdown table whose first columns, so many, are words, and the others numbers."""
    print(f"{title}\n")
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    for line in (head, rule, *lines):
        print("| " + " | ".join(line) + " |")
    print()


def step_line(model: str, program: Result) -> list[str]:
    seconds = step_seconds(program)
    return [
        model,
        program["name"],
        f"{program['rows']:,}",
        f"{program['needs'] / GIB:.2f} GiB",
        f"{seconds * 1e3:.1f} ms",
        f"{program['rows'] / seconds:,.0f}",
        f"{program['utilisation_waiting']:.0%}",
        f"{program['compile_seconds']:.0f} s",
    ]


def hours(done: dict[str, tuple[int, int]], programs: dict[str, Result]) -> str:
    """Of a run, and of that, scoring and evaluation."""
    seconds = {name: steps * step_seconds(programs[name]) for name, (steps, _) in done.items()}
    return f"{sum(seconds.values()) / 3600:.2f} ({seconds['score'] / 3600:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Hours of the paper's image experiments.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=RESNETS, default=[*RESNETS])
    parser.add_argument("--topology", default="v5e:1x1")
    flags = parser.parse_args()
    programs = {model: compiled(flags.folder, model, flags.topology) for model in flags.models}
    head = [
        "model",
        "program",
        "batch",
        "memory of a chip",
        "step",
        "images/s",
        "utilisation",
        "compile",
    ]
    lines = [step_line(model, each) for model in programs for each in programs[model].values()]
    print_table(f"**Steps on {flags.topology}**", 2, head, lines)
    lines = []
    for data in IMAGES:
        size = sizes(data)
        done = work(get_config(f"{flags.models[0]},{data}"), size)  # of any model
        trained = sum(images for name, (_, images) in done.items() if name != "score")
        lines.append(
            [
                data,
                *(f"{size[split]:,}" for split in ("train", "validation", "test")),
                f"{trained / 1e6:.2f} M",
                f"{done['score'][1] / 1e6:.2f} M",
                *(hours(done, programs[model]) for model in programs),
            ]
        )
    head = [
        "data set",
        "train",
        "validation",
        "test",
        "views trained on",
        "scored and evaluated",
        *programs,
    ]
    print_table(f"**Hours on {flags.topology}**", 1, head, lines)


if __name__ == "__main__":
    main()
