"""The Triton kernels against plain PyTorch in fp64: in Triton's interpreter, on the CPU; and compiled for a GPU.

The interpreter is chosen before Triton is imported, for a whole process. So the tests that need it are those of this
file in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: it is for Linux, with torch's builds for GPUs")

import test_kernels  # noqa: E402
import test_packed_kernels  # noqa: E402
from test_kernels import HYPER, METHODS, beginning, check_update_norms, expected, step  # noqa: E402
from test_packed_kernels import check_packed_step, check_that_no_number_spreads  # noqa: E402
from triton_interpreter import patch_language_once  # noqa: E402

from ds_memopt.kernels import back_ends, codes, gpu  # noqa: E402
from ds_memopt.kernels.gpu import (  # noqa: E402
    adam_kernels,
    codes_kernels,
    gwt_kernels,
    launches,
    packed_gwt_kernels,
    packed_gwt_on_gpu,
    packed_kernels,
)
from ds_memopt.kernels.noise_formulas import NoiseSource, elements  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs within test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

CUTS = {"one rank": [], "four ranks, one with nothing": [2, 51, 1_000]}
FP32, BF16 = torch.float32, torch.bfloat16
STEPS = 2


@compiled
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rN", "-s", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "DS_MEMOPT_KERNELS": "triton"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


@pytest.fixture(scope="module", autouse=INTERPRETED)
def within_what_the_interpreter_can_do():
    """It is slow, has one state for all threads, which stand for ranks here, and cuts bf16 off where a GPU rounds."""
    import triton.runtime.interpreter

    lock, start = threading.Lock(), launches.start
    convert = triton.runtime.interpreter._convert_float

    def locked(*arguments):
        with lock:
            start(*arguments)

    def rounded(values, of_input, of_output, mode):
        if of_output != triton.language.bfloat16:
            return convert(values, of_input, of_output, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.int16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_kernels.SHAPES, "norm.weight", (17_000,))  # of more than one program
        patch.setitem(test_kernels.SHAPES, "layers.0.mlp.down_proj.weight", (8, 33))  # a row takes as long as any
        patch.setattr(test_kernels, "STEPS", STEPS)
        patch.setattr(test_packed_kernels, "STEPS", STEPS)
        patch.setattr(packed_kernels, "GROUPS", triton.language.constexpr(64))  # at once: a tile takes as long as any
        patch.setattr(packed_gwt_on_gpu, "TILE", 2**14)
        patch.setattr(launches, "start", locked)
        patch.setattr(triton.runtime.interpreter, "_convert_float", rounded)
        patch_language_once(patch)
        caches = beginning, expected, test_packed_kernels.unpacked
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


def plain_in_fp64(method: str, steps: int = STEPS) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_MEMOPT_KERNELS", "plain")
        return expected(method, steps)


def error_of(method: str, cuts: list[int], steps: int = STEPS) -> float:
    """Of the distance moved."""
    with launches.recorded() as books:
        result = step(method, cuts, (FP32, FP32), steps)
    assert books
    exact = plain_in_fp64(method, steps)
    return ((result - exact).norm() / (exact - beginning()).norm()).item()


@in_interpreter
@pytest.mark.parametrize("method, cuts", [
    *((method, "four ranks, one with nothing") for method in METHODS if method != "GWT"),  # which the next test has
    ("AdamMini", "one rank"), ("GWT over Adam-mini", "one rank"),
])  # fmt: skip
def test_triton_makes_the_same_step_as_plain_in_fp64(method, cuts):
    """Measured: up to 3e-7; with m in bf16 9e-4, as plain's own in fp32."""
    error = error_of(method, CUTS[cuts])
    print(f"{method}, {cuts}: {error:.1e}")
    assert error < (5e-3 if "bf16" in method else 1e-6)


@in_interpreter
@pytest.mark.parametrize("cuts", CUTS)
def test_the_limiter_acts_on_what_it_left(cuts):
    """The third step's limit follows from the second's limited update. Measured: 3e-7; from the unlimited one 7e-3."""
    assert error_of("GWT", CUTS[cuts], steps=3) < 1e-6


@in_interpreter
def test_triton_saves_the_update_norms_of_plain():
    check_update_norms("triton")


