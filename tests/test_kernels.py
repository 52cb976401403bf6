"""The fused back end for the CPU against plain PyTorch in fp64, also where ranks share blocks, groups and matrices."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_memopt.kernels import back_ends
from ds_memopt.kernels.cpp import build
from ds_memopt.optimizers import GWT, AdamMini
from ds_memopt.optimizers.adamw import AdamW
from ds_memopt.optimizers.block_state.block_index import BlockIndex
from ds_memopt.optimizers.block_state.sharded_optimizer import OptimizerCall, ShardedOptimizer
from ds_memopt.shards import Interval, Layout, RankBorders, numel_of

SHAPES = {
    "layers.0.self_attn.q_proj.weight": (12, 10),  # heads of 4 rows; groups of 4 leave 2 of each row
    "layers.0.self_attn.v_proj.weight": (5, 64),
    "layers.0.mlp.up_proj.weight": (6, 150),  # many groups in a row
    "layers.0.mlp.down_proj.weight": (40, 33),
    "layers.0.mlp.up_proj.bias": (6,),
    "embed_tokens.weight": (7, 5),
    "norm.weight": (150_000,),  # a block that threads share
}
PADDING = 3
"""Elements of the flat buffer before each parameter that belong to none."""

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
METHODS = {
    "AdamMini": (AdamMini, {"head_dim": 4}),
    "AdamMini, whole values": (AdamMini, {"head_dim": 4, "value_blocks": "whole"}),
    "AdamMini, bf16 state": (AdamMini, {"head_dim": 4, "state_dtype": "bf16"}),
    "AdamW": (AdamW, {}),
    "GWT": (GWT, {"level": 2, "dense_lr": 5e-3}),
    "GWT, level 1": (GWT, {"level": 1, "limiter": None}),
    "GWT, level 3": (GWT, {"level": 3}),
    "GWT, level 5": (GWT, {"level": 5, "exclude": ["v_proj"]}),
    "GWT over Adam-mini": (GWT, {"level": 2, "base": "adam_mini", "head_dim": 4}),
    "GWT, level 4, over Adam-mini": (GWT, {"level": 4, "base": "adam_mini", "limiter": None, "head_dim": 4}),
}
STEPS = 3


class Ranks:
    """Threads in the place of ranks, and the sums over them."""

    def __init__(self, count: int) -> None:
        self._barrier, self._parts = threading.Barrier(count), [torch.empty(0)] * count

    def begin_sum(self, rank: int, slots: torch.Tensor):
        """As `Seams.begin_sum`, of one table."""
        self._parts[rank] = slots.clone()
        self._barrier.wait()
        total = sum(self._parts)
        self._barrier.wait()
        return lambda: slots.copy_(total)


def spread(start: int, stop: int) -> list[Interval]:
    """The intervals in elements [start, stop) of a flat buffer, which is tensor 1; tensor 0 has no gradient."""
    intervals, position = [Interval("frozen.weight", 0, 8, 0, 0)], 0
    for name, shape in SHAPES.items():
        position += PADDING
        first, last = max(start, position), min(stop, position + numel_of(shape))
        if first < last:
            intervals.append(Interval(name, first - position, last - first, 1, first - start))
        position += numel_of(shape)
    return intervals


def total() -> int:
    return sum(PADDING + numel_of(shape) for shape in SHAPES.values())


def borders(cuts: list[int]) -> RankBorders:
    by_name, position = {}, 0
    for name, shape in SHAPES.items():
        position += PADDING
        inside = [cut - position for cut in cuts if position < cut < position + numel_of(shape)]
        by_name[name] = torch.tensor(inside, dtype=torch.int64).numpy()
        position += numel_of(shape)
    return RankBorders(None, by_name)


def new_optimizer(method: str) -> ShardedOptimizer:
    rule, hyper = METHODS[method]
    named = [(name, torch.nn.Parameter(torch.empty(shape))) for name, shape in SHAPES.items()]
    return rule([*named, ("frozen.weight", torch.nn.Parameter(torch.empty(2, 4)))], **HYPER, **hyper)


def step(method: str, cuts: list[int], dtypes: tuple[torch.dtype, torch.dtype], steps: int = STEPS) -> torch.Tensor:
    """The flat parameters after some steps on ranks between whose parts of the buffer the cuts lie, in fp64.

    dtypes: of parameters and gradients.
    """
    edges = [0, *cuts, total()]
    ranks = Ranks(len(edges) - 1)
    return torch.cat(on_threads(len(edges) - 1, lambda rank: of_rank(method, rank, edges, ranks, dtypes, steps)))


def on_threads(count: int, work: Callable[[int], Any]) -> list:
    """What work(rank) returns for each rank, each on a thread of its own."""
    results = {}

    def run(rank: int) -> None:
        torch.set_grad_enabled(False)
        results[rank] = work(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(count)]


def of_rank(method, rank, edges, ranks, dtypes, steps) -> torch.Tensor:
    optimizer, (start, stop) = new_optimizer(method), edges[rank : rank + 2]
    layout = Layout(tuple(spread(start, stop)), (borders(edges[1:-1]),))
    flat = beginning()[start:stop].to(dtypes[0], copy=True)
    tensors, names = [torch.zeros(8, dtype=dtypes[0]), flat], ["frozen.weight", None]
    indexes = {}
    for structure, blocks in optimizer.structures.items():
        index = indexes[structure] = BlockIndex(layout, blocks, names, tensors)
        for make in (index.new_slots, index.new_places):  # memory that a function must set
            setattr(index, make.__name__, lambda *width, make=make: make(*width).fill_(torch.nan))
        if index.num_slots:
            index.seams.begin_sum = lambda slots, n=index.num_slots: ranks.begin_sum(rank, slots[:n])
    wide = torch.promote_types(dtypes[0], torch.float32)
    state = {"step": torch.zeros(())}
    for key, (structure, _, _) in optimizer.states.items():
        kept = (optimizer.kept[key].dtype or wide) if wide == torch.float32 else wide
        length = len(flat) if structure is None else indexes[structure].num_blocks[1]
        state[key] = torch.zeros(length, dtype=kept)
    for time in range(steps):
        gradient = gradients(time)[start:stop].to(dtypes[1])
        call = OptimizerCall({1: flat}, {1: gradient}, {1: state}, {1: optimizer.param_groups[0]}, indexes)
        optimizer.update(call)
    assert not tensors[0].any()
    return flat.double()


@functools.cache
def beginning() -> torch.Tensor:
    return torch.randn(total(), generator=torch.Generator().manual_seed(0)).bfloat16().double() / 32


def gradients(time: int) -> torch.Tensor:
    """Exact in bf16; after the first they are larger, so that the limiter acts, and acts on what it left."""
    noise = torch.randn(total(), generator=torch.Generator().manual_seed(1 + time)).bfloat16().double()
    return noise * 2.0 ** (4 * (time > 0))


@functools.cache
def expected(method: str, steps: int = STEPS) -> torch.Tensor:
    """By plain PyTorch on one rank, which alone covers fp64."""
    return step(method, [], (torch.float64, torch.float64), steps)


CUTS = {"one rank": [], "three ranks": [51, 1_000], "four ranks, one with nothing": [2, 333, 120_001]}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("method", METHODS)
def test_cpp_makes_the_same_step_as_plain_in_fp64(method, cuts, monkeypatch):
    """Measured: 1e-7 of the distance moved; with m in bf16 2e-3, which plain's own in fp32 shows as well."""
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "cpp")
    result = step(method, CUTS[cuts], (torch.float32, torch.float32))
    moved = (expected(method) - beginning()).norm()
    assert (result - expected(method)).norm() / moved < (5e-3 if "bf16" in method else 1e-6)


