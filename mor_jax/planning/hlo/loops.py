"""How often a loop of optimised HLO runs.

The compiler often notes it (`known_trip_count`). Where it does not, the loop's counters are
followed: the few scalar integers that its condition depends on are computed step by step, from
their first values through the body, until the condition says stop.
"""

import json
import operator
import re
from collections.abc import Callable
from typing import Any

from mor_jax.planning.hlo.text import Computation, Instruction, Module

LIMIT = 1_000_000
"""Turns after which a loop counts as one of unknown length."""

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
_SAME = {
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
    """How often the body of `loop`, a while of the computation `inside`, runs; None if unknown."""
    noted = re.search(r'"known_trip_count":\s*(\{[^}]*\})', loop.attributes)
    if noted:
        return int(json.loads(noted[1])["n"])
    (condition,) = module.called(loop, "condition")
    (body,) = module.called(loop, "body")
    outer = _Scope(module, inside, ())
    state = outer.value(loop.operands[0])
    if not callable(state):
        return None
    for turn in range(LIMIT):
        go_on = _Scope(module, condition, (state,)).value(condition.root)
        if go_on is None:
            return None
        if not go_on:
            return turn
        state = _Scope(module, body, (state,)).value(body.root)
        if not callable(state):
            return None
    return None


class _Scope:
    """Values of scalar integers in one run of a computation, computed when they are asked for."""

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
            return _Scope(self._module, callee, values).value(callee.root)
        if i.opcode in _SAME:
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
        """Elements that the body of `loop` hands on as they came; the others are unknown."""
        before = self.value(loop.operands[0])
        (body,) = self._module.called(loop, "body")
        root = body.instructions[body.root]

        def element(number: int) -> Any:
            if root.opcode != "tuple" or not callable(before):
                return None
            after = body.instructions[root.operands[number]]
            same = after.opcode == "get-tuple-element" and after.attribute("index") == str(number)
            kept = same and body.instructions[after.operands[0]].opcode == "parameter"
            return before(number) if kept else None

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
