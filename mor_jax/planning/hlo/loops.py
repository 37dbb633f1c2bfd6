"""Trip counts of loops in optimised HLO.

The compiler often records the trip count (`known_trip_count`). Otherwise the loop's counters are
interpreted: the scalar integers that the condition depends on are computed iteration by iteration,
from their initial values, until the condition is false.
"""

import json
import operator
import re
from collections.abc import Callable
from typing import Any

from mor_jax.planning.hlo.text import Computation, Instruction, Module

MAX_ITERATIONS = 1_000_000
"""Iterations after which a loop's length counts as unknown."""

_BINARY: dict[str, Callable[[int, int], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": lambda a, b: int(a / b) if b else None,
    "remainder": lambda a, b: a - b * int(a / b) if b else None,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shift-left": operator.lshift,
    "shift-right-logical": operator.rshift,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_IDENTITY = {
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "opt-barrier",
    "optimization-barrier",
    "broadcast",
}

Values = Callable[[int], Any]
"""Element number -> its value, for a tuple; an unknown value is None."""


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int | None:
    """Iterations of `loop`, a while instruction in the computation `inside`; None if unknown."""
    recorded = re.search(r'"known_trip_count":\s*(\{[^}]*\})', loop.attributes)
    if recorded:
        return int(json.loads(recorded[1])["n"])
    (condition,) = module.called(loop, "condition")
    (body,) = module.called(loop, "body")
    outer = _Interpreter(module, inside, ())
    state = outer.value(loop.operands[0])
    if not callable(state):
        return None
    for iteration in range(MAX_ITERATIONS):
        running = _Interpreter(module, condition, (state,)).value(condition.root)
        if running is None:
            return None
        if not running:
            return iteration
        state = _Interpreter(module, body, (state,)).value(body.root)
        if not callable(state):
            return None
    return None


class _Interpreter:
    """Scalar integers in one execution of a computation, evaluated on demand."""

    def __init__(self, module: Module, computation: Computation, arguments: tuple[Any, ...]):
        self._module, self._computation, self._arguments = module, computation, arguments
        self._known: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        """An int or bool, a function of the element number for a tuple, None if unknown."""
        if name not in self._known:
            self._known[name] = self._compute(self._computation.instructions[name])
        return self._known[name]

    def _compute(self, i: Instruction) -> Any:
        if i.opcode == "constant":
            return _constant(i.arguments)
        if i.opcode == "parameter":
            number = int(i.arguments)
            return self._arguments[number] if number < len(self._arguments) else None
        if i.opcode == "tuple":
            return self._elements(i)
        if i.opcode in ("fusion", "call"):
            (callee,) = self._module.called(i, "calls", "to_apply")
            values = tuple(self.value(name) for name in i.operands)
            return _Interpreter(self._module, callee, values).value(callee.root)
        if i.opcode in _IDENTITY:
            return self.value(i.operands[0])
        if i.opcode == "get-tuple-element":
            whole = self.value(i.operands[0])
            return whole(int(i.attribute("index") or 0)) if callable(whole) else None
        if i.opcode == "while":
            return self._unchanged(i)
        return self._arithmetic(i)

    def _elements(self, i: Instruction) -> Values:
        known: dict[int, Any] = {}

        def element(number: int) -> Any:
            if number not in known:
                known[number] = self.value(i.operands[number])
            return known[number]

        return element

    def _unchanged(self, loop: Instruction) -> Values:
        """Elements that the body of `loop` passes on unchanged; the others are unknown."""
        before = self.value(loop.operands[0])
        (body,) = self._module.called(loop, "body")
        root = body.instructions[body.root]

        def element(number: int) -> Any:
            if root.opcode != "tuple" or not callable(before):
                return None
            after = body.instructions[root.operands[number]]
            same = after.opcode == "get-tuple-element" and after.attribute("index") == str(number)
            unchanged = same and body.instructions[after.operands[0]].opcode == "parameter"
            return before(number) if unchanged else None

        return element

    def _arithmetic(self, i: Instruction) -> Any:
        values = [self.value(name) for name in i.operands]
        if any(not isinstance(value, int) for value in values):
            return None
        if i.opcode == "compare":
            return _COMPARE[i.attribute("direction") or "EQ"](*values)
        if i.opcode == "select":
            return values[1] if values[0] else values[2]
        if i.opcode == "not":
            return not values[0]
        if i.opcode == "negate":
            return -values[0]
        return _BINARY[i.opcode](*values) if i.opcode in _BINARY else None


def _constant(text: str) -> int | None:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else None
