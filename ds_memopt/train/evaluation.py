"""Loss and accuracy on held-out rows, each counted once whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch

from ds_memopt.engines.losses import IGNORED_LABEL
from ds_memopt.train.data.rows import Pair, Row, collate
from ds_memopt.train.ranks import Ranks


class Score(NamedTuple):
    """Of a completion: the log-probability of all its tokens in nats, and whether each was the most likely one."""

    logp: float
    exact: bool


def evaluate(engine: Any, rows: Sequence[Row], micro_batch: int, ranks: Ranks) -> dict[str, float]:
    """validation_loss, the mean loss per completion token in nats, and validation_accuracy, the share of right rows.

    A row with several candidates is right if its completion has a higher log-probability than each other candidate, a
    row with one if each of its tokens is the most likely one after the tokens before it. Sums are in fp64. All ranks
    call, with the same rows; micro_batch: candidates per rank and forward pass.
    """
    share = [rows[rank :: ranks.world_size] for rank in range(ranks.world_size)]
    most_pairs = max(
        sum(len(row.candidates) for row in part) for part in share
    )  # ZeRO-3: all ranks take part in all passes
    mine = share[ranks.rank]
    pairs = [(row.prompt, candidate) for row in mine for candidate in row.candidates]
    scores: list[Score] = []
    engine.eval()
    with torch.no_grad():
        for start in range(0, most_pairs, micro_batch):
            part = pairs[start : start + micro_batch]
            scores += _score(engine, part or [rows[0].pair], ranks.device)[: len(part)]
    engine.train()

    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)  # loss, tokens, right rows, rows
    following = iter(scores)
    for row in mine:
        own, *rivals = (next(following) for _ in row.candidates)
        right = all(own.logp > rival.logp for rival in rivals) if rivals else own.exact
        sums += torch.tensor([-own.logp, len(row.candidates[0]), right, 1], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(sums)
    loss, tokens, right, count = sums.tolist()
    return {"validation_loss": loss / tokens, "validation_accuracy": right / count}


def _score(engine: Any, pairs: list[Pair], device: torch.device) -> list[Score]:
    batch = {name: tensor.to(device) for name, tensor in collate(pairs).items()}
    target = batch.pop("labels")[:, 1:]
    logits = engine(**batch, use_cache=False).logits[:, :-1]
    in_completion = target != IGNORED_LABEL
    logp = logits[in_completion].float().log_softmax(-1)  # [completion tokens of all pairs, vocabulary]
    own = logp.gather(1, target[in_completion].unsqueeze(1)).squeeze(1).double()
    exact = logp.argmax(-1) == target[in_completion]
    sizes = in_completion.sum(1).tolist()
    return [Score(o.sum().item(), bool(e.all())) for o, e in zip(own.split(sizes), exact.split(sizes), strict=True)]
