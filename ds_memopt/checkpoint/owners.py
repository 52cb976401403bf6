"""Who writes what: each entry by exactly one of the ranks that hold it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ds_memopt.checkpoint.part_index import WEIGHT


class Claim(NamedTuple):
    """A rank holds entries [start, stop) of a parameter's state. master: of its weights in the precision in which they
    are updated, so that what is stored besides need not be saved."""

    name: str
    key: str
    start: int
    stop: int
    dtype: str
    itemsize: int
    master: bool = False

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.itemsize


def share_out(claims: Sequence[Sequence[Claim]]) -> list[list[Claim]]:
    """What each rank writes, from what each holds; every rank comes to the same. What several hold alike, as a block
    that a rank border cuts, goes to the one that has least to write so far."""
    masters = {claim.name for of_rank in claims for claim in of_rank if claim.master}
    holders: dict[tuple[str, str], dict[Claim, list[int]]] = {}
    for rank, of_rank in enumerate(claims):
        for claim in of_rank:
            if claim.start < claim.stop and (claim.key != WEIGHT or claim.master or claim.name not in masters):
                holders.setdefault(claim[:2], {}).setdefault(claim, []).append(rank)
    shares, bytes_of = [[] for _ in claims], [0 for _ in claims]
    for _, held in sorted(holders.items()):
        edges = sorted({edge for claim in held for edge in (claim.start, claim.stop)})
        pieces: dict[Claim, list[int]] = {}
        for claim, ranks in held.items():
            inside = [claim.start, *(edge for edge in edges if claim.start < edge < claim.stop), claim.stop]
            for start, stop in itertools.pairwise(inside):
                pieces.setdefault(claim._replace(start=start, stop=stop), []).extend(ranks)
        for piece in sorted(pieces):
            rank = min(pieces[piece], key=lambda rank: bytes_of[rank])
            bytes_of[rank] += piece.nbytes
            shares[rank].append(piece)
    return shares
