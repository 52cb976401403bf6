"""launch/experiments/storage_evidence.py on tiny sizes: one command, runs kept, masters compared, linear codes made."""

from __future__ import annotations

import functools
import re
import sys

import pytest
import torch
from test_house import ROOT

from ds_memopt.kernels import codes, packed

sys.path.insert(0, str(ROOT / "launch/experiments"))
import storage_evidence  # noqa: E402

COMMAND = ["storage_evidence.py", "--seeds", "1", "--steps", "3", "--hidden", "16", "--layers", "1"]


class Here:
    """In the place of a pool of processes."""

    def __init__(self, *_, **__) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    map = staticmethod(map)


def test_one_command_trains_every_storage_and_keeps_what_has_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*COMMAND, "--validation_rows", "16", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(storage_evidence, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(storage_evidence, "load_corpus", functools.cache(storage_evidence.load_corpus))
    monkeypatch.setattr(storage_evidence, "LRS", (1e-3,))
    storage_evidence.main()
    assert capsys.readouterr().out.count("seed0: ") == len(list(tmp_path.glob("*.json")))
    text = (tmp_path / "storage.md").read_text()
    assert "equal fp32 masters bit for bit at the end of 2 of 2 runs." in text
    rows = dict(re.findall(r"^\| (Adam\w+ \| [^|]+) \| ([\d.]+) \|", text, re.MULTILINE))
    assert len(rows) == 2 * len(storage_evidence.STORAGES) - 2
    # Beside 4 bytes of fp32 weights, or 2 of bf16 ones and 2 or 1 of remainders: m in 1 and 4 / 128, and what the
    # sizes here make of numbers per block and of groups that are not full.
    assert float(rows["AdamW | fp32 weights, fp32 states"]) == pytest.approx(12, abs=0.02)
    assert float(rows["AdamW | bf16 weights, int8, remainder8"]) == pytest.approx(5.06, abs=0.1)
    assert "+0.0000" in text.splitlines()[2] and (tmp_path / "storage.png").stat().st_size > 0

    monkeypatch.setattr(storage_evidence, "train", None)  # would be called
    storage_evidence.main()
    assert (tmp_path / "storage.md").read_text() == text


def test_linear_codes_are_right_on_average_and_only_where_asked_for():
    values, scales = torch.linspace(-1, 1, 201), torch.ones(201)
    bits = torch.arange(256, dtype=torch.int32).view(-1, 1).expand(-1, 201)
    with storage_evidence.linear_codes((torch.int8,)) as used:
        made = packed.encode(values, scales, torch.int8, bits)
        assert ((packed.decode(made, scales).double().mean(0) - values).abs() < 1 / 127 / 256).all()
        assert (made.amax(0) - made.amin(0) <= 1).all() and used
        other = packed.encode(values.square(), scales, torch.uint8, bits)
    assert torch.equal(other, codes.encode(values.square(), scales, torch.uint8, bits))
    assert packed.encode is codes.encode
