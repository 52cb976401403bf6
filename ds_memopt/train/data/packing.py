"""Several documents in one sequence: positions that restart at each, which keep attention within it."""

from __future__ import annotations

from typing import Any

import torch


def model_inputs(ids: torch.Tensor, end_of_text: int | None) -> dict[str, torch.Tensor]:
    """Keyword arguments of a model's forward for ids [rows, tokens].

    end_of_text: the id that ends a document, where attention shall not leave it. Models of transformers read that off
    positions that restart and, given no attention_mask and use_cache=False, mask what lies before.
    """
    if end_of_text is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "position_ids": positions_in_documents(ids, end_of_text)}


def positions_in_documents(ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Position of each token in its document, or in what the row holds of it: int64 [rows, tokens]."""
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.zeros_like(ids)
    starts[:, 1:] = torch.where(ids[:, :-1] == end_of_text, place[:, 1:], 0)
    return place - starts.cummax(dim=1).values


@torch.no_grad()
def check_document_borders(
    engine: Any, end_of_text: int, micro_batch: int, seq_length: int, device: torch.device
) -> None:
    """ValueError if the model's logits of a document depend on the one before it in the sequence. All ranks call.

    Models whose attention does not look at position_ids would ignore the borders.
    """
    border = seq_length // 2
    ids = torch.full((2, micro_batch, seq_length), 1 if end_of_text == 0 else 0, device=device)
    ids[1, :, : border - 1] = next(i for i in (1, 2, 3) if i not in (end_of_text, int(ids[0, 0, 0])))
    ids[:, :, border - 1] = end_of_text
    engine.eval()
    one, other = (engine(**model_inputs(rows, end_of_text), use_cache=False).logits[:, border:].float() for rows in ids)
    engine.train()
    # What attends to the other document differs by much of the logits' spread; rounding by 1e-6, in bf16 by 1e-2.
    if not (one - other).abs().max() <= 0.02 * one.std():
        raise ValueError(
            f"--document_borders: {type(engine.module).__name__} lets a document attend to the one before it, as it "
            "does not read position_ids that restart (flash_attention_2 does so at --micro_batch 1 alone): take "
            "--attention sdpa, leave the option out, or choose another model class"
        )
