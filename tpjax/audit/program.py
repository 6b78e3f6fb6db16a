"""Reading a compiled program's text: its collectives, what it moves, and where both come from."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    r"|collective-broadcast|ragged-all-to-all)(-start)?\("
)
_MADE = re.compile(r"^\s+(?:ROOT )?%\S+ = \(?(\w+\[[\d,]*\]).*? ([\w-]+)\(")
_PASSED_ON = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "constant",
    "iota",
    "optimization-barrier",
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,{}]*\}\}|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?)")
_NAMED = re.compile(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}")  # as jax 0.11 writes some
_SCOPE = re.compile(r"(blocks\.\d+\.(?:attn|mlp|moe))(?:/(q|k|v|o|cache|gate|up|down)\b)?")


@dataclass(frozen=True)
class Array:
    """A dtype and sizes."""

    dtype: str
    shape: Shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Collective:
    """One collective. ``bytes``: of its largest array; ``axes``: the mesh axes it goes over;
    ``where``: the module it comes from; ``branch``: whether it runs only if a branch is taken."""

    kind: str
    bytes: int
    dtype: str
    axes: tuple[str, ...]
    where: str
    operation: str
    branch: bool


@dataclass(frozen=True)
class Made:
    """An array that the program makes: by which operation, in which module. ``fused``: inside a
    kernel, where only copies and transposes are listed."""

    kind: str
    array: Array
    where: str
    fused: bool

    @property
    def moves(self) -> bool:
        """Whether it holds what was there before, elsewhere or in another order."""
        return self.kind in ("copy", "copy-start", "transpose", "slice", "dynamic-slice")


def collectives(text: str, sizes: dict[str, int]) -> list[Collective]:
    """All collectives of a program for a mesh of these axes, in the order of the text."""
    found = []
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            arrays = [_array(a) for a in _ARRAY.findall(match[1])]
            largest = max(arrays, key=lambda array: array.bytes)
            name = _op_name(line)
            found.append(
                Collective(
                    kind=match[2],
                    bytes=largest.bytes,
                    dtype=largest.dtype,
                    axes=_axes(line, sizes),
                    where=where(name),
                    operation=name.rpartition("/")[2],
                    branch="/cond/" in name,
                )
            )
    return found


def made(text: str) -> Iterator[Made]:
    """Every array that is written to memory, and copies and transposes inside kernels."""
    fused = False
    for line in text.splitlines():
        if line and not line[0].isspace():  # a computation begins, or ends
            fused = not line.startswith(("ENTRY", "%region", "}"))
        elif match := _MADE.match(line):
            kind = match[2]
            if kind in _PASSED_ON or kind.endswith("-done"):
                continue
            if fused and kind not in ("copy", "transpose"):
                continue
            yield Made(kind, _array(_ARRAY.findall(match[1])[0]), where(_op_name(line)), fused)


def aliased(text: str) -> set[int]:
    """The numbers of the arguments whose memory the results take over."""
    head = text.partition("\n")[0]
    start = head.find("input_output_alias={")
    if start < 0:
        return set()
    return {int(n) for n in re.findall(r"\}: \((\d+), \{\}", head[start:])}


def where(op_name: str) -> str:
    """The module that an operation comes from, as weights are called: ``blocks.3.attn.o``; where
    there is none, what the operation is called."""
    if match := _SCOPE.search(op_name):
        return ".".join(filter(None, match.groups()))
    parts = op_name.split("/")
    for known in ("embed", "head", "sampler"):
        if known in parts:
            return known
    return parts[-1] or "?"


def _array(found: tuple[str, str]) -> Array:
    return Array(found[0], tuple(int(n) for n in found[1].split(",") if n))


def _op_name(line: str) -> str:
    match = _OP_NAME.search(line)
    return match[1] if match else ""


def _axes(line: str, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of one group differ."""
    if named := _NAMED.search(line):
        return tuple(axis for axis in sizes if f"'{axis}'" in named[1] and sizes[axis] > 1)
    match = _GROUPS.search(line)
    group = _first_group(match[1], math.prod(sizes.values())) if match else []
    places = np.array([np.unravel_index(n, tuple(sizes.values())) for n in group])
    if not len(places):
        return ()
    return tuple(a for a, column in zip(sizes, places.T, strict=True) if len(set(column)) > 1)


def _first_group(text: str, devices: int) -> Sequence[int]:
    if text.startswith("{"):
        inner = text[2:].partition("}")[0]
        return [int(n) for n in inner.split(",") if n] or list(range(devices))
    shape, _, rest = text.partition("<=")
    source, _, turned = rest.partition("T")
    numbers = lambda word: [int(n) for n in re.findall(r"\d+", word)]  # noqa: E731
    ids = np.arange(math.prod(numbers(source))).reshape(numbers(source))
    if turned:
        ids = ids.transpose(numbers(turned))
    return ids.reshape(numbers(shape))[0].tolist()
