"""The trajectory file: what is read is what was written, and no cut, hole or other run goes unnoticed. The checksum."""

from __future__ import annotations

import dataclasses
import math
import os
import time

import numpy as np
import pytest
import torch

from ds_memopt.optimizers.probes import checksum as checksum_module
from ds_memopt.optimizers.probes.checksum import as_hex, checksum
from ds_memopt.optimizers.probes.noise import NOISE_VERSION, name_hash
from ds_memopt.optimizers.probes.trajectory import SKIPPED, TrajectoryHeader, TrajectoryWriter, read_trajectory

HEADER = TrajectoryHeader(
    method="MeZO",
    hyper={"eps": 1e-3, "seed": 2**64 - 1, "betas": [0.9, 0.95]},
    probes=2,
    parameters=[["embed.weight", "head.weight"], ["norm.weight"], ["bias"]],
    base_checksum="00000000deadbeef",
    dtype="bfloat16",
)
SIZE = 4 + 4 + 2 * 8 + 3 * 8 + 4


def scalars(step: int) -> tuple[int, int, list[float], list[float]]:
    return step, SKIPPED * (step % 2), [step / 3, -math.pi * 10.0**step], [1e-6 / (step + 1), 0.1, math.ulp(0.0)]


def write(path, steps=range(5), header=HEADER, resume_after=None):
    writer = TrajectoryWriter(path, header, resume_after)
    for step in steps:
        writer.append(*scalars(step))
    writer.close()
    return path


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


def test_what_is_read_is_what_was_written(tmp_path):
    path = write(tmp_path / "run.trajectory")
    header, records = read_trajectory(path)
    assert header == HEADER
    assert [(r["step"], r["flags"], list(r["g"]), list(r["lr"])) for r in records] == [scalars(s) for s in range(5)]
    whole = path.read_bytes()
    assert whole.count(b'"groups": 3') == 1 and len(whole.split(b"\n", 1)[1]) == 5 * SIZE
    assert refusal(write, path) == f"{path} exists. To continue its run pass resume_after, else give another path."
    assert path.read_bytes() == whole and os.listdir(tmp_path) == [path.name]


def test_each_step_can_be_read_as_soon_as_it_is_appended(tmp_path):
    path = tmp_path / "run.trajectory"
    writer = TrajectoryWriter(path, HEADER)
    assert read_trajectory(path)[1].shape == (0,)
    for step in range(3):
        writer.append(step, SKIPPED, torch.tensor([math.nan, math.inf]), np.float32([1, 2, 3]))
        assert read_trajectory(path)[1]["g"].shape == (step + 1, 2)
    writer.close()
    np.testing.assert_equal(read_trajectory(path)[1]["g"][2], [math.nan, math.inf])


def test_twenty_thousand_steps_take_less_than_a_megabyte(tmp_path, record_property):
    path = tmp_path / "run.trajectory"
    writer = TrajectoryWriter(path, dataclasses.replace(HEADER, probes=1, parameters=[["weight"], ["bias"]]))
    begin = time.perf_counter()
    for step in range(20_000):
        writer.append(step, 0, [0.5 * step], [1e-6, 1e-7])
    record_property("microseconds_per_append", (time.perf_counter() - begin) / 20_000 * 1e6)
    writer.close()
    assert path.stat().st_size < 1_000_000
    assert read_trajectory(path)[1]["g"][-1] == [9999.5]


def test_a_run_killed_within_a_record_says_so_and_can_be_resumed(tmp_path):
    """Cut at every byte of the last record, as by a crash while it is written."""
    path = write(tmp_path / "run.trajectory")
    whole = path.read_bytes()
    for left_over in range(SIZE):
        path.write_bytes(whole[: len(whole) - SIZE + left_over])
        if left_over:
            assert refusal(read_trajectory, path) == (
                f"{path} is cut: after 4 whole records {left_over} bytes are left over, and a record has {SIZE}. "
                f"Resume its run, copy it again, or drop what is left over: truncate -s -{left_over} {path}"
            )
            os.truncate(path, path.stat().st_size - left_over)
        assert len(read_trajectory(path)[1]) == 4
        path.write_bytes(whole[: len(whole) - SIZE + left_over])
        write(path, steps=[4], resume_after=3)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("first_step", [0, 7])
