"""The noise against a reference in Python's integers, its statistics, and that nothing but its arguments changes it."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from ds_memopt.kernels import compile_exactly, noise_formulas
from ds_memopt.kernels.back_ends import VARIABLE, status
from ds_memopt.kernels.noise_formulas import philox
from ds_memopt.optimizers.probes.noise import Noise, name_hash

KINDS = ["gaussian", "rademacher"]
NAME = "model.layers.0.mlp.up_proj.weight"
COUNT = 2**20
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def plain(monkeypatch):
    """Noise by the formulas of noise_formulas.py, to whose bits other tests hold the fused back ends."""
    monkeypatch.setenv(VARIABLE, "plain")


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def reference(z: Noise, name: str, element: int) -> float:
    """One element, from the docstrings of the module."""
    block, inside = divmod(element, {"gaussian": 4, "rademacher": 128}[z.kind])
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    key = (z.seed % 2**64) ^ int.from_bytes(digest, "little")
    words = reference_philox([block % 2**32, block // 2**32, z.step, z.probe], [key % 2**32, key // 2**32])
    if z.kind == "rademacher":
        return -1.0 if words[inside // 32] >> (inside % 32) & 1 else 1.0
    v, w = words[:2] if inside < 2 else words[2:]
    u = torch.tensor((v + 1) / 2**32, dtype=torch.float32).item()
    r = math.sqrt(-2 * math.log(u)) * (-1 if w >> 31 else 1)
    angle = (w % 2**30 - 2**29) / 2**31 * math.pi
    pair = (math.cos(angle), math.sin(angle))
    return r * pair[(inside + (w >> 30)) % 2]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    assert reference_philox(counter, key) == expected
    words = philox([torch.tensor([word]) for word in counter], key)
    assert [word.item() for word in words] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("seed", "step", "probe", "start"),
    [(0, 0, 0, 0), (42, 1000, 1, 129), (-1, 2**32 - 1, 2**32 - 1, 2**40 + 3), (2**63 + 5, 7, 2, 2**62 - 77)],
)
def test_each_element_is_what_the_formula_says(kind, seed, step, probe, start, plain):
    """Words and signs to the bit; Gaussian: fp32 arithmetic errs by up to 9e-7, any wrong word by about 1."""
    z = Noise(seed, step, probe, kind)
    expected = torch.tensor([reference(z, NAME, start + number) for number in range(300)])
    torch.testing.assert_close(z.values(NAME, start, 300), expected, rtol=0, atol=1e-6 if kind == "gaussian" else 0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_slice_equals_that_part_of_the_whole(kind, compiled, plain):
    whole = Noise(3, 5, 1, kind).values(NAME, 0, 600)
    z = Noise(3, 5, 1, kind, compiled)
    for start in range(140):
        for length in (0, 1, 2, 3, 5, 128, 131, 460):
            assert torch.equal(z.values(NAME, start, length), whole[start : start + length]), (start, length)


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1000, 70_001])
def test_the_size_of_the_pieces_and_the_threads_change_nothing(kind, piece, monkeypatch, set_threads, plain):
    z, length = Noise(3, 5, 1, kind), 200_003
    set_threads(1)
    values, added = z.values(NAME, 7, length), z.add_(torch.ones(length), NAME, 7, 0.1)
    set_threads(2)
    monkeypatch.setitem(noise_formulas.PIECE, "cpu", piece)
    assert torch.equal(z.values(NAME, 7, length), values)
    assert torch.equal(z.add_(torch.ones(length), NAME, 7, 0.1), added)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_compiler), pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_on_any_device_gives_the_bits_of_plain_pytorch_on_a_cpu(kind, device, plain):
    itself, compiled = Noise(3, 5, 1, kind), Noise(3, 5, 1, kind, compiled=True)
    expected = itself.values(NAME, 2**40 + 1, COUNT)
    assert torch.equal(compiled.values(NAME, 2**40 + 1, COUNT, device).cpu(), expected)
    assert torch.equal(itself.values(NAME, 2**40 + 1, COUNT, device).cpu(), expected)
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.linspace(-1, 1, 70_001, dtype=dtype)
        expected = itself.add_(target.clone(), NAME, 2, 1e-3)
        assert torch.equal(compiled.add_(target.to(device), NAME, 2, 1e-3).cpu(), expected)


VERSION_1 = 1, "ad4be0d4e961f193f09306d2b032ece8"
DIGEST = """
import hashlib
from ds_memopt.optimizers.probes.noise import NOISE_VERSION, Noise
digest = hashlib.blake2b(digest_size=16)
for kind in ("gaussian", "rademacher"):
    digest.update(Noise(2**40 + 1, 3, 1, kind).values("a.weight", 5, 100_003).numpy().tobytes())
