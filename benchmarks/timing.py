"""Interleaved timing: functions called in turn and compared round by round.

Who goes first rotates: what a function leaves in the caches is the next one's luck. The speed
of a shared machine drifts, but little within one round, so ratios are taken per round and
only then the median over the rounds. CPU seconds, of all threads of this process, count its
own work only: they help to tell a slow program from a busy machine.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Seconds(NamedTuple):
    """What one function took, a value per round."""

    wall: list[float]
    cpu: list[float]


def interleave(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, Seconds]:
    """Times functions in turn: A B C, B C A, C A B, ...

    Args:
      functions: name -> a call that returns when its work is done.
      rounds: how often.
      warm_up: call each once before, untimed, so that compilation is not in the times.
    """
    if warm_up:
        for function in functions.values():
            function()
    seconds = {name: Seconds([], []) for name in functions}
    names = list(functions)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            function = functions[name]
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            seconds[name].wall.append(time.perf_counter() - wall)
            seconds[name].cpu.append(time.process_time() - cpu)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def compared(numerator: Seconds, denominator: Seconds, calls: int = 1) -> tuple[float, str]:
    """The median ratio of wall times, and what to print of the two.

    Args:
      numerator, denominator: of two functions.
      calls: that each made of what is compared, for the times printed.
    """
    ratio = median_ratio(numerator.wall, denominator.wall)
    cpu = median_ratio(numerator.cpu, denominator.cpu)
    ours, theirs = (1e3 * statistics.median(each.wall) / calls for each in (numerator, denominator))
    return ratio, f"{ours:.0f} ms / {theirs:.0f} ms, RATIO {ratio:.3f} (of CPU time {cpu:.3f})"


def against_two(
    name: str,
    weighted: Callable[[], object],
    plain: Callable[[], object],
    pytorch: Callable[[], object],
    *,
    rounds: int,
    torch_bound: float,
    plain_bound: float,
    calls: int = 1,
) -> None:
    """A weighted training step against PyTorch's and an unweighted one; prints, exits on a miss.

    In pairs, not all three in turn: whoever follows PyTorch probably pays for memory that it gave
    back.

    Args:
      name: of the benchmark, and what it runs on.
      weighted, plain, pytorch: `calls` steps each.
      rounds: how often.
      torch_bound: least time of PyTorch's step, of the weighted one's.
      plain_bound: largest time of the weighted step, of the unweighted one's.
    """
    with_plain = interleave({"weighted": weighted, "plain": plain}, rounds)
    with_torch = interleave({"weighted": weighted, "torch": pytorch}, rounds)
    faster, faster_text = compared(with_torch["torch"], with_torch["weighted"], calls)
    slower, slower_text = compared(with_plain["weighted"], with_plain["plain"], calls)
    print(
        f"{name}: PyTorch / weighted {faster_text}, bound {torch_bound}; "
        f"weighted / unweighted {slower_text}, bound {plain_bound}"
    )
    exit_unless(
        faster >= torch_bound and slower <= plain_bound,
        f"PyTorch / weighted >= {torch_bound}, weighted / unweighted <= {plain_bound}",
    )


def exit_unless(holds: bool, bound: str) -> None:
    """Exits with code 1 and a message if a bound is missed."""
    if not holds:
        sys.exit(f"FAILED: the bound is {bound}")