def test_a_resumed_run_goes_back_to_its_checkpoint(tmp_path, first_step):
    # What JSON does not keep does not matter: the order of a dict, and tuples.
    hyper = {"betas": (0.9, 0.95), "seed": 2**64 - 1, "eps": 1e-3}
    header = dataclasses.replace(HEADER, first_step=first_step)
    steps = range(first_step, first_step + 5)
    path = write(tmp_path / "run.trajectory", steps, header)
    whole = path.read_bytes()
    for after in (first_step - 1, *steps):
        write(path, [], header, resume_after=after)
        assert [*read_trajectory(path)[1]["step"]] == [*range(first_step, after + 1)]
        write(path, range(after + 1, steps.stop), dataclasses.replace(header, hyper=hyper), resume_after=after)
        assert path.read_bytes() == whole
    for after in (first_step - 2, first_step + 5):
        message = f"{path} has 5 steps from step {first_step} on: it cannot go on after step {after}. Resume from a "
        assert refusal(write, path, header=header, resume_after=after).startswith(message)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"method": "HiZOO", "dtype": "float32"}, "method: 'MeZO', this run 'HiZOO'"),
        ({"hyper": {"eps": 1e-3, "seed": 3, "betas": (0.9, 0.95)}}, f"hyper.seed: {2**64 - 1}, this run 3"),
        ({"hyper": HEADER.hyper | {"betas": [0.9, 0.99]}}, "hyper.betas.1: 0.95, this run 0.99"),
        ({"hyper": HEADER.hyper | {"probes": 1}}, "hyper.probes: nothing, this run 1"),
        ({"probes": 1}, "probes: 2, this run 1"),
        (
            {"parameters": [["embed.weight"], ["norm.weight"], ["bias"]]},
            "parameters.0.1: 'head.weight', this run nothing",
        ),
        ({"first_step": 1}, "first_step: 0, this run 1"),
    ],
)
def test_another_run_cannot_resume(tmp_path, changes, difference):
    path = write(tmp_path / "run.trajectory")
    before = path.read_bytes()
    message = refusal(write, path, header=dataclasses.replace(HEADER, **changes), resume_after=2)
    assert message == f"{path} has {difference}. Resume with the same, or give another path."
    assert path.read_bytes() == before


def test_what_is_no_trajectory_is_refused(tmp_path):
    path, nothing = write(tmp_path / "run.trajectory"), tmp_path / "nothing"
    lost = f"{nothing} cannot be read: No such file or directory. Give the path of a trajectory."
    assert refusal(read_trajectory, nothing) == refusal(write, nothing, resume_after=1) == lost
    whole = path.read_bytes()
    line = whole.split(b"\n")[0]
    for content in (bytes(1000), b'{"step": 1}\n', *(line[:end] for end in range(len(line) + 1))):
        path.write_bytes(content)
        expected = "has a damaged header" if b'"ds_memopt_trajectory": ' in content else "is no trajectory: it does not"
        assert refusal(read_trajectory, path).startswith(f"{path} {expected}")
    for old, new in ((b'"groups": 3', b'"groups": 2'), (b'"probes": 2', b'"probes": 0'), (b"method", b"name")):
        path.write_bytes(whole.replace(old, new))
        assert "Copy it again from where it was written." in refusal(read_trajectory, path)
    known = {"ds_memopt_trajectory": 2, "noise_version": NOISE_VERSION}
    for key, version in known.items():
        path.write_bytes(whole.replace(f'"{key}": {version}, '.encode(), f'"{key}": 99, "new": true, '.encode()))
        message = f"{path} has {known | {key: 99}}, this ds_memopt reads {known}. Use the one that wrote the file."
        assert refusal(read_trajectory, path) == refusal(write, path, resume_after=1) == message


@pytest.mark.parametrize("lost", range(4))
def test_a_hole_is_found(tmp_path, lost):
    path = write(tmp_path / "run.trajectory")
    content = path.read_bytes()
    begin = len(content) - (5 - lost) * SIZE
    path.write_bytes(content[:begin] + content[begin + SIZE :])
    message = (
        f"{path} has a hole: it lacks step {lost}. Use another copy of it, or resume its run from a checkpoint of "
    )
    assert refusal(read_trajectory, path).startswith(message)
    assert refusal(write, path, resume_after=3).startswith(message)
    assert write(path, range(lost, 5), resume_after=lost - 1).read_bytes() == content


