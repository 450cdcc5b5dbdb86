"""Compilation of a step for a topology: whether it fits, its memory, and its cost."""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from easy_jax.ahead_of_time.chips import GIB, Topology
from easy_jax.ahead_of_time.cost import Cost, cost_of
from easy_jax.ahead_of_time.programs import Program, tree_bytes
from easy_jax.core.step import TrainState

# "Used 17.2G of 15.75G hbm", or for temporaries "... (17.2G) exceeds available HBM (15.75G)".
_NEEDS = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT])(?: of |\) exceeds)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on a chip; activations for the backward pass are part of `temporaries`."""

    parameters: float
    optimizer: float
    resident: float
    batch: float
    activations: float
    temporaries: float
    outputs: float
    code: float

    @property
    def total(self) -> float:
        """Bytes in memory at the same time."""
        parts = (self.parameters, self.optimizer, self.resident, self.batch)
        return sum(parts) + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled step, or the reason why it could not be compiled.

    Attributes:
      name, rows: name and batch size of the program.
      chips: number of chips of the topology.
      needs: bytes needed on a chip; where the compiler gave up, its own figure.
      has: bytes that a chip has.
      compile_seconds: time of the compilation, without lowering.
      memory, cost: memory and cost; None where the compiler gave up for lack of memory.
      model_flops: the model's own operations per chip.
      peak_flops: peak operations per second of a chip.
    """

    name: str
    rows: int
    chips: int
    needs: float
    has: float
    compile_seconds: float
    memory: Memory | None
    cost: Cost | None
    model_flops: float
    peak_flops: float

    @property
    def fits(self) -> bool:
        """Whether the chip has enough memory, which compiling alone does not show."""
        return self.memory is not None and self.needs <= self.has

    def utilisation(self, *, waiting: bool = False) -> float:
        """Returns model flops / peak / step time, with unhidden interconnect time if `waiting`."""
        assert self.cost is not None
        seconds = self.cost.seconds + (self.cost.unhidden_seconds if waiting else 0.0)
        return self.model_flops / self.peak_flops / seconds

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, including derived ones."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"fits": self.fits, "memory": self.memory and dataclasses.asdict(self.memory)}
        if self.cost is not None:
            values["cost"] = {  # `asdict` cannot copy a Counter
                **{
                    name: dict(value) if isinstance(value, Counter) else value
                    for name, value in vars(self.cost).items()
                },
                "seconds": self.cost.seconds,
                "interconnect_bytes": self.cost.interconnect_bytes,
            }
            values["utilisation"] = self.utilisation()
            values["utilisation_waiting"] = self.utilisation(waiting=True)
        return values


def measure(program: Program, topology: Topology) -> Measured:
    """Compiles a program; lack of memory is a result, any other failure raises an error."""
    state = program.state
    if isinstance(state, TrainState):
        parameters = tree_bytes((state.params, state.non_trainable))
        optimizer = tree_bytes(state.opt_state)
    else:
        parameters, optimizer = tree_bytes(state), 0.0
    memory, cost = None, None
    start = time.perf_counter()
    try:
        compiled = program.lowered.compile()
        seconds = time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        found = _NEEDS.search(str(error))
        if found is None:
            raise
        needs = float(found.group(1)) * _UNITS[found.group(2)] + program.resident_bytes
    else:
        sizes = compiled.memory_analysis()
        memory = Memory(
            parameters=parameters,
            optimizer=optimizer,
            resident=program.resident_bytes,
            batch=max(0.0, sizes.argument_size_in_bytes - parameters - optimizer),
            activations=program.activation_bytes,
            temporaries=float(sizes.temp_size_in_bytes),
            outputs=float(sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
            code=float(sizes.generated_code_size_in_bytes),
        )
        needs, cost = memory.total, cost_of(compiled.as_text(), topology)
    return Measured(
        name=program.name,
        rows=program.rows,
        chips=topology.num_chips,
        needs=needs,
        has=topology.chip.hbm_bytes,
        compile_seconds=seconds,
        memory=memory,
        cost=cost,
        model_flops=program.model_flops / topology.num_chips,
        peak_flops=topology.chip.peak_flops,
    )


def largest_batch(fits: Callable[[int], bool], start: int = 1, most: int = 65_536) -> int:
    """Returns the largest number for which `fits` holds, by doubling and bisection; 0 for none.

    Numbers above `most` are not tried.

    Example:
      >>> largest_batch(lambda rows: rows <= 37, start=4)
      37
    """
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def table(results: list[Measured], largest: dict[str, int] | None = None) -> str:
    """Returns a Markdown table with one column per program and one row per measure."""
    columns = [_column(result, (largest or {}).get(result.name)) for result in results]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [["", *(result.name for result in results)]]
    lines += [[name, *(column.get(name, "") for column in columns)] for name in names]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _column(result: Measured, largest: int | None) -> dict[str, str]:
    has, needs = result.has / GIB, result.needs / GIB
    values = {
        "batch": f"{result.rows} rows on {result.chips} chip{'s' if result.chips > 1 else ''}",
        "fits": f"{'yes' if result.fits else 'no'}: needs {needs:.2f} of {has:.2f} GiB",
    }
    if largest is not None:
        values["largest batch that fits"] = f"{largest} rows a chip"
    values["compile time"] = f"{result.compile_seconds:.0f} s"
    memory, cost = result.memory, result.cost
    if memory is None or cost is None:
        return values
    kept, step = min(memory.activations, memory.temporaries), 1e3 * cost.seconds
    for name, size in (
        ("parameters", memory.parameters),
        ("optimiser", memory.optimizer),
        ("pre-trained model, kept", memory.resident),
        ("activations kept for the backward pass", kept),
        ("other temporaries", memory.temporaries - kept),
        ("batch, outputs and code", memory.batch + memory.outputs + memory.code),
    ):
        values[f"HBM: {name}"] = f"{size / GIB:.2f} GiB"
    values |= {
        "model flops of a chip": f"{_digits(result.model_flops / 1e12)} T",
        "flops done / model flops": f"{cost.flops / result.model_flops:.3f}",
        "HBM traffic": f"{_digits(cost.hbm_bytes / 1e9, 2)} GB",
        "step time": f"{_digits(step)} ms ({1e3 * cost.kernel_seconds:.0f} in kernels)",
        "utilisation": f"{result.utilisation():.1%}",
        "unhidden interconnect time": f"{cost.unhidden_seconds * 1e3:.0f} ms",
        "utilisation with it": f"{result.utilisation(waiting=True):.1%}",
    }
    for kind, count in sorted(cost.collectives.items()):
        values[kind] = f"{count:.0f}: {cost.collective_bytes[kind] / 1e9:.2f} GB"
    for kernel, count in sorted(cost.kernels.items()):
        values[f"kernel {kernel}"] = f"{count:.0f}"
    for loop in cost.unknown_loops:
        values[f"{loop}: length unknown"] = "counted once"
    return values


def _digits(value: float, digits: int = 3) -> str:
    """Formats a positive number with some significant digits, or all digits before the point."""
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(value)))}f}" if value else "0"