@pytest.mark.parametrize(
    "of_parameter, of_gradient", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("method", ["AdamMini", "AdamMini, bf16 state", "AdamW", "GWT", "GWT over Adam-mini"])
def test_cpp_rounds_once_in_bf16(method, of_parameter, of_gradient, monkeypatch):
    """A parameter in bf16 is at most half a unit from the step in fp64. Plain rounds up to three times."""
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "cpp")
    dtypes = getattr(torch, of_parameter), getattr(torch, of_gradient)
    result, exact = step(method, [51, 1_000], dtypes, steps=1), expected(method, steps=1)
    if dtypes[0] == torch.bfloat16:
        half_a_unit = 2 ** exact.abs().log2().ceil() * 2**-9
        assert ((result - exact).abs() <= half_a_unit + 1e-8).all()  # 1e-8: the step in fp32, 1e-6 of its size
        assert (result - beginning()).norm() > 0.9 * (exact - beginning()).norm()
    else:
        assert (result - exact).norm() / (exact - beginning()).norm() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_cpp_gives_the_same_bits_on_any_number_of_threads(method, monkeypatch):
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "cpp")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(method, [], (torch.float32, torch.float32)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], beginning())


@pytest.mark.parametrize("cuts", ["three ranks", "four ranks, one with nothing"])
@pytest.mark.parametrize("method", METHODS)
def test_placement_never_changes_the_result(method, cuts, monkeypatch):
    """Measured: 1e-7 of the distance moved where a block is cut, and no bit where no sum crosses ranks."""
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "cpp")
    whole, cut = (step(method, c, (torch.float32, torch.float32)) for c in ([], CUTS[cuts]))
    if method == "AdamW":
        assert torch.equal(whole, cut)
    assert (whole - cut).norm() / (whole - beginning()).norm() < (5e-3 if "bf16" in method else 1e-6)