def test_no_step_out_of_turn_no_other_number_of_values_and_no_senseless_header(tmp_path):
    path = tmp_path / "run.trajectory"
    writer = TrajectoryWriter(path, HEADER)
    _, flags, g, lr = scalars(0)
    assert refusal(writer.append, 1, flags, g, lr) == f"{path} needs step 0 next, not 1. Append skipped steps too."
    assert refusal(writer.append, 0, flags, g[:1], lr) == "g must have shape (2,), as in the header, not (1,)."
    assert refusal(writer.append, 0, flags, g, 0.1) == "lr must have shape (3,), as in the header, not ()."
    writer.append(0, flags, g, lr)
    assert "needs step 1 next, not 0." in refusal(writer.append, 0, flags, g, lr)
    assert len(read_trajectory(path)[1]) == 1
    for changes in ({"probes": 0}, {"first_step": -1}, {"hyper": {"eps": math.nan}}, {"hyper": {"eps": torch.ones(1)}}):
        message = refusal(dataclasses.replace, HEADER, **changes)
        assert message.startswith(next(iter(changes))) and " must " in message


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
WHOLE = torch.arange(-50, 51)


def reference(name: str, start: int, tensor: torch.Tensor) -> str:
    """From the module's docstring, in Python's integers, on the bytes in memory."""
    raw, width = bytes(tensor.view(torch.uint8).tolist()), tensor.element_size()
    total = 0
    for index in range(len(tensor)):
        bits = int.from_bytes(raw[index * width : (index + 1) * width], "little", signed=True)
        z = (bits + name_hash(f"{tensor.dtype} {name}") + (start + index) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        total += z ^ z >> 31
    return f"{total % 2**64:016x}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_is_its_formula_however_a_parameter_is_cut(dtype, monkeypatch):
    whole, start = WHOLE.to(dtype), 2**40
    expected = reference("w", start, whole)
    total = checksum([("w", start, whole), ("empty", 0, whole[:0])])
    assert (total.shape, total.dtype, as_hex(total)) == ((), torch.int64, expected)
    assert as_hex(checksum([("w", start, torch.stack([whole, whole], dim=1)[:, 0])])) == expected
    monkeypatch.setattr(checksum_module, "PIECE", 7)
    for cut in range(len(whole) + 1):
        ranks = [checksum([("w", start + cut, whole[cut:])]), checksum([("w", start, whole[:cut])])]
        assert as_hex(torch.stack(ranks).sum()) == expected


def test_the_checksum_of_many_elements_keeps_its_bits():
    """Over several pieces. The value was found once: files that hold it must stay readable."""
    weights = torch.nn.Parameter(torch.arange(2**21 + 3, dtype=torch.float32))
    assert as_hex(checksum([("w", 0, weights)])) == "ca2a26184fddca00"
    assert as_hex(checksum([("w", 5, weights[5:]), ("w", 0, weights[:5])])) == "ca2a26184fddca00"


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_the_checksum_sees_every_change(dtype):
    whole, zeros = WHOLE.to(dtype), torch.zeros(9)
    variants = [("w", 0, whole), ("v", 0, whole), ("w", 1, whole), ("w", 0, whole[1:]), ("w", 0, whole[:-1])]
    variants += [("w", 0, zeros.to(other)) for other in DTYPES]
    integers = whole.view(checksum_module.INTEGERS[dtype.itemsize])
    for bit in range(8 * dtype.itemsize):
        for index in (0, 50, 100):
            flipped = integers.clone()
            flipped[index] ^= 1 << bit if bit < 63 else -(2**63)
            variants.append(("w", 0, flipped.view(dtype)))
    # Swapping x and -x changes two sign bits: the highest, easily lost in arithmetic modulo 2^64.
    for index in range(50):
        swapped = whole.clone()
        swapped[[index, 100 - index]] = whole[[100 - index, index]]
        variants.append(("w", 0, swapped))
    sums = [checksum([variant]).item() for variant in variants]
    sums += [checksum([(a, 0, whole), (b, 0, zeros)]).item() for a, b in ("vw", "wv")]
    assert len(set(sums)) == len(sums)


def test_the_checksum_refuses_what_it_cannot_place():
    for start, tensor in ((0, torch.ones(2, 2)), (0, torch.ones(2, dtype=torch.complex128)), (-1, torch.ones(2))):
        assert refusal(checksum, [("a", start, tensor)]).startswith(f"a from element {start} must be 1-D, of at most 8")
