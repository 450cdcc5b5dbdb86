"""Cost of a compiled program, summed over its schedule, with loop bodies counted on every trip.

XLA's own `cost_analysis()` counts a loop's body once, although a model scanned over its layers
is one loop. Here every instruction counts as often as it runs:

  time           the compiler's estimated cycles. Two kinds of instructions have no estimate:
                 Pallas kernels count their operations at half of the chip's peak, gradients of
                 max pooling their HBM bytes at the chip's bandwidth
  operations     of matrix products and convolutions; of attention kernels, by formula
  HBM            bytes of operands and results that do not stay in on-chip memory
  interconnect   bytes that a chip sends with ring algorithms, and the time of transfers that
                 does not overlap with computation (the unhidden time)

The unhidden time comes from a simple model: transfers run one after the other at the links'
bandwidth and begin at the instruction that starts them; the chip waits at the one that ends them.
"""

import dataclasses
import math
import re
from collections import Counter

from easy_jax.ahead_of_time.chips import Topology
from easy_jax.ahead_of_time.hlo import Computation, HloError, Instruction, Program, Shape, parse
from easy_jax.ahead_of_time.loops import trip_count
from easy_jax.ahead_of_time.operations import SPLASH, convolution_flops, dot_flops, splash_flops

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
KERNEL_EFFICIENCY = 0.5  # share of the peak that a Pallas kernel is assumed to reach
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "partition-id",
        "replica-id",
        "after-all",
        "iota",
        "optimization-barrier",
        "copy-done",
        "slice-done",
        "dynamic-slice-done",
        "async-update",
        "domain",
    }
)


