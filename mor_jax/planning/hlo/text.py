"""Parses optimised HLO text into computations and instructions, with the sizes of their types.

Only what the counts need is parsed: names, types, opcodes, operands and attributes. The input is
`jax.stages.Compiled.as_text()`, one instruction per line.
"""

import dataclasses
import functools
import math
import re

from mor_jax.config.parsing import fail

_BITS = {
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
    **dict.fromkeys(("token", "opaque"), 0),
}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type.

    dims: sizes in logical order. layout: dimension numbers, fastest-varying first. tile: sizes that
    the fastest-varying dimensions are padded to. space: memory space, 0 is main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bits(self) -> int:
        """Bits per element. Raises ValueError on an unknown type."""
        bits = 8 if self.dtype.startswith("f8") else _BITS.get(self.dtype)
        if bits is None:
            fail(
                "dtype",
                self.dtype,
                f"unknown HLO type; known are {sorted(_BITS)}",
                "Add it to _BITS",
            )
        return bits

    @property
    def bytes(self) -> int:
        """Bytes of the values, without padding."""
        return -(-math.prod(self.dims) * self.bits // 8)

    @property
    def stored_bytes(self) -> int:
        """Bytes including the tile padding of the layout."""
        dims = [self.dims[i] for i in self.layout] if self.layout else list(self.dims[::-1])
        for i, size in enumerate(reversed(self.tile)):
            if i < len(dims):
                dims[i] = -(-dims[i] // size) * size
        return -(-math.prod(dims) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    operands: names in the same computation. attributes: the text after the operands.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str = ""

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result, tuples flattened."""
        return arrays(self.type)

    def attribute(self, name: str) -> str | None:
        """The text of `name=...` up to the next comma, or None."""
        match = re.search(rf"(?:^|[ ,]){name}=([^,\s]+)", self.attributes)
        return match[1].lstrip("%") if match else None

    def called(self, *names: str) -> tuple[str, ...]:
        """Computations named in these attributes, `name=%x` or `name={%x, %y}`."""
        names_called: list[str] = []
        for name in names:
            for one, many in re.findall(
                rf"(?:^|[ ,]){name}=(?:%?([\w.-]+)|\{{([^}}]*)\}})", self.attributes
            ):
                names_called += (
                    [one] if one else [part.strip().lstrip("%") for part in many.split(",")]
                )
        return tuple(names_called)

    @property
    def op_name(self) -> str:
        """Its origin in the traced function; empty if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order. root: the name of its result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        instructions = self.instructions.values()
        return {int(i.arguments): i for i in instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that use a value, by the value's name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose values `instruction` uses."""
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name; entry: the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str

    def called(self, instruction: Instruction, *names: str) -> list[Computation]:
        """The computations named in these attributes of an instruction."""
        return [self.computations[name] for name in instruction.called(*names)]


def parse_module(text: str) -> Module:
    """Parses a module. Raises ValueError if there is no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name, root, lines = "", "", "", {}
    for line in text.splitlines():
        header = _HEADER.match(line) if line and not line[0].isspace() else None
        if header:
            name, root, lines = header[2], "", {}
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, lines, root or next(reversed(lines), ""))
        elif (match := _NAME.match(line)) is not None:
            root = match[2] if match[1] else root
            lines[match[2]] = _instruction(match[2], line[match.end() :], lines)
    if not entry:
        fail("hlo", text[:40], "has no ENTRY computation", "Pass the text of compiled.as_text()")
    return Module(computations, entry)


def _instruction(name: str, rest: str, before: dict[str, Instruction]) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    assert opcode is not None, rest
    close = _closing(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : close]
    operands: tuple[str, ...] = ()
    if opcode[1] != "constant":
        operands = tuple(n for n in _OPERAND.findall(arguments) if n in before)
    return Instruction(name, rest[:end], opcode[1], operands, rest[close + 1 :], arguments)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text)


@functools.lru_cache(maxsize=4096)
def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, tuples flattened: `(f32[2]{0}, token[])` has two."""
    return tuple(_array(*groups) for groups in _ARRAY.findall(text))


def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(part.strip("<=")) for part in dims.split(",") if part)
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]*)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        sizes,
        tuple(int(part) for part in order.split(",") if part),
        tuple(int(part) for part in tile[1].split(",") if part) if tile else (),
        int(space[1]) if space else 0,
    )


def total_bytes(instruction: Instruction) -> int:
    """Bytes of all arrays in an instruction's result, without padding."""
    return sum(array.bytes for array in instruction.arrays)