def update_norms(kernels: str) -> torch.Tensor:
    """Those of each of GWT's matrices that it would save after each of some steps, [steps, matrices]."""
    named = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items() if len(shape) > 1}
    norms, generator = [], torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_MEMOPT_KERNELS", kernels)
        optimizer = GWT(named.items(), **HYPER)
        for time in range(4):
            for p, factor in zip(named.values(), (0.1, 16, 0.5, 4, 1), strict=True):
                p.grad = torch.randn(p.shape, generator=generator) * factor**time
            optimizer.step()
            norms += [part.values.clone() for part in optimizer.named_state() if part.key == "update_norm"]
    return torch.cat(norms).view(4, -1)


def check_update_norms(kernels: str) -> None:
    """Measured: 1e-7 of each. Two of the matrices are at their limit from the second step on."""
    norms = update_norms(kernels)
    torch.testing.assert_close(norms, update_norms("plain"), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms[1:, 1::2], norms[:-1, 1::2] * 1.01, rtol=1e-6, atol=0)
    assert (norms[1:, ::2] < 0.99).all()


def test_cpp_saves_the_update_norms_of_plain():
    check_update_norms("cpp")


@pytest.fixture
def afresh():
    """As in a new process: nothing is loaded and nothing was said."""
    caches = back_ends._load, back_ends._say_once, build.library
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_plain_steps_and_says_so_once(afresh, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("DS_MEMOPT_KERNELS", raising=False)
    dtypes = torch.float32, torch.float32
    result = step("AdamMini", [], dtypes)
    said = [record.message for record in caplog.records if "plain PyTorch" in record.message]
    assert len(said) == 1 and "no C++ compiler '/nonexistent/c++'" in said[0] and "apt-get install g++" in said[0]
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "plain")
    assert torch.equal(result, step("AdamMini", [], dtypes))
    assert "/nonexistent/c++" in back_ends.status()["cpp"]
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "cpp")
    with pytest.raises(RuntimeError, match="DS_MEMOPT_KERNELS=cpp cannot run here: no C\\+\\+ compiler"):
        back_ends.back_end_for(torch.device("cpu"))


def test_a_compiler_that_fails_is_named_with_its_message(afresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "c++ -fno-such-option")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "no-such-option" in back_ends.status()["cpp"]


def test_several_ranks_build_at_once_and_a_changed_source_is_built_anew(monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "FOLDER", sources)
    for answer in (1, 2):
        (sources / "answer.cpp").write_text(f'extern "C" int answer() {{ return {answer}; }}')
        with concurrent.futures.ThreadPoolExecutor(3) as ranks:
            libraries = list(ranks.map(lambda _: build.library.__wrapped__(), range(3)))
        assert [library.answer() for library in libraries] == [answer] * 3
        assert len(list((tmp_path / "ds_memopt").iterdir())) == answer, "nothing is left beside the libraries"


def test_columns_go_to_plain_and_that_is_said_once(afresh, monkeypatch, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setenv("DS_MEMOPT_KERNELS", "cpp")
    caplog.set_level(logging.INFO, "ds_memopt")
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=4))
    optimizer = AdamMini.from_model(model, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    said = [record.message for record in caplog.records if "plain PyTorch" in record.message]
    lack = "blocks of columns, as weights have that are stored [in, out]"
    assert said == [f"Some steps are made by plain PyTorch, which is slower: fused ones lack {lack}."]


def test_another_word_is_refused_when_the_optimizer_is_built(monkeypatch):
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "foo")
    with pytest.raises(ValueError, match="DS_MEMOPT_KERNELS=foo is out of range: it must be cpp, triton or plain"):
        new_optimizer("AdamMini")


def test_a_back_end_of_another_device_is_refused(monkeypatch):
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="DS_MEMOPT_KERNELS=triton is for tensors on cuda, but these are on cpu"):
        back_ends.back_end_for(torch.device("cpu"))