@in_interpreter
@pytest.mark.parametrize("method", ["AdamMini", "GWT", "GWT, level 4, over Adam-mini"])
def test_without_sums_over_ranks_the_error_is_seen(method, monkeypatch):
    monkeypatch.setattr(test_kernels.Ranks, "begin_sum", lambda ranks, rank, slots: lambda: None)
    error = error_of(method, [51, 1_000], steps=1)
    print(f"{method} without sums: {error:.1e}")
    assert error > 1e-3


@in_interpreter
@pytest.mark.parametrize(
    "method, of_gradient", [("AdamMini, bf16 state", BF16), ("AdamW", FP32), ("GWT over Adam-mini", FP32)]
)
def test_triton_rounds_once_in_bf16(method, of_gradient):
    """A parameter in bf16 is at most half a unit from the step in fp64. Plain rounds up to three times."""
    result, exact = step(method, [51, 1_000], (BF16, of_gradient), steps=1), plain_in_fp64(method, steps=1)
    half_a_unit = 2 ** exact.abs().log2().ceil() * 2**-9
    assert ((result - exact).abs() <= half_a_unit + 1e-8).all()  # 1e-8: the step in fp32, 1e-6 of its size
    assert (result - beginning()).norm() > 0.9 * (exact - beginning()).norm()


SHAPES = {"q_proj.weight": (4, 64), "up_proj.weight": (3, 72), "down_proj.weight": (5, 33), "norm.bias": (9,)}
"""All that is loaded by four and all that is not."""


