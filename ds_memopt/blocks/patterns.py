"""Regular expressions for parameter names, as users write them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import regex

LONGEST, MOST_REPETITIONS = 1.0, 10_000
"""Seconds of processor time that a search may take, and what the counts in braces, which the compiler writes out, may
multiply to."""


def are_patterns(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(pattern, str) for pattern in value)


def compiled(option: str, pattern: str) -> regex.Pattern:
    """The regular expression that is the value of `option`. ValueError if it is none."""
    counts = regex.findall(r"\{(\d*),?(\d*)\}", pattern)
    if math.prod(max(float(low or 1), float(high or 1), 1) for low, high in counts) > MOST_REPETITIONS:
        raise ValueError(
            f"{option}: the counts of {pattern!r} multiply to more than {MOST_REPETITIONS:,} repetitions. Write + or *."
        )
    try:
        return regex.compile(pattern)
    except (regex.error, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{option}: {pattern!r} is not a regular expression ({error}). Correct it.") from error


def matching(option: str, pattern: str, names: Sequence[str]) -> list[str]:
    """The names in which the regular expression is found.

    option: whose value the pattern is. ValueError if it is no regular expression, matches nothing, or takes too long:
    some, such as (.|.)*[!?], need twice the time for every further letter.
    """
    expression, end = compiled(option, pattern), time.monotonic() + LONGEST
    try:
        matched = [name for name in names if expression.search(name, timeout=max(end - time.monotonic(), 1e-3))]
    except (MemoryError, RecursionError, TimeoutError) as error:
        raise ValueError(
            f"{option}: {pattern!r} takes more than {LONGEST} s to search {len(names)} names. Write it without a "
            "repetition inside a repetition."
        ) from error
    if not matched:
        examples = ", ".join(map(repr, names[:: len(names) // 3 + 1]))
        raise ValueError(f"{option}: {pattern!r} matches none of {len(names)} parameters, such as {examples}. Fix it.")
    return matched