@dataclasses.dataclass
class Cost:
    """Cost per chip and step.

    Attributes:
      flops: operations, including those of kernels.
      kernel_flops: operations of Pallas kernels only.
      cycles_seconds: estimated time of everything but kernels.
      kernel_seconds: estimated time of kernels.
      hbm_bytes: bytes read from and written to HBM.
      unhidden_seconds: time spent waiting for the interconnect.
      collectives: number of collectives by kind.
      collective_bytes: bytes sent by kind.
      kernels: number of calls by Pallas kernel.
      unknown_loops: number of loops whose trips the program does not tell; they count once.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    cycles_seconds: float = 0.0
    kernel_seconds: float = 0.0
    hbm_bytes: float = 0.0
    unhidden_seconds: float = 0.0
    collectives: Counter[str] = dataclasses.field(default_factory=Counter)
    collective_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """The estimated time of a step, without the interconnect."""
        return self.cycles_seconds + self.kernel_seconds

    @property
    def interconnect_bytes(self) -> float:
        return sum(self.collective_bytes.values())

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds another cost, multiplied by `times`."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Counter):
                for key, value in theirs.items():
                    mine[key] += value * times
            else:
                setattr(self, field.name, mine + theirs * times)


def cost_of(text: str, topology: Topology) -> Cost:
    """Returns the cost of a compiled program on a topology, from `compiled.as_text()`.

    Raises:
      HloError: the text is not that of a compiled program.

    Example:
      >>> from easy_jax.ahead_of_time.chips import parse_topology
      >>> text = '''
      ... ENTRY %main (a: bf16[4,8], b: bf16[8,2]) -> bf16[4,2] {
      ...   %a = bf16[4,8]{1,0} parameter(0)
      ...   %b = bf16[8,2]{1,0} parameter(1)
      ...   ROOT %c = bf16[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ... }
      ... '''
      >>> cost_of(text, parse_topology("v5e:4x4")).flops  # 2 * 4 * 8 * 2
      128.0
    """
    program = parse(text)
    return _Walk(program, topology).computation(program.entry)


@dataclasses.dataclass
class _Transfer:
    """A collective, from the instruction that starts it to the one that needs its result."""

    kind: str
    bytes: float
    seconds: float


class _Walk:
    def __init__(self, program: Program, topology: Topology):
        self.program = program
        self.topology = topology
        self.started: set[str] = set()  # channels; some transfers continue inside a later loop

    def computation(self, name: str) -> Cost:
        """Returns the cost of one run of a computation, including what it calls."""
        block = self.program.computations[name]
        transfers = {i: self._transfers(block, i) for i in block}
        last = {key: i for i, found in transfers.items() for key in found}
        total = Cost()
        now, free, compute = 0.0, 0.0, 0.0
        finish: dict[str, float] = {}
        for i, instruction in block.items():
            cost = self._instruction(block, instruction)
            total.add(cost)
            for key, transfer in transfers[i].items():
                if key not in finish and key not in self.started:
                    free = finish[key] = max(now, free) + transfer.seconds
                    total.collectives[transfer.kind] += 1
                    total.collective_bytes[transfer.kind] += transfer.bytes  # type: ignore[assignment]
                    self.started |= {key} if ":" in key else set()
            now += cost.seconds + cost.unhidden_seconds
            compute += cost.seconds + cost.unhidden_seconds
            for key in transfers[i]:
                if key in finish and last[key] == i:
                    now = max(now, finish[key])
        total.unhidden_seconds += now - compute
        return total

    def _instruction(self, block: Computation, instruction: Instruction) -> Cost:
        cost = Cost()
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(self.program, block, instruction)
            if trips is None:
                cost.unknown_loops[instruction.name] += 1
            body = self.computation(instruction.called("body"))
            cost.add(body, 1 if trips is None else trips)
        elif opcode == "conditional":
            branches = [self.computation(name) for name in _branches(instruction)]
            cost.add(max(branches, key=lambda branch: branch.seconds + branch.unhidden_seconds))
        elif opcode == "call":
            cost.add(self.computation(instruction.called("to_apply", "calls")))
        elif opcode == "custom-call":
            self._kernel(cost, block, instruction)
        elif opcode not in _FREE and not _kind(instruction) and not opcode.startswith("async-"):
            cost.flops = self._flops(block, instruction)
            cost.hbm_bytes = self._hbm_bytes(block, instruction)
            cycles = instruction.number(r'"estimated_cycles":"(\d+)"')
            cost.cycles_seconds = (cycles or 0) / self.topology.chip.clock
            if opcode == "select-and-scatter" and cycles is None:
                cost.cycles_seconds = cost.hbm_bytes / self.topology.chip.hbm_bandwidth
        return cost

    # Matrix products.

    def _flops(self, block: Computation, instruction: Instruction) -> float:
        if instruction.opcode in ("dot", "convolution"):
            lhs, rhs = (block[name].shapes[0].dims for name in instruction.operands[:2])
            out = instruction.shapes[0].dims
            if instruction.opcode == "dot":
                return dot_flops(instruction, lhs, out)
            return convolution_flops(instruction, lhs, rhs, out)
        if instruction.opcode != "fusion":
            return 0.0
        inner = self.program.inside(instruction)
        return sum(self._flops(inner, each) for each in inner.values())

    def _kernel(self, cost: Cost, block: Computation, instruction: Instruction) -> None:
        """Counts a Pallas kernel; other custom calls only mark or allocate."""
        if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
            return
        operands = _given(block, instruction)
        splash = SPLASH.search(instruction.attributes) or SPLASH.search(instruction.name)
        if splash:
            cost.flops = splash_flops(splash.group(1), instruction, operands)
            cost.kernels[splash.group(0)] += 1
        else:
            cost.flops = float(instruction.number(r'"flops":"?(\d+)') or 0)
            cost.kernels[instruction.name] += 1
        cost.kernel_flops = cost.flops
        cost.kernel_seconds = cost.flops / (KERNEL_EFFICIENCY * self.topology.chip.peak_flops)
        cost.hbm_bytes = _hbm((*operands, *instruction.shapes))

    # Memory.

    def _hbm_bytes(self, block: Computation, instruction: Instruction) -> float:
        opcode = instruction.opcode
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm(instruction.shapes)
        if opcode == "dynamic-update-slice":
            return 2 * _hbm(block[instruction.operands[1]].shapes)
        if opcode == "copy-start":
            return _hbm(instruction.shapes[:2])
        if opcode in ("slice-start", "dynamic-slice-start"):  # (operands, the slice, a counter)
            source, *_, part, _ = instruction.shapes
            return part.bytes * (source.in_hbm + part.in_hbm)
        if opcode != "fusion":
            return _hbm((*_given(block, instruction), *instruction.shapes))
        inner = self.program.inside(instruction)
        parameters = {int(i.literal): i.name for i in inner.values() if i.opcode == "parameter"}
        total = 0.0
        for number, name in enumerate(instruction.operands):
            size = _hbm(block[name].shapes) if name in block else 0.0
            if size and number in parameters:
                size = min(size, self._read(inner, parameters[number], size))
            total += size
        return total + self._written(inner, instruction)

    def _read(self, block: Computation, name: str, size: float) -> float:
        """Returns how many bytes of a fusion's parameter are read, `size` at most."""
        total = 0.0
        for user in block.values():
            if name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # written in place
            elif user.opcode in ("tuple", "custom-call") or _kind(user):
                continue  # passed on, or sent to other chips
            elif user.opcode in ("bitcast", "reshape"):
                total += self._read(block, user.name, size)
            elif user.opcode == "fusion":
                inner = self.program.inside(user)
                number = str(user.operands.index(name))
                parameter = next(
                    i.name
                    for i in inner.values()
                    if i.opcode == "parameter" and i.literal == number
                )
                total += self._read(inner, parameter, size)
            else:
                return size
        return min(total, size)

    def _written(self, inner: Computation, instruction: Instruction) -> float:
        """Returns the bytes of a fusion's results; for an update in place, those of the update."""
        root = next(i for i in inner.values() if i.is_root)
        while root.opcode in ("bitcast", "reshape", "copy", "convert") and root.operands:
            if root.operands[0] not in inner:
                break
            root = inner[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return sum(shape.bytes for shape in inner[root.operands[1]].shapes)
        if root.opcode == "fusion":
            return self._written(self.program.inside(root), instruction)
        if root.opcode == "tuple" and len(root.operands) == len(instruction.shapes):
            made = zip(root.operands, instruction.shapes, strict=True)
            return _hbm([shape for name, shape in made if _is_made(inner[name])])
        return _hbm(instruction.shapes)

    # Interconnect.

    def _transfers(self, block: Computation, name: str) -> dict[str, _Transfer]:
        """Returns the collectives that an instruction starts, continues or ends, by a key of each.

        An asynchronous collective consists of several instructions: a start and a done, or
        fusions that each do a part of it besides their own work. They share its channel.
        """
        instruction = block[name]
        opcode = instruction.opcode
        if opcode.endswith("-done") and instruction.operands[0] in block:
            source = block[instruction.operands[0]]
            while source.opcode in ("async-update", "get-tuple-element"):
                source = block[source.operands[0]]
            return self._transfers(block, source.name) if source is not instruction else {}
        kind = _kind(instruction)
        if kind:
            channel = instruction.number(r"channel_id=(\d+)")
            shared = channel is not None and kind != "collective-permute"
            key = f"{kind}:{channel}" if shared else name
            return {key: self._transfer(block, instruction, kind)}
        if opcode in ("fusion", "async-start"):
            inner = self.program.inside(instruction)
            found: dict[str, _Transfer] = {}
            for each in inner:
                for key, transfer in self._transfers(inner, each).items():
                    found[key if ":" in key else f"{name}/{key}"] = transfer
            return found
        return {}

    def _transfer(self, block: Computation, instruction: Instruction, kind: str) -> _Transfer:
        sent = float(sum(shape.bytes for shape in _given(block, instruction)))
        group = group_size(instruction.attributes, self.topology.num_chips)
        if kind == "all-gather":
            size = sent * (group - 1)
        elif kind == "all-reduce":
            size = 2 * sent * (group - 1) / group
        elif kind == "collective-permute":
            size = sent
        else:
            size = sent * (group - 1) / group
        return _Transfer(kind, size, size / self.topology.bandwidth(group))


def group_size(attributes: str, num_chips: int) -> int:
    """Returns how many chips take part, from any notation of `replica_groups`; all if it is empty.

    Raises:
      HloError: the notation is unknown.

    Example:
      >>> group_size("replica_groups={{0,1,2,3},{4,5,6,7}}", 8)
      4
      >>> group_size("replica_groups=[2,8]<=[16]", 16)
      8
      >>> group_size("replica_groups=mesh['a'=16,'b'=2], device_ids=([2,16]T(1,0)) {'a'}", 32)
      16
    """
    found = re.search(r"replica_groups=(.*)", attributes)
    if not found or found.group(1).startswith("{}"):
        return num_chips
    text = found.group(1)
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", text)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh.group(2)))
    listed = re.match(r"\{\{([\d,]+)\}", text)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.match(r"\[\d+,(\d+)\]<=", text)
    if iota:
        return int(iota.group(1))
    raise HloError(f"replica groups in a notation that is not known: {text[:80]}")


def _kind(instruction: Instruction) -> str | None:
    """Returns the kind of collective that an instruction is or starts."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def _is_made(instruction: Instruction) -> bool:
    """Returns whether a fusion writes this result, rather than passing on its input."""
    handed_on = ("parameter", "custom-call", "get-tuple-element", "tuple")
    return instruction.opcode not in handed_on and _kind(instruction) is None


def _branches(instruction: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if found:
        return re.findall(r"%?([\w.\-~]+)", found.group(1))
    keys = ("true_computation", "false_computation")
    return [instruction.called(key) for key in keys]


def _given(block: Computation, instruction: Instruction) -> list[Shape]:
    """Returns the arrays that an instruction takes."""
    return [shape for name in instruction.operands if name in block for shape in block[name].shapes]


def _hbm(shapes: tuple[Shape, ...] | list[Shape]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.in_hbm))