def of_model(kernels: str, dtypes: list[torch.dtype], method: str, shift: int = 0) -> list[torch.Tensor]:
    """Parameters, each a tensor of its own, after two steps; those that are last have no gradient in the first step.

    shift: elements by which each tensor lies behind an aligned address.
    """
    rule, hyper = METHODS[method]
    generator = torch.Generator().manual_seed(0)

    def laid(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        storage = torch.zeros(values.numel() + shift, dtype=dtype)
        return storage[shift:].view(values.shape).copy_(values)

    named = {
        name: torch.nn.Parameter(laid(torch.randn(shape, generator=generator), dtype))
        for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=True)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_MEMOPT_KERNELS", kernels)
        optimizer = rule(named.items(), **HYPER, **hyper)
        for time in range(2):
            for name, p in named.items():
                gradient = laid(torch.randn(p.shape, generator=generator), p.dtype)
                p.grad = gradient if time or name != "norm.bias" else None
            optimizer.step()
    return [p.detach() for p in named.values()]


@in_interpreter
@pytest.mark.parametrize("method", ["AdamMini", "AdamW", "GWT", "GWT over Adam-mini"])
def test_tensors_of_several_dtypes_and_alignments_go_in_one_call(method):
    """Measured: 1e-7 of each tensor's largest value in fp32. In 16 bits plain is up to two units off by itself."""
    dtypes = [FP32, BF16, torch.float16, FP32]
    for ours, plain in zip(of_model("triton", dtypes, method), of_model("plain", dtypes, method), strict=True):
        limit = 1e-6 if ours.dtype == FP32 else 2 * torch.finfo(ours.dtype).eps
        print(f"{method}: {(ours - plain).abs().max() / plain.abs().max():.1e} in {ours.dtype}")
        assert (ours - plain).abs().max() < limit * plain.abs().max()


@in_interpreter
@pytest.mark.parametrize("method", ["AdamMini", "AdamW", "GWT", "GWT over Adam-mini"])
def test_alignment_changes_no_bit(method):
    aligned, shifted = (of_model("triton", [FP32] * 4, method, shift) for shift in (0, 1))
    for one, other in zip(aligned, shifted, strict=True):
        assert torch.equal(one, other)


@in_interpreter
@pytest.mark.parametrize("method, storage, cuts", [
    ("AdamMini", ("bfloat16", "int8", "remainder8"), [2, 51, 15_001]),
    ("AdamW", ("float32", "int8", "fp32"), [51]),
    ("GWT", ("bfloat16", "int8", "remainder8"), [701]),
    ("GWT over Adam-mini", ("bfloat16", "bf16", "remainder16"), [701]),
])  # fmt: skip
def test_triton_makes_the_step_of_unpacked_tensors(method, storage, cuts):
    """Groups of all kinds and blocks are cut. Measured: masters 1e-5 of the distance moved apart, and no code differs.
    Where ranks leave a group's scale at their own maxima 4e-3 of the codes do, with wrong bits of rounding a third."""
    check_packed_step("triton", method, storage, cuts)


@in_interpreter
def test_what_is_no_number_stays_so_in_its_group_alone(monkeypatch):
    """Of which another rank, whose entries are numbers, has a part."""
    monkeypatch.setattr(test_packed_kernels, "STEPS", 1)
    check_that_no_number_spreads("triton", 20, [51])


@triton.jit
def pack_and_unpack(
    values, scales, noise, packed, unpacked, weights, rests, masters, halves,
    CODE: triton.language.constexpr, REST: triton.language.constexpr,
):  # fmt: skip
    at = triton.language.arange(0, 8)[:, None] * 128 + triton.language.arange(0, 128)[None, :]
    value, scale = triton.language.load(values + at), triton.language.load(scales + at)
    step, probe = triton.language.load(noise), triton.language.load(noise + 1)
    key_low, key_high = triton.language.load(noise + 2), triton.language.load(noise + 3)
    bits = codes_kernels.rounding_bits(3, step, probe, key_low, key_high, 8)
    code = codes_kernels.encode(value, scale, bits, CODE)
    triton.language.store(packed + at, code)
    triton.language.store(unpacked + at, codes_kernels.decode(code, scale))
    weight, rest = codes_kernels.split(value, bits, REST)
    triton.language.store(weights + at, weight)
    triton.language.store(rests + at, rest)
    triton.language.store(masters + at, codes_kernels.join(weight, rest))
    triton.language.store(halves + at, codes_kernels.to_bf16(value, bits))


@in_interpreter
@pytest.mark.parametrize("code, rest", [(torch.int8, torch.int16), (torch.uint8, torch.int8)], ids=str)
def test_triton_packs_to_the_bit(code, rest):
    """Also zeros, what is far smaller than its scale, and masters in the middle between two weights."""
    values = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    values[1], values[2, 1:], values[3, :64] = 0, values[2, 1:] * 1e-9, 0
    values[4:].view(torch.int32).bitwise_and_(-(2**16)).bitwise_or_(2**15)
    values = values.abs() if code == torch.uint8 else values
    scales = values.abs().amax(1, keepdim=True).expand_as(values).contiguous()
    dtypes = code, FP32, torch.int16, rest, FP32, BF16
    found = [torch.empty(8, 128, dtype=dtype) for dtype in dtypes]
    named = [getattr(triton.language, str(dtype).removeprefix("torch.")) for dtype in (code, rest)]
    noise = NoiseSource("rounding", 0xFEDCBA9876543210, 7, 2)
    arguments = torch.tensor([noise.step, noise.probe, noise.key & 0xFFFFFFFF, noise.key >> 32])
    launches.start(pack_and_unpack, 1, (values, scales, arguments, *found), {"CODE": named[0], "REST": named[1]})
    bits = elements(noise, 3 * 128, 1024, torch.device("cpu")).view(8, 128)
    packed = codes.encode(values, scales, code, bits)
    weights, rests = codes.split(values, rest, bits)
    expected_ones = (
        packed, codes.decode(packed, scales), weights.view(torch.int16), rests, codes.join(weights, rests),
        codes.to_bf16(values, bits),
    )  # fmt: skip
    for ours, plain in zip(found, expected_ones, strict=True):
        assert torch.equal(ours, plain)


@in_interpreter
def test_what_triton_lacks_is_said():
    assert back_ends.status()["triton"] == ""
    assert back_ends.back_end_for(torch.device("cpu")) is gpu
    assert gpu.reason_against([torch.zeros(2), torch.zeros(2, dtype=BF16)]) == ""
    assert gpu.reason_against([torch.zeros(2, dtype=torch.float64)]) == "float64 on a GPU"
    assert "contiguous" in gpu.reason_against([torch.zeros(4)[::2]])
    assert "several devices" in gpu.reason_against([torch.zeros(2), torch.zeros(2, device="meta")])


@compiled
def test_triton_that_cannot_start_kernels_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        gpu.check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    broken = mock.Mock(get_current_target=mock.Mock(side_effect=RuntimeError("Failed to find C compiler.")))
    monkeypatch.setattr(triton.runtime.driver, "_active", broken)
    with pytest.raises(RuntimeError, match="Triton cannot start kernels: Failed to find C compiler."):
        gpu.check()


TYPES = {
    "rows": "*i64", "programs": "*i32", "dense_rows": "*i64", "dense_programs": "*i32", "num_dense": "i32",
    "addresses": "*i64", "scalars": "*fp32", "slots": "*fp32", "sums": "*fp32", "sums_width": "i32", "norms": "*fp32",
    "previous": "*fp32", "shares": "*fp32", "limiter": "fp32", "num_rows": "i32", "holders": "*i64", "num_slots": "i32",
    "slots_width": "i32", "period": "i32", "table": "*i64", "cut_rows": "*i64", "spans": "*i64", "pieces": "*i64",
    "slots_of_first": "*fp32", "slots_of_second": "*fp32", "holders_of_sums": "*i64", "num_sums": "i32",
    "num_sum_programs": "i32",
}  # fmt: skip
GWT_CONSTANTS = {"K": 4, "BY_BLOCK": False}
CODES = {"M": triton.language.int8, "V": triton.language.uint8}
SMALLEST = {"P": triton.language.int16, "G": triton.language.bfloat16, "M": triton.language.int8}


def assembly_of(kernel, constants: dict, **options) -> str:
    """Compiled for compute capability 9.0, which takes no GPU."""
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options=launches.OPTIONS | options).asm["ptx"]


