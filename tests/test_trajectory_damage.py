"""Damaged and crafted trajectories: no flipped bit, no cut and no made-up header is replayed. Unwritable paths."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from test_mezo import TwoMatrices, mezo, train
from torch import nn

from ds_memopt import Addax, MeZO
from ds_memopt.optimizers.probes.trajectory import (
    MOST_PROBES,
    SKIPPED,
    TrajectoryHeader,
    TrajectoryWriter,
    read_trajectory,
)
from ds_memopt.replay import replay


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the base of a run of three steps and one that was skipped, with its trajectory and its end."""
    folder, model = tmp_path_factory.mktemp("run"), TwoMatrices(torch.float32)
    torch.save(model.state_dict(), folder / "base.bin")
    optimizer = mezo(model, probes=2, trajectory=str(folder / "steps"))
    train(model, optimizer, range(3))
    optimizer.step(lambda: math.nan)
    torch.save(model.state_dict(), folder / "end.bin")
    return folder


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


def crafted(path: Path, header: TrajectoryHeader, records: list[tuple]) -> Path:
    """A file with the right checksums, whatever it says."""
    path.unlink(missing_ok=True)
    writer = TrajectoryWriter(path, header)
    for record in records:
        writer.append(*record)
    writer.close()
    return path


def test_no_flipped_bit_and_no_cut_passes(tmp_path):
    """Without checksums 425 of 1,280 flips in the records of a run replayed, to other weights."""
    header = TrajectoryHeader("MeZO", {"epsilon": 1e-3}, 1, [["w"]], "00000000deadbeef", "float32")
    path = crafted(tmp_path / "steps", header, [(0, 0, [0.5], [0.1]), (1, SKIPPED, [math.nan], [0.1])])
    whole, begin = path.read_bytes(), len(header.line())
    size = header.record.itemsize
    assert len(read_trajectory(path)[1]) == 2 and len(whole) == begin + 2 * size
    for position in range(len(whole)):
        for bit in range(8) if position >= begin else (position % 8,):
            flipped = bytes([whole[position] ^ 1 << bit])
            path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
            assert refused(path), f"bit {bit} of byte {position}"
        path.write_bytes(whole[:position])
        between_records = position >= begin and (position - begin) % size == 0
        assert between_records or refused(path), f"cut at byte {position}"


def refused(path: Path) -> bool:
    try:
        read_trajectory(path)
    except ValueError:
        return True
    return False


JUNK = [None, True, -1, 10**400, 1e308, "x", [], {}, [[]], "\ud800"]


def test_a_crafted_header_decides_nothing_but_hyper_parameters(run, tmp_path):
    """One that named a `trajectory` made `replay` create that file, for all went to the constructor as keywords."""
    header, _ = read_trajectory(run / "steps")
    out, planted = tmp_path / "out.bin", tmp_path / "planted"

    def outcome(**changes) -> str:
        changed = dataclasses.replace(header, **changes)
        path = crafted(tmp_path / "steps", changed, [(0, 0, [1.0, 2.0], [0.1] * len(changed.parameters))])
        return refusal(replay, run / "base.bin", path, out)

    for extra in ({"trajectory": str(planted)}, {"lr": 1.0}, {"model": None}, {"compiled": True}, {"lockstep": False}):
        assert "hyper" in outcome(hyper=header.hyper | extra) and not planted.exists() and not out.exists()
    for lacking in header.hyper:
        assert "hyper" in outcome(hyper={key: value for key, value in header.hyper.items() if key != lacking})
    assert "has method 'SGD', but must have 'MeZO'" in outcome(method="SGD")
    for dtype in ("load", "int8", "complex64", "__name__", ""):
        assert f"has dtype {dtype!r}, but must have one of float32" in outcome(dtype=dtype)
    assert "weight_decay" in outcome(parameters=[*header.parameters, []])
    assert "lacks weight and 0 others" in outcome(parameters=[["weight"], *header.parameters[1:]])
    assert "is not what the run began with" in outcome(parameters=[header.parameters[0], header.parameters[0]])
    assert "layer_fraction=2 is out of range" in outcome(hyper=header.hyper | {"layer_fraction": 2})


