"""Bytes that a step moves between a chip and its main memory, counted in its optimised HLO.

The compiler's own count includes the body of a loop only once; here it is multiplied by the trip
count. An operation reads its operands and writes its results, tile padding included. Values in fast
memory (a memory space other than 0) are free. A fusion reads only the slices that it takes of an
operand, and writes only the slice that it updates. A kernel counts as reading and writing
everything once, which is a lower bound.
"""

import dataclasses
import functools
from collections.abc import Iterable

from mor_jax.planning.hlo.collectives import KINDS
from mor_jax.planning.hlo.loops import trip_count
from mor_jax.planning.hlo.text import Array, Computation, Instruction, Module, arrays

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "recv", "domain"),
    *("async-update", "async-done", "add-dependency"),
}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "SliceId")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes per chip and step; loops of unknown length count as one iteration."""

    bytes: float
    unknown_loops: tuple[str, ...] = ()


def traffic(module: Module) -> Traffic:
    """All traffic with the chip's main memory in one execution of `module`."""
    meter = _Meter(module)
    return Traffic(meter.of(module.entry), tuple(meter.unknown))


class _Meter:
    """Bytes by computation; results are cached."""

    def __init__(self, module: Module):
        self._module = module
        self.unknown: list[str] = []
        self.of = functools.cache(self._of)

    def _of(self, name: str) -> float:
        computation = self._module.computations[name]
        return sum(self._instruction(computation, i) for i in computation.instructions.values())

    def _instruction(self, inside: Computation, i: Instruction) -> float:
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return 0.0
        if i.opcode == "while":
            iterations = trip_count(self._module, inside, i)
            if iterations is None:
                self.unknown.append(i.name)
            return (1 if iterations is None else iterations) * sum(map(self.of, i.called("body")))
        if i.opcode == "conditional":
            names = i.called("branch_computations", "true_computation", "false_computation")
            return max(map(self.of, names))
        if i.opcode in ("call", "async-start"):
            return sum(map(self.of, i.called("to_apply", "calls", "called_computations")))
        if i.opcode == "fusion":
            return self._fusion(inside, i)
        return _unfused(inside, i)

    def _fusion(self, inside: Computation, i: Instruction) -> float:
        (body,) = self._module.called(i, "calls")
        total = 0.0
        for number, operand in enumerate(inside.operands(i)):
            size = _main_bytes(operand.arrays)
            if size and number in body.parameters:
                total += min(size, self._reads(body, body.parameters[number]))
        root = body.instructions[body.root]
        parts = body.operands(root) if root.opcode == "tuple" else [root]
        results = [arrays(i.type)] if len(parts) == 1 else [(array,) for array in i.arrays]
        for part, result in zip(parts, results, strict=False):
            total += self._writes(body, part, result)
        return total

    def _reads(self, body: Computation, value: Instruction) -> float:
        """Bytes that a fused computation reads of one of its values."""
        total = 0.0
        for user in body.users[value.name]:
            if user.opcode in ("bitcast", "get-tuple-element"):
                total += self._reads(body, user)
            elif user.opcode in _SLICES and user.operands[0] == value.name:
                total += _stored_bytes(user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue
            elif user.opcode == "fusion":
                (callee,) = self._module.called(user, "calls")
                number = user.operands.index(value.name)
                total += self._reads(callee, callee.parameters[number])
            elif user.opcode == "tuple" or _continues_collective(user):
                continue
            else:
                return _stored_bytes(value.arrays)
        return total

    def _writes(self, body: Computation, part: Instruction, result: Iterable[Array]) -> float:
        """Bytes that a fusion writes for one of its results."""
        while part.opcode == "bitcast":
            part = body.operands(part)[0]
        whole = body.operands(part)[0] if part.opcode == "get-tuple-element" else part
        if not _main_bytes(result) or part.opcode == "parameter" or _continues_collective(whole):
            return 0.0
        if part.opcode == "dynamic-update-slice":
            return _stored_bytes(body.instructions[part.operands[1]].arrays)
        if part.opcode == "fusion":
            (callee,) = self._module.called(part, "calls")
            return self._writes(callee, callee.instructions[callee.root], result)
        return _main_bytes(result)


def _continues_collective(i: Instruction) -> bool:
    """Whether `i` continues or ends a collective that an earlier fusion started."""
    kind = i.opcode.removesuffix("-start")
    ends = i.opcode == "custom-call" and '"AsyncCollectiveDone"' in i.attributes
    return ends or (kind in KINDS and "async_collective_fusion_config" in i.attributes)


def _unfused(inside: Computation, i: Instruction) -> float:
    """Bytes of an operation that is not fused."""
    if i.opcode == "custom-call" and any(f'"{name}"' in i.attributes for name in _FREE_CALLS):
        return 0.0
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
        # The type lists both what is read and what is written.
        return _main_bytes(i.arrays)
    operands = inside.operands(i)
    if i.opcode in _SLICES:
        return _main_bytes(i.arrays) + min(_main_bytes(operands[0].arrays), _stored_bytes(i.arrays))
    if i.opcode == "dynamic-update-slice":
        return _main_bytes(operands[1].arrays) + min(
            _main_bytes(i.arrays), _stored_bytes(operands[1].arrays)
        )
    if i.opcode == "scatter":
        updates = sum(_main_bytes(operand.arrays) for operand in operands[1:])
        return updates + 2 * _main_bytes(operands[-1].arrays)
    return _main_bytes(i.arrays) + sum(_main_bytes(operand.arrays) for operand in operands)


def _main_bytes(listed: Iterable[Array]) -> float:
    """Bytes of the arrays in the chip's main memory."""
    return float(sum(array.stored_bytes for array in listed if array.space == 0))


def _stored_bytes(listed: Iterable[Array]) -> float:
    return float(sum(array.stored_bytes for array in listed))
