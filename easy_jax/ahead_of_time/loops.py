"""The number of trips of loops in a compiled program."""

import re
from collections.abc import Callable

from easy_jax.ahead_of_time.hlo import Computation, Instruction, Program

_SAME = ("copy", "convert", "bitcast", "optimization-barrier", "copy-done", "copy-start")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NE": lambda a, b: a != b,
    "EQ": lambda a, b: a == b,
}
_MOST = 100_000


def trip_count(program: Program, block: Computation, loop: Instruction) -> int | None:
    """Returns the number of trips of a `while`, from the compiler's note or by running its counter.

    Args:
      program: the program that contains the loop.
      block: the computation that contains the loop.
      loop: the instruction.

    Returns:
      The number; None if it depends on data.
    """
    known = loop.number(r'"known_trip_count":\{"n":"(\d+)"')
    if known is not None:
        return known
    condition_name, body_name = loop.called("condition"), loop.called("body")
    condition, body = (program.computations[name] for name in (condition_name, body_name))
    compare = program.root(condition_name)
    while compare.opcode in _SAME:
        compare = condition[compare.operands[0]]
    direction = re.search(r"direction=(\w+)", compare.attributes)
    start, following = block[loop.operands[0]], program.root(body_name)
    if compare.opcode != "compare" or not direction:
        return None
    if start.opcode != "tuple" or following.opcode != "tuple":
        return None
    carry = [_value(block, name, []) for name in start.operands]
    for trips in range(_MOST):
        sides = [_value(condition, name, carry) for name in compare.operands]
        if sides[0] is None or sides[1] is None:
            return None
        if not _COMPARE[direction.group(1)](sides[0], sides[1]):
            return trips
        carry = [_value(body, name, carry) for name in following.operands]
    return None


def _value(block: Computation, name: str, carry: list[int | None]) -> int | None:
    """Returns an instruction's integer value, if it follows from constants and the carry."""
    instruction = block.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if instruction.opcode in _SAME:
        return _value(block, instruction.operands[0], carry)
    if instruction.opcode == "get-tuple-element":
        index = instruction.number(r"index=(\d+)") or 0
        source = block[instruction.operands[0]]
        if source.opcode == "parameter":
            return carry[index] if index < len(carry) else None
        return _value(block, source.operands[index], carry) if source.opcode == "tuple" else None
    if instruction.opcode in _ARITHMETIC:
        a, b = (_value(block, operand, carry) for operand in instruction.operands)
        return None if a is None or b is None else _ARITHMETIC[instruction.opcode](a, b)
    return None
