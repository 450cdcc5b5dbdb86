"""Parser of the text of a compiled program (scheduled HLO).

`compiled.as_text()` has one block of instructions per computation, in the order in which the
device runs them; fusions, loops and asynchronous operations name the computations that they
call. Only what a cost model needs is parsed.
"""

import dataclasses
import math
import re

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-~]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-~]+) = (.*)$", re.DOTALL)
_OPERAND = re.compile(r"%([\w.\-~]+)")


class HloError(ValueError):
    """Raised if a text is not the HLO of a compiled program."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """The type of one array.

    Attributes:
      dtype: the element type as HLO spells it, such as `bf16`.
      dims: the size of every axis.
      in_hbm: whether the array is in HBM; on-chip memories are memory spaces above 0.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> float:
        """Size in bytes, without the padding of tiles."""
        return _BYTES[self.dtype] * math.prod(self.dims)


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction, one line of the text: `%name = shapes opcode(operands), attributes`.

    `literal` is the text between the parentheses of a constant or a parameter.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> str:
        """Returns the name of the computation in one of these attributes; default: `calls`.

        Raises:
          HloError: the instruction has none of them.
        """
        for key in keys or ("calls",):
            found = re.search(rf"\b{key}=%?([\w.\-~]+)", self.attributes)
            if found:
                return found.group(1)
        raise HloError(f"%{self.name} is a {self.opcode} that calls nothing")

    def number(self, pattern: str) -> int | None:
        """Returns the integer that the pattern's group matches in the attributes."""
        found = re.search(pattern, self.attributes)
        return int(found.group(1)) if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A compiled program.

    Attributes:
      computations: computations by name; each maps names to instructions, in schedule order.
      entry: name of the computation with which the program starts.
    """

    computations: dict[str, Computation]
    entry: str

    def inside(self, instruction: Instruction) -> Computation:
        """Returns the computation that a fusion, or an asynchronous start, runs."""
        return self.computations[instruction.called()]

    def root(self, computation: str) -> Instruction:
        """Returns the instruction whose value a computation returns."""
        return next(i for i in self.computations[computation].values() if i.is_root)


def parse(text: str) -> Program:
    """Parses scheduled HLO.

    Raises:
      HloError: the text has no entry computation.

    Example:
      >>> program = parse('''
      ... ENTRY %main (a: f32[2]) -> f32[2] {
      ...   %a = f32[2]{0} parameter(0)
      ...   ROOT %b = f32[2]{0} add(%a, %a)
      ... }
      ... ''')
      >>> program.root("main").opcode
      'add'
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in _lines(text):
        if current is None or not line.startswith(" "):
            header = _COMPUTATION.match(line)
            current = {} if header else None
            if header and current is not None:
                computations[header.group(2)] = current
                entry = header.group(2) if header.group(1) else entry
            continue
        instruction = _instruction(line)
        if instruction is not None:
            current[instruction.name] = instruction
    if not entry:
        raise HloError("there is no ENTRY computation in the text of the program")
    return Program(computations, entry)


def _lines(text: str) -> list[str]:
    """Yields the lines, after joining the line breaks within the metadata of Pallas kernels."""
    joined: list[str] = []
    for line in text.splitlines():
        starts = line.startswith("  ") or not line.strip() or line == "}" or "{" in line[-1:]
        if starts or not joined or not joined[-1].startswith("  "):
            joined.append(line)
        else:
            joined[-1] += line
    return joined


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    rest = found.group(3)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, call = rest[:end], rest[end:].strip()
    opcode = re.match(r"([\w\-]+)\(", call)
    if not opcode:
        return None
    close = _closing(call, opcode.end() - 1)
    inside = call[opcode.end() : close]
    is_literal = opcode.group(1) in ("constant", "parameter")
    return Instruction(
        name=found.group(2),
        opcode=opcode.group(1),
        shapes=_shapes(kind),
        operands=() if is_literal else tuple(_OPERAND.findall(inside)),
        literal=inside if is_literal else "",
        attributes=call[close + 1 :],
        is_root=bool(found.group(1)),
    )


def _closing(text: str, start: int) -> int:
    """Returns the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return len(text)


def _shapes(kind: str) -> tuple[Shape, ...]:
    shapes = []
    for found in _SHAPE.finditer(kind):
        if found.group(1) in _BYTES:
            dims = tuple(int(size) for size in found.group(2).split(",") if size)
            space = _SPACE.search(found.group(0))
            shapes.append(Shape(found.group(1), dims, space is None or space.group(1) == "0"))
    return tuple(shapes)