def test_junk_in_a_header_ends_with_a_word(run, tmp_path):
    """Each hyper-parameter in turn is something else, with all checksums right: a ValueError, or it means the same."""
    header, records = read_trajectory(run / "steps")
    records, path, out = [record[:4] for record in records.tolist()], tmp_path / "steps", tmp_path / "out.bin"
    refused = 0
    for key in header.hyper:
        for junk in JUNK:
            out.unlink(missing_ok=True)
            try:
                crafted(path, dataclasses.replace(header, hyper=header.hyper | {key: junk}), records)
                replay(run / "base.bin", path, out)
            except ValueError as error:
                refused += 1
                assert not out.exists() and str(error)
    assert refused > 100
    for field in dataclasses.fields(header):
        for junk in JUNK:
            try:
                crafted(path, dataclasses.replace(header, **{field.name: junk}), records)
                replay(run / "base.bin", path, out)
            except ValueError:
                assert not out.exists()
                continue
            raise AssertionError(f"{field.name}={junk!r} was replayed")


def test_a_record_that_is_no_number_is_refused_whatever_its_checksum(run, tmp_path):
    header, records = read_trajectory(run / "steps")
    step, flags, g, lr = records.tolist()[0][:4]
    for bad in (math.nan, math.inf, -math.inf):
        path = crafted(tmp_path / "steps", header, [(step, flags, [g[0], bad], lr)])
        assert "has a g at step 0 that is no finite number" in refusal(read_trajectory, path)
        path = crafted(tmp_path / "steps", header, [(step, SKIPPED, [g[0], bad], [lr[0], bad])])
        assert "has an lr at step 0 that is no finite number" in refusal(read_trajectory, path)
        assert len(read_trajectory(crafted(path, header, [(step, SKIPPED, [g[0], bad], lr)]))[1]) == 1
    for flags in (2, 3, 2**31):
        path = crafted(tmp_path / "steps", header, [(step, flags, g, lr)])
        assert "has unknown flags at step 0" in refusal(read_trajectory, path)
    # A skipped step is one, also where its g could be used.
    skipped = crafted(path, header, [(n, SKIPPED, g, lr) for n in range(3)])
    replay(run / "base.bin", skipped, tmp_path / "out.bin")
    base, found = (torch.load(file, weights_only=True) for file in (run / "base.bin", tmp_path / "out.bin"))
    assert all(torch.equal(base[name], found[name]) for name in base)


def test_a_header_of_huge_counts_takes_no_memory(run, tmp_path):
    """2^20 probes would be records of 8 MiB; the file has a few bytes of them."""
    header, _ = read_trajectory(run / "steps")
    huge = dataclasses.replace(header, probes=MOST_PROBES)
    path = tmp_path / "steps"
    path.write_bytes(huge.line() + bytes(1000))
    tracemalloc.start()
    message = refusal(read_trajectory, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"a record has {8 + 8 * MOST_PROBES + 8 * len(header.parameters) + 4}" in message and peak < 2**20
    content = json.loads(header.line())
    for key, value in (
        ("probes", 2**32),
        ("probes", 2**63),
        ("probes", True),
        ("first_step", 2**32),
        ("groups", 2**40),
    ):
        changed = {k: v for k, v in (content | {key: value}).items() if k != "crc32"}
        line = json.dumps(changed | {"crc32": zlib.crc32(json.dumps(changed).encode())})
        path.write_bytes(line.encode() + b"\n" + bytes(1000))
        assert "has a damaged header" in refusal(read_trajectory, path)
    path.write_bytes(header.line()[:27].replace(b"2, ", b"") + b"[" * 200_000 + b"\n")
    assert "has a damaged header" in refusal(read_trajectory, path)


@pytest.mark.parametrize("method", [MeZO, Addax])
def test_a_path_that_cannot_be_written_is_refused_before_training(tmp_path, method):
    file = tmp_path / "file"
    file.write_text("something else")
    model = nn.Linear(2, 2)
    for path, reason in (
        (tmp_path / "missing" / "steps", "cannot be written: No such file or directory. Give a file in a folder"),
        (file / "steps", "cannot be written: Not a directory. Give"),
        (tmp_path, "cannot be written: Is a directory. Give"),
        (".", "cannot be written: Is a directory. Give"),
        ("/proc/steps", "cannot be written: "),
        (tmp_path / ("x" * 300), "cannot be written: File name too long. Give"),
        (file, "exists and is no trajectory. Give another path."),
        (3, "trajectory=3 is out of range: it must be a path or null."),
        (["steps"], "trajectory=['steps'] is out of range: it must be a path or null."),
    ):
        assert reason in refusal(method.from_model, model, trajectory=path), path
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and file.read_text() == "something else"
    method.from_model(model, trajectory=tmp_path / "steps")
    assert not (tmp_path / "steps").exists()  # before the first step
