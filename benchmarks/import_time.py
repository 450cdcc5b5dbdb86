"""Time to import easy_jax against that of JAX, Flax and Optax alone. See README.md.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

from timing import exit_unless

ROUNDS = 7
BOUND = 0.3  # seconds beyond `import jax, flax, optax`
PEERS = "import jax, flax, optax"
OURS = "import easy_jax as ej"
STEP = "ej.make_train_step, ej.TrainState, ej.flow_weights"


def seconds(*programs: str) -> list[float]:
    """Seconds that each program takes, one after the other in a fresh interpreter."""
    timed = "".join(
        f"start = time.perf_counter(); {program}; print(time.perf_counter() - start)\n"
        for program in programs
    )
    command = [sys.executable, "-c", f"import time\n{timed}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    rounds = [[*seconds(PEERS, OURS, STEP), *seconds(OURS)] for _ in range(ROUNDS)]
    peers, ours, step, alone = (statistics.median(each) for each in zip(*rounds, strict=True))
    ratio = statistics.median((peer + own) / peer for peer, own, *_ in rounds)
    print(
        f"import: jax, flax, optax {peers:.2f} s; easy_jax {ours:.3f} s more (ratio {ratio:.3f}), "
        f"its training step and weights {step:.2f} s more; easy_jax alone {alone:.2f} s"
    )
    exit_unless(ours <= BOUND, f"{BOUND} s more than jax, flax and optax")


if __name__ == "__main__":
    main()
