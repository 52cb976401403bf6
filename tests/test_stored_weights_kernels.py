"""Fused noise, perturbed copies and steps of stored weights against plain PyTorch: equal bits.

Triton's interpreter is chosen before Triton is imported, for a whole process: these tests run in one of their own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_interpreter import patch_language_once

from ds_memopt.kernels import Moved, NoiseSource, Step, add_noise, move, residual_of
from ds_memopt.kernels.back_ends import VARIABLE, status

KINDS = ["gaussian", "rademacher"]
DTYPES = [torch.float32, torch.bfloat16]
# With starts within a counter, around its borders and beyond 2^32 counters; lengths with and without whole vectors,
# one that takes several threads or programs, and one that Triton loads many elements of at once.
PLACES = [(0, 0), (3, 1), (5, 131), (2**40 + 1, 77), (2**39 - 130, 300), (129, 35_001), (256, 4112)]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACK_ENDS = ["triton"] if INTERPRETED else ["cpp", "cpp, 2 threads"] + ["triton"] * torch.cuda.is_available()
needs_triton = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs Triton, which is for Linux and GPUs"
)


@needs_triton
def test_triton_in_its_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rN", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


@pytest.fixture(scope="module", autouse=INTERPRETED)
def quick_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch_language_once(patch)
        yield


@pytest.fixture(params=BACK_ENDS)
def back_end(request):
    """A fused back end."""
    word = request.param.split(",")[0]
    if reason := status()[word]:
        pytest.skip(reason)
    before = torch.get_num_threads()
    torch.set_num_threads(2 if "threads" in request.param else 1)
    yield word
    torch.set_num_threads(before)


@pytest.fixture
def both(back_end, monkeypatch):
    """Calls a function with the fused back end, and with plain PyTorch."""

    def call(function):
        results = []
        for word in (back_end, "plain"):
            monkeypatch.setenv(VARIABLE, word)
            results.append(function())
        return results

    return call


@pytest.fixture
def device(back_end):
    return "cuda" if back_end == "triton" and torch.cuda.is_available() else "cpu"


def source(kind: str, step: int = 5) -> NoiseSource:
    return NoiseSource(kind, 0xFEDCBA9876543210, step, 2**32 - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_perturbed_copies_have_the_bits_of_plain_pytorch(kind, dtype, both, device):
    for start, length in PLACES:
        weights = torch.randn(length, device=device).to(dtype)

        def results(weights=weights, start=start):
            noise, copy, in_place = torch.empty_like(weights), torch.empty_like(weights), weights.clone()
            add_noise(noise, None, source(kind), start)
            add_noise(copy, weights, source(kind), start, 1 / 3)
            add_noise(in_place, in_place, source(kind), start, torch.tensor(1 / 3, dtype=torch.float64))
            return noise, copy, in_place

        for fused, plain in zip(*both(results), strict=True):
            assert torch.equal(fused, plain), (start, length)


class Noises:
    """Terms of several steps, as `NoiseSum`."""

    def __init__(self, start: int, terms: list[tuple[NoiseSource, float]]) -> None:
        self.start, self.terms = start, terms

    def sources(self):
        return self.terms

    def add_(self, direction, weights, start):
        for noise, factor in self.terms:
            add_noise(direction, direction, noise, self.start + start, factor)


def new_step(dtype, kept, start, length, gradient, noises, device, lr=0.03):
    """A step with random weights, with whose residuals or masters it begins."""
    master = torch.randn(length, device=device)
    beside = {"none": None, "residual": residual_of(master), "fp32": master.clone()}[kept]
    g = None if gradient is None else torch.randn(length, device=device).to(gradient)
    terms = [(noise, 0.7 - number) for number, noise in enumerate(noises)]
    return Step(master.to(dtype), beside, lr, 0.1, g, 0.9, Noises(start, terms) if terms else None)


def made(steps):
    """What copies of the steps leave, and what they moved."""
    copies = [
        replace(step, weights=step.weights.clone(), kept=None if step.kept is None else step.kept.clone())
        for step in steps
    ]
    moved = move(copies, Moved(1.0, 2.0))
    left = [tensor for step in copies for tensor in (step.weights, step.kept) if tensor is not None]
    return left, torch.tensor([float(value) for value in moved], dtype=torch.float64)


def assert_alike(fused, plain):
    """Sums of what moved differ by their order: by up to 2e-7."""
    assert all(map(torch.equal, fused[0], plain[0]))
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "residual"), (torch.bfloat16, "fp32")],
)
@pytest.mark.parametrize("gradient", [None, *DTYPES])
def test_steps_of_many_parts_have_the_bits_of_plain_pytorch(gradient, dtype, kept, both, device):
    """In one call parts with no noise, and with one and two terms of either kind."""
    steps = [
        new_step(
            dtype, kept, start, length, gradient, [source(KINDS[number % 2], n) for n in range(number % 3)], device
        )
        for number, (start, length) in enumerate(PLACES, start=1)
    ]
    fused, plain = both(lambda: made(steps))
    assert_alike(fused, plain)
    last = steps[-1]
    assert not torch.equal(fused[0][-1], last.weights if last.kept is None else last.kept)


def test_a_rate_may_be_a_tensor(both, device):
    rate = torch.tensor(0.03, device=device) / 7
    step = new_step(torch.bfloat16, "residual", 3, 5000, torch.bfloat16, [source("gaussian")], device, rate)
    assert_alike(*both(lambda: made([step])))


def test_what_is_not_covered_is_made_by_plain_pytorch(both, device):
    """fp16 and fp64 in the same call as bf16, and what lies apart."""
    steps = [
        new_step(dtype, "none", 3, 500, dtype, [source("gaussian"), source("gaussian", 6)], device)
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
    ]
    assert_alike(*both(lambda: made(steps)))

    def strided():
        wide = torch.ones(100, 2, device=device)
        add_noise(wide[:, 1], wide[:, 0], source("gaussian"), 3, 0.5)
        return wide

    assert torch.equal(*both(strided))


def test_no_steps_move_nothing():
    assert move([], Moved(1.0, 2.0)) == Moved(1.0, 2.0)


TYPES = {
    "out": "*bf16", "weights": "*bf16", "count": "i64", "start": "i64", "step": "u32", "probe": "u32", "key_low": "u32",
    "key_high": "u32", "scale": "fp32", "parts": "*i64", "num_parts": "i32", "scalars": "*fp32", "noises": "*i64",
    "factors": "*fp32", "moved": "*fp32",
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("kernel", ["add_noise", "move"])
@pytest.mark.parametrize("gaussian", [True, False])
def test_kernels_compile_for_a_gpu_and_contract_nothing(kernel, gaussian, tmp_path, monkeypatch):
    """Compiled for compute capability 9.0, which takes no GPU. Aligned elements are loaded 16 bytes at once."""
    import triton

    from ds_memopt.kernels.gpu import launches, noise_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bf16, function = triton.language.bfloat16, getattr(noise_kernels, kernel)
    constants = {"GAUSSIAN": gaussian, "ALIGNED": True}
    constants |= {"VALUES": False} if kernel == "add_noise" else {"W": bf16, "KEPT": "residual", "G": bf16}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("out", "weights") if name in names}
    source = triton.compiler.ASTSource(function, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assembly = triton.compile(source, target=target, options=launches.OPTIONS).asm["ptx"]
    assert "ld.global.v4.b32" in assembly and "st.global.v4.b32" in assembly
    assert not re.search(r"fma|atom|sqrt\.approx", assembly)
