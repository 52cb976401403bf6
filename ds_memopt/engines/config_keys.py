"""Which keys of its configuration DeepSpeed reads. It has no list of them, so it is watched while it reads one.

DeepSpeedConfig reads a dict by `in`, [], .get, .keys, .items, ** and copy.copy. Private names used here are in
private_names.py.
"""

from __future__ import annotations

import difflib
import functools
import logging
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_memopt.shards import is_first_rank

logger = logging.getLogger("ds_memopt")

BATCH = {"train_micro_batch_size_per_gpu": 1}
"""What DeepSpeed needs to read a configuration."""

_READ_ELSEWHERE = ("sequence_parallel_size",)
_OBJECTS_OF_OTHERS = ("params",)  # of an optimizer or scheduler, which knows them


class Watched(dict):
    """A configuration that notes what is read of it, in inner objects as well.

    asked: the keys that DeepSpeed looked for, whether they are there or not. trail: the keys that lead to what it
    looked for last. ValueError where it looks for a value of another type than the default that it names.
    """

    def __init__(self, content: dict[str, Any], place: tuple[str, ...] = (), trail: list | None = None) -> None:
        self.asked: dict[str, None] = {}
        self.trail: list[str] = [] if trail is None else trail
        self._place = place
        inner = {
            key: Watched(value, (*place, key), self.trail)
            for key, value in content.items()
            if isinstance(value, dict) and key not in _OBJECTS_OF_OTHERS
        }
        super().__init__(content | inner)

    def _note(self, key: str) -> None:
        self.asked[key] = None
        self.trail[:] = *self._place, key

    def __contains__(self, key: str) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        value = super().get(key, default)
        for kind, words in (
            (bool, "true or false"),
            (numbers.Number, "a number"),
            (str, "a word"),
            (dict, "an object"),
        ):
            if isinstance(default, kind):
                if value is not None and not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                    raise ValueError(f"{'.'.join(self.trail)} is {value!r}: it must be {words}")
                break
        return value

    def keys(self) -> Watched:
        return self

    def __iter__(self) -> Iterator[str]:  # overridden so that ** reads key by key, by __getitem__
        return super().__iter__()

    def items(self) -> Iterable[tuple[str, Any]]:
        return [(key, self[key]) for key in self]

    def __copy__(self) -> Watched:
        return self

    def unread(self) -> Iterator[tuple[str, str | None]]:
        """The path of each key that DeepSpeed did not look for, and the nearest that it did."""
        known = [*self.asked, *(() if self._place else _READ_ELSEWHERE)]
        for key, value in super().items():
            if key not in known and self.asked:  # an object that nobody looked into is not DeepSpeed's own
                yield ".".join((*self._place, str(key))), closest(key, known)
            if isinstance(value, Watched):
                yield from value.unread()


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of the known words that a wrong one may have meant: case and underscores do not count."""
    plain: dict[str, str] = {}
    for name in known:
        plain.setdefault(name.replace("_", "").lower(), name)
    found = difflib.get_close_matches(str(word).replace("_", "").lower(), plain, n=1)
    return plain[found[0]] if found else None


@functools.cache
def known_keys() -> tuple[str, ...]:
    """What DeepSpeed looks for at the top level."""
    watched = Watched(BATCH)
    DeepSpeedConfig(watched)
    return *watched.asked, *_READ_ELSEWHERE


def warn_of_typos(engine: DeepSpeedEngine) -> None:
    """Of keys at the top level that DeepSpeed does not read but for a slip: others may be there for other programs."""
    for key in engine._config._param_dict if is_first_rank() else ():
        if key not in known_keys() and (meant := closest(key, known_keys())):
            logger.warning(
                "DeepSpeed does not read %r of its config, so it has no effect. Did you mean %r?", key, meant
            )