found = NOISE_VERSION, digest.hexdigest()
"""


@pytest.mark.parametrize("back_end", ["plain", "cpp"])
def test_this_machine_gives_the_bits_of_version_1(back_end, monkeypatch):
    if reason := back_end == "cpp" and status()["cpp"]:
        pytest.skip(reason)
    monkeypatch.setenv(VARIABLE, back_end)
    exec(DIGEST, names := {})
    assert names["found"] == VERSION_1


OTHERS = {"default", "avx2", "avx512"} - {torch.backends.cpu.get_cpu_capability().lower()}


@pytest.mark.parametrize("capability", sorted(OTHERS))
def test_other_machines_give_the_bits_of_version_1(capability):
    """PyTorch's own log and cos give other bits on another CPU, and its sqrt does even on the same one."""
    environment = os.environ | {VARIABLE: "plain", "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", DIGEST + "print(*found)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*map(str, VERSION_1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_in_16_bits_is_rounded_once(kind, dtype):
    z = Noise(3, 5, 1, kind)
    values = z.values(NAME, 3, 5000)
    assert torch.equal(z.values(NAME, 3, 5000, dtype=dtype), values.to(dtype))
    target = torch.linspace(-3, 3, 5000).to(dtype)
    expected = (target.float() + values * 0.3).to(dtype)
    assert (values * 0.3).to(dtype).float().ne(values * 0.3).any() or dtype == torch.float32
    for scale in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        changed = target.clone()
        assert z.add_(changed, NAME, 3, scale) is changed
        assert torch.equal(changed, expected)


def test_a_parameter_and_a_strided_target_are_changed_in_place():
    z = Noise(3, 5)
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    z.add_(parameter.view(-1), NAME, 0, 2.0)
    assert torch.equal(parameter.flatten(), 2 * z.values(NAME, 0, 24))
    wide = torch.zeros(10, 2)
    z.add_(wide[:, 1], NAME, 4, 1.0)
    assert torch.equal(wide, torch.stack([torch.zeros(10), z.values(NAME, 4, 10)], dim=1))


def test_gaussian_moments_and_distribution():
    """Limits are 5 standard deviations of each estimate for COUNT independent normal numbers; 2.3 for KS: p = 5e-5."""
    z = Noise(1, 2).values(NAME, 0, COUNT).double()
    error = 5 / math.sqrt(COUNT)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs((z**power).mean().item() - mean) < error * math.sqrt(variance), power
    cumulative = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    steps = (torch.arange(COUNT) + 0.5) / COUNT
    assert (cumulative - steps).abs().max() < 2.3 / math.sqrt(COUNT)
    for limit in (3, 4):
        share = math.erfc(limit / math.sqrt(2))
        assert abs((z.abs() > limit).double().mean().item() - share) < error * math.sqrt(share), limit


def test_rademacher_bits_are_fair():
    """Each of a counter's 128 bits by itself, 2^13 times: within 5 standard deviations."""
    z = Noise(1, 2, kind="rademacher").values(NAME, 0, COUNT)
    assert torch.equal(z.abs(), torch.ones(COUNT))
    assert abs(z.mean().item()) < 5 / math.sqrt(COUNT)
    assert z.view(-1, 128).mean(dim=0).abs().max() < 5 / math.sqrt(COUNT / 128)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_steps_probes_seeds_and_names_are_uncorrelated(kind):
    """Correlations of z, and of z^2 where it varies: within 5 / sqrt(COUNT)."""
    first = Noise(1, 2, 0, kind).values(NAME, 0, COUNT)
    others = {f"lag {lag}": first.roll(lag) for lag in (1, 2, 3, 4, 5, 8, 32, 64, 128, 4096)}
    others["step"] = Noise(1, 3, 0, kind).values(NAME, 0, COUNT)
    others["probe"] = Noise(1, 2, 1, kind).values(NAME, 0, COUNT)
    others["step and probe swapped"] = Noise(1, 0, 2, kind).values(NAME, 0, COUNT)
    others["seed"] = Noise(2, 2, 0, kind).values(NAME, 0, COUNT)
    others["seed's high word"] = Noise(1 + 2**32, 2, 0, kind).values(NAME, 0, COUNT)
    others["name"] = Noise(1, 2, 0, kind).values(NAME.replace("0", "1"), 0, COUNT)
    others["2^34 elements on"] = Noise(1, 2, 0, kind).values(NAME, 2**34, COUNT)
    for what, other in others.items():
        assert abs((first * other).mean().item()) < 5 / math.sqrt(COUNT), what
        squares = ((first**2 - 1) * (other**2 - 1)).mean().item() / 2
        assert abs(squares) < 5 / math.sqrt(COUNT), what


def test_the_hash_of_a_name_is_fixed():
    assert name_hash("") == 0xB4B2797457A0A6E4
    assert name_hash("model.embed_tokens.weight") == 0xF64261A496B5D16A


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(seed=2**64), "seed must be an integer from -9223372036854775808 to 18446744073709551615"),
        (dict(seed=-(2**63) - 1), "seed"),
        (dict(step=2**32), "step must be an integer from 0 to 4294967295, not 4294967296"),
        (dict(step=-1), "step"),
        (dict(step=1.5), "step"),
        (dict(probe=-1), "probe"),
        (dict(kind="uniform"), "kind must be one of gaussian, rademacher, not 'uniform'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Noise(**dict(seed=0, step=0) | arguments)


def test_elements_and_targets_that_cannot_be_are_refused():
    z = Noise(0, 0)
    for start, length in ((-1, 4), (0, -1), (2**63 - 4, 4)):
        with pytest.raises(ValueError, match="negative|do not lie between 0 and 2\\^63"):
            z.values(NAME, start, length)
    with pytest.raises(ValueError, match="must be 1-D and floating-point, not 2-D"):
        z.add_(torch.zeros(2, 2), NAME, 0, 1.0)
    with pytest.raises(ValueError, match="int64"):
        z.add_(torch.zeros(2, dtype=torch.int64), NAME, 0, 1.0)


def test_a_compiler_that_is_missing_or_changes_bits_is_refused(monkeypatch):
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def missing(x: torch.Tensor) -> torch.Tensor:
        raise OSError("no g++")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: missing)
    with pytest.raises(RuntimeError, match="double cannot be compiled for cpu"):
        compile_exactly(double, torch.ones(3))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda x: 2 * x + 1e-6)
    with pytest.raises(RuntimeError, match="double gives other numbers when compiled for cpu"):
        compile_exactly(double, torch.ones(3))
