"""Runs the package on the accelerator of this machine: numbers, training, speed. See README.md.

python benchmarks/accelerator.py --output=results.jsonl [--small] [--only=numbers] [--match=TEXT]

Every part is a process of its own, so that one that crashes or hangs takes nothing along. Parts
that are about numbers run together; those that are timed run alone, one after the other. Every
result is a printed line, and a line of JSON in the output, as soon as it is there.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Check = tuple[str, Callable[[], dict[str, Any]]]  # a name, and what makes its figures

# Part -> its module, and after how many seconds it is ended.
PARTS = {
    "reference": ("accelerator_numbers", 600),
    "numbers": ("accelerator_numbers", 600),
    "numbers_default": ("accelerator_numbers", 600),
    "resume": ("accelerator_training", 600),
    "quickstart": ("accelerator_training", 600),
    "language": ("accelerator_language", 300),
    "images": ("accelerator_images", 300),
    "pytorch": ("accelerator_pytorch", 300),
    "head": ("accelerator_kernels", 300),
    "attention": ("accelerator_kernels", 300),
    "weightings": ("accelerator_weightings", 300),
}
TOGETHER = ("reference", "numbers", "numbers_default", "resume", "quickstart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--small", action="store_true", help="sizes for a try on a CPU")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--match", default="", help="checks whose name has this expression in it")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all parts together")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a process of its own is to do
    parser.add_argument("--shared", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _work(options.part, options)
        return
    end = time.monotonic() + options.seconds
    wanted = options.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        options.shared = Path(folder)
        _finish([_start(part, options) for part in TOGETHER if part in wanted], options, end)
        for part in PARTS:
            if part in wanted and part not in TOGETHER:
                _finish([_start(part, options)], options, end)


def _start(part: str, options: argparse.Namespace) -> tuple[str, "subprocess.Popen[bytes]"]:
    environment = dict(os.environ)
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment["PYTHONUNBUFFERED"] = "1"
    if part in TOGETHER:  # several share the device's memory
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if part == "reference":
        environment["JAX_PLATFORMS"] = "cpu"
    arguments = [f"--part={part}", f"--output={options.output}", f"--shared={options.shared}"]
    arguments += [f"--match={options.match}"]
    command = [sys.executable, __file__, *arguments, *["--small"] * options.small]
    return part, subprocess.Popen(command, env=environment, start_new_session=True)


def _finish(
    processes: list[tuple[str, "subprocess.Popen[bytes]"]], options: argparse.Namespace, end: float
) -> None:
    """Waits for the processes, and ends those (and what they started) that take too long."""
    start = time.monotonic()
    for part, process in processes:
        left = min(end, start + PARTS[part][1]) - time.monotonic()
        try:
            code = process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _write(options.output, part, "end", {"error": "took too long", "seconds": left})
            continue
        if code:
            _write(options.output, part, "end", {"error": f"exit code {code}"})


def _work(part: str, options: argparse.Namespace) -> None:
    """All checks of a part, each in a try block of its own."""
    start = time.monotonic()
    try:
        module = importlib.import_module(PARTS[part][0])
        checks: Iterator[Check] = module.PARTS[part](options.small, options.shared)
        for name, check in checks:
            if not re.search(options.match, name):
                continue
            begun = time.monotonic()
            try:
                figures = check()
            except Exception as error:
                figures = {"error": _message(error)}
                traceback.print_exc()
            figures["took"] = round(time.monotonic() - begun, 1)
            _write(options.output, part, name, figures)
    except Exception as error:
        _write(options.output, part, "set-up", {"error": _message(error)})
        traceback.print_exc()
    _write(options.output, part, "end", {"seconds": round(time.monotonic() - start, 1)})


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def _write(output: Path, part: str, name: str, figures: dict[str, Any]) -> None:
    """Prints a result, and appends it to the output."""
    line = json.dumps({"part": part, "check": name, **figures}, default=float)
    print(line, flush=True)
    with output.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
