"""What a compiled program says to its neighbours: every collective, how often, how many bytes, on which axis.

Read from the text of the optimised program, as XLA's CPU, GPU and TPU compilers print it. Bytes are counted,
not opcodes: libtpu writes a reduce-scatter as an all-reduce inside a fusion named all-reduce-scatter.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}  # others have them in their name

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|async_execution_thread)=\{?([^,}]+)"
)
_OPERATION = re.compile(
    rf"^\s*(?:ROOT )?%?(\S+) = (.*?) ({'|'.join(KINDS)}|send|while|fusion|call|conditional|async-start"
    r"|constant)"
    r"(-start)?\((.*)$"
)
_IDS = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One kind of message along some mesh axes. size: bytes of the whole array on a device: an all-gather's
    result, the operand of the others. times: how often. group: devices that speak together."""

    kind: str
    axes: tuple[str, ...]
    size: float
    times: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, at the least: an array of ``size`` cut n ways passes through
        (n - 1) / n of it, and an all-reduce is a reduce-scatter and an all-gather."""
        share = (self.group - 1) / self.group if self.kind != "collective-permute" else 1.0
        return self.size * self.times * share * (2 if self.kind == "all-reduce" else 1)


def read(program: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of an optimised HLO program. mesh: {axis: size} in the order of its devices."""
    operations, entry = _computations(program)
    fused = {
        name
        for ops in operations.values()
        for op in ops
        if op.kind == "fusion"
        for name, _ in _called(op, {})
    }
    found: dict[str, Collective] = {}
    for name, times in _executions(operations, entry).items():
        scattering = name.startswith("all-reduce-scatter")
        for op in operations[name]:
            if op.kind == "send" and '_reduce_operation="SUM"' in op.rest:  # libtpu's words between slices
                size = max(_arrays(op.type))
                one = Collective("all-reduce", ("replica",), size, times, mesh["replica"])
                found[f"{name} {op.name}"] = one
            if op.kind in KINDS:
                axes, group = _group(op.rest, mesh)
                kind = "reduce-scatter" if op.kind == "all-reduce" and scattering else op.kind
                one = Collective(kind, axes, _size(op, group), times, group)
                # libtpu spreads a gather over several fusions, from its start to its end, with steps between
                # that may lie in other loops: it is still one. Outside fusions all of shard_map's have one
                # channel.
                key = _origin(op) if name in fused else f"{name} {op.name}"
                if not (name.startswith("async_collective_fusion") and key in found):
                    found[key] = max(one, found.get(key, one), key=lambda one: one.sent)
    return list(found.values())


def _origin(op: _Operation) -> str:
    """What a fused operation is a part of."""
    return " ".join(re.findall(r'channel_id=\d+|op_name="[^"]*"', op.rest)) or op.name


def by_kind(collectives: list[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """{(kind, axes): bytes that a device sends}, the largest first."""
    total: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for one in collectives:
        if one.group > 1:
            total[one.kind, one.axes] += one.sent
    return dict(sorted(total.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class _Operation:
    name: str
    type: str
    kind: str
    started: bool  # the first half of an asynchronous one
    rest: str  # operands and attributes


def _computations(program: str) -> tuple[dict[str, list[_Operation]], str]:
    """{computation: its operations that matter here}, and the entry's name."""
    operations: dict[str, list[_Operation]] = {}
    name = entry = ""
    for line in program.splitlines():
        if line[:1] in ("%", "E") and line.rstrip().endswith("{") and (head := _COMPUTATION.match(line)):
            name = head[1].lstrip("%")
            operations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and (match := _OPERATION.match(line)):
            operations[name].append(_Operation(match[1], match[2], match[3], bool(match[4]), match[5]))
    return operations, entry


def _executions(operations: Mapping[str, list[_Operation]], entry: str) -> Counter:
    """{computation: how often a step runs it}; both sides of a branch count."""
    times: Counter = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for op in operations[name]:
            for called, factor in _called(op, operations):
                if called in operations:
                    visit(called, count * factor)

    visit(entry, 1)
    return times


def _called(op: _Operation, operations: Mapping[str, list[_Operation]]) -> Iterator[tuple[str, int]]:
    if op.kind == "while":
        body, condition = (re.search(rf"{part}=%?([^,\s]+)", op.rest)[1] for part in ("body", "condition"))
        yield body, _trips(op, operations.get(condition, []))
    elif op.kind in ("fusion", "call", "conditional", "async-start"):
        for match in _CALLED.finditer(op.rest):
            yield from ((name.strip().lstrip("%"), 1) for name in match[1].split(","))


def _trips(loop: _Operation, condition: list[_Operation]) -> int:
    """How often a loop runs: what the compiler notes, or the one constant of its condition; 1 where it
    depends on the data, as in blockwise attention, whose loops hold no collectives."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    limits = [int(op.rest.split(")")[0]) for op in condition if op.kind == "constant" and op.type[0] in "su"]
    return limits[0] if len(limits) == 1 else 1


def _arrays(text: str) -> list[float]:
    """Bytes of every array in a type."""
    return [
        _bits(kind) / 8 * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in _ARRAY.findall(text)
        if kind != "token"
    ]


def _bits(kind: str) -> int:
    return BITS.get(kind) or int(re.search(r"\d+", kind)[0])


def _size(op: _Operation, group: int) -> float:
    """``Collective.size`` from the type of an operation's result."""
    # A layout, {1,0:T(8,128)}, has no array in it: only dtype[...] matches.
    arrays = _arrays(op.type)
    if op.started:  # (operands, results, contexts): the results of a gather, else the operands
        arrays = [size for size in arrays if size > 4]
        half = len(arrays) // 2
        arrays = arrays[half:] if op.kind == "all-gather" else arrays[:half]
    return sum(arrays) * (group if op.kind == "reduce-scatter" and not op.started else 1)


def _group(rest: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which a collective speaks, and how many devices do."""
    ids = _first_group(rest, math.prod(mesh.values()))
    places = np.stack(np.unravel_index(ids, tuple(mesh.values())))
    axes = tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row)) > 1)
    return axes, len(ids)


def _first_group(rest: str, devices: int) -> list[int]:
    """Devices of the first group, in any of the ways that XLA writes groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(i) for i in listed[1].split(",")]
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IDS}", rest):
        return _ids(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].tolist()
    if named := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IDS}\))? \{{([^}}]*)\}}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _ids(named[2], named[3]) if named[2] else np.arange(math.prod(sizes.values()))
        chosen = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", named[4])]
        shape = tuple(sizes.values())
        ids = np.moveaxis(ids.reshape(shape), chosen, range(len(chosen)))
        return ids.reshape(math.prod(shape[i] for i in chosen), -1)[:, 0].tolist()
    return list(range(devices))


def _ids(shape: str, order: str | None) -> np.ndarray:
    """``[4,32]T(1,0)``: device numbers in this shape, its axes in this order."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