@compiled
@pytest.mark.parametrize("kernel, constants", [
    (adam_kernels.adam_by_block, {"SUMS": "own", "MOVE": True}),
    (gwt_kernels.gwt, GWT_CONSTANTS | {"LIMITED": False, "ADVANCE": True, "APPLY": True, "DENSE": True}),
    (gwt_kernels.gwt, GWT_CONSTANTS | {"LIMITED": True, "ADVANCE": False, "APPLY": True, "DENSE": False}),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_kernels_compile_for_a_gpu_and_load_four_words_at_once(kernel, constants, tmp_path, monkeypatch):
    """Nothing is contracted to fused multiply-adds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly = assembly_of(kernel, constants | dict.fromkeys("PGM", triton.language.float32) | {"ALIGNED": True})
    assert "ld.global.v4.b32" in assembly and "st.global.v4.b32" in assembly
    assert not re.search(r"fma\.rn\.f32|atom", assembly)


@compiled
def test_packed_steps_compile_for_a_gpu_and_load_four_entries_at_once(tmp_path, monkeypatch):
    """Four gradients or weights are two words."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    probes = {"PROBE_OF_FIRST": 1, "PROBE_OF_SECOND": 2, "ALIGNED": True, "R": triton.language.int8}
    of_gwt = CODES | GWT_CONSTANTS | {"LIMITED": True, "APPLY": True, "EACH": 32, "GROUPS": 2}
    for kernel, constants, registers in (
        (packed_kernels.adam, {"V": triton.language.float32, "BY_BLOCK": True}, packed_kernels.REGISTERS),
        (packed_gwt_kernels.packed_gwt, of_gwt, None),
    ):
        assembly = assembly_of(kernel, SMALLEST | probes | constants, maxnreg=registers)
        assert len(re.findall(r"ld\.global\.v2\.b32", assembly)) == 2
        assert not re.search(r"fma\.rn\.f32|atom", assembly)


@compiled
@pytest.mark.parametrize("kernel, constants", [
    (adam_kernels.cut_squares, {"FIRST": True}),
    (packed_kernels.sums_and_maxima, {"M": triton.language.int8, "V": None, "FIRST_LAUNCH": True}),
    (packed_gwt_kernels.maxima_of_groups, GWT_CONSTANTS | CODES | {"FIRST_LAUNCH": True}),
    (gwt_kernels.cut_groups, {"FIRST": True, "SQUARES": True}),
    (gwt_kernels.matrix_norms, GWT_CONSTANTS | {"FIRST": True}),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_what_ranks_share_compiles_for_a_gpu(kernel, constants, tmp_path, monkeypatch):
    """The interpreter takes what the compiler refuses, such as a name for values of two shapes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly_of(kernel, constants | {"G": triton.language.float32})
