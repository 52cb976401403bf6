"""The table of an assignment, for the log."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from ds_memopt.blocks.structure import ParamBlocks

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")  # a component of a dotted name that is a number


def format_assignment(assignment: Mapping[str, ParamBlocks]) -> str:
    """A readable table of `assignment`: one line for parameters that differ only in the numbers in their names.

    The last column is (parameters on this line) x (blocks of each). The last line sums parameters and blocks.
    """
    groups: dict[tuple[str, ParamBlocks], list[str]] = {}
    for name, blocks in assignment.items():
        groups.setdefault((_INDEX.sub("*", name), blocks), []).append(name)
    lines = [["parameter", "shape", "role", "rule", "blocks"]]
    for (_, blocks), names in groups.items():
        times = f"{len(names):,} x " if len(names) > 1 else ""
        plural = "" if len(names) == blocks.num_blocks == 1 else "s"
        shape = "x".join(map(str, blocks.shape)) or "scalar"
        lines.append([_join(names), shape, blocks.role, blocks.rule, f"{times}{blocks.num_blocks:,} block{plural}"])
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = [" | ".join([cell.ljust(w) for cell, w in zip(line, widths, strict=False)] + line[4:]) for line in lines]
    numel = sum(prod(blocks.shape) for blocks in assignment.values())
    num_blocks = sum(blocks.num_blocks for blocks in assignment.values())
    return "\n".join([*table, f"total: {numel:,} parameters in {len(assignment):,} tensors, {num_blocks:,} blocks"])


def _join(names: list[str]) -> str:
    """One name for all: `layers.0.w`, `layers.1.w`, `layers.3.w` -> `layers.{0..1,3}.w`."""
    columns = [sorted({int(i) for i in column}) for column in zip(*map(_INDEX.findall, names), strict=True)]
    spans = iter([_ranges(column) for column in columns])
    return _INDEX.sub(lambda _: next(spans), names[0])


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in spans) + "}"
