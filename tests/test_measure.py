"""The meters against figures worked out by hand."""

from __future__ import annotations

import contextlib
import time

import deepspeed.comm
import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks, run_script
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from ds_memopt.measure import (
    PHASES,
    CommunicationMeter,
    StepTimer,
    Traffic,
    sent_per_payload_byte,
    state_bytes,
    state_bytes_per_parameter,
    step_timer,
)

N, WORLD = 3, (0, 1, 2)  # with 2 ranks, 2(N-1)/N = 1: a wire figure could be confused with a payload
ALL_GATHER_BEFORE_START = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # as DeepSpeed captures it


def _single(modern: str, old: str):
    return getattr(dist, modern, None) or getattr(dist, old)


def _coalesced(*tensors):
    with distributed_c10d._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _coalesced_gathers(*tensors):  # what DeepSpeed's all_gather_coalesced does
    with distributed_c10d._coalescing_manager():
        for tensor in tensors:
            _single("all_gather_single", "all_gather_into_tensor")(torch.empty(N * len(tensor)), tensor)


def _ring(tensor):
    right, left = (dist.get_rank() + 1) % N, (dist.get_rank() - 1) % N
    incoming = torch.empty_like(tensor)
    work = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, right), dist.P2POp(dist.irecv, incoming, left)])
    for request in work:
        request.wait()


def _communicate() -> dict:
    """Every route on 3 ranks: {name: {(collective, ranks of the group): Traffic}} as this rank's meter saw it."""
    f32, f64, rank = torch.ones(12), torch.ones(12, dtype=torch.float64), dist.get_rank()
    pair = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (N,))
    dtensor = distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])
    routes = {
        "all_reduce": lambda: dist.all_reduce(f32),
        "all_reduce fp64": lambda: dist.all_reduce(f64, async_op=True).wait(),
        "all_reduce keyword": lambda: dist.all_reduce(tensor=f32, op=dist.ReduceOp.MAX, group=None),
        "all_reduce pair": lambda: dist.all_reduce(f32, group=pair) if rank < 2 else None,
        "all_reduce coalesced": lambda: _coalesced(torch.ones(5), torch.ones(7)),
        "all_gather": lambda: dist.all_gather([torch.empty(12) for _ in range(N)], f32),
        "all_gather single": lambda: ALL_GATHER_BEFORE_START(torch.empty(36), f32),
        "reduce_scatter": lambda: dist.reduce_scatter(torch.empty(4), [torch.ones(4) for _ in range(N)]),
        "reduce_scatter single": lambda: _single("reduce_scatter_single", "reduce_scatter_tensor")(torch.empty(4), f32),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(12), f32),
        "broadcast": lambda: dist.broadcast(f32, 0),
        "reduce": lambda: dist.reduce(f32, 1),
        "gather": lambda: dist.gather(f32, [torch.empty(12) for _ in range(N)] if rank == 0 else None),
        "scatter": lambda: dist.scatter(torch.empty(4), [torch.ones(4) for _ in range(N)] if rank == 0 else None),
        "ring": lambda: _ring(f32),
        "barrier": lambda: dist.barrier(),
        "deepspeed all_reduce": lambda: deepspeed.comm.all_reduce(f32),
        "deepspeed reduce": lambda: deepspeed.comm.reduce(f32, 0),
        "deepspeed reduce_scatter": lambda: deepspeed.comm.reduce_scatter_fn(torch.empty(4), f32),
        "deepspeed allgather": lambda: deepspeed.comm.allgather_fn(torch.empty(36), f32),
        "all_gather coalesced": lambda: _coalesced_gathers(torch.ones(2), torch.ones(1)),
        "functional gather": lambda: dtensor.redistribute(placements=[Replicate()]).to_local().sum().item(),
    }
    seen = {}
    for name, route in routes.items():
        with CommunicationMeter() as meter:
            route()
        seen[name] = meter.by_collective_and_group()
    with CommunicationMeter() as outer, CommunicationMeter() as inner:
        dist.all_reduce(f32)
    seen["two meters"] = [outer.bytes_sent(), inner.bytes_sent()]
    dist.all_reduce(f32)  # nobody listens
    seen["after stop"] = [outer.calls(), inner.calls()]
    seen["groups"] = _three_groups(f32, pair)
    seen["late"] = _wait_for_a_late_rank(f32)
    seen["fsdp2"] = _fsdp2_step()
    return seen


def _three_groups(tensor, pair) -> dict:
    other_pair = dist.new_group([0, 2])
    with CommunicationMeter() as meter:
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        for ranks, group in ((0, 1), pair), ((0, 2), other_pair):
            if dist.get_rank() in ranks:
                dist.all_reduce(tensor, group=group)
    return meter.by_group()


def _wait_for_a_late_rank(tensor) -> list[dict]:
    """Where the time goes if rank 0 comes late to two all-reduces in backward: one waits at once, one later."""
    timer = StepTimer(torch.device("cpu"), N)
    dist.barrier()
    timer.start()
    with CommunicationMeter(timer):
        with timer.phase("backward"):
            for later in (False, True):
                if dist.get_rank() == 0:
                    time.sleep(0.2)
                work = dist.all_reduce(tensor, async_op=later)
            time.sleep(0.1)
        with timer.phase("optimizer"):
            if dist.get_rank():
                work.wait()
            time.sleep(0.1)
    timer.count(1)
    return timer.read()


def _fsdp2_step() -> dict:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 9, bias=False))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with CommunicationMeter() as meter:
        model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return {
        "traffic": meter.by_collective(),
        "state": state_bytes(optimizer),
        "per_parameter": state_bytes_per_parameter(optimizer, 36 + 54),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(_communicate, N)


# 12 floats are 48 bytes. Per rank: payload, and what goes on the wire of a ring of 3.
EXPECTED = {
    "all_reduce": {("all_reduce", WORLD): Traffic(1, 48, 64)},  # 2 * 2/3 * 48
    "all_reduce fp64": {("all_reduce", WORLD): Traffic(1, 96, 128)},
    "all_reduce keyword": {("all_reduce", WORLD): Traffic(1, 48, 64)},
    "all_reduce coalesced": {("all_reduce", WORLD): Traffic(1, 48, 64)},
    "all_gather": {("all_gather", WORLD): Traffic(1, 144, 96)},  # passes on two blocks of 48
    "all_gather single": {("all_gather", WORLD): Traffic(1, 144, 96)},
    "reduce_scatter": {("reduce_scatter", WORLD): Traffic(1, 48, 32)},  # passes on two blocks of 16
    "reduce_scatter single": {("reduce_scatter", WORLD): Traffic(1, 48, 32)},
    "all_to_all": {("all_to_all", WORLD): Traffic(1, 48, 32)},
    "broadcast": {("broadcast", WORLD): Traffic(1, 48, 32)},  # 2 * 48 in all, shared by 3
    "reduce": {("reduce", WORLD): Traffic(1, 48, 32)},
    "gather": {("gather", WORLD): Traffic(1, 48, 32)},
    "scatter": {("scatter", WORLD): Traffic(1, 16, 11)},  # 2 * 16 in all, shared by 3
    "ring": {("send", WORLD): Traffic(1, 48, 48), ("recv", WORLD): Traffic(1, 48, 0)},
    "barrier": {("barrier", WORLD): Traffic(1, 0, 0)},
    "deepspeed all_reduce": {("all_reduce", WORLD): Traffic(1, 48, 64)},
    "deepspeed reduce": {("reduce", WORLD): Traffic(1, 48, 32)},
    "deepspeed reduce_scatter": {("reduce_scatter", WORLD): Traffic(1, 48, 32)},
    "deepspeed allgather": {("all_gather", WORLD): Traffic(1, 144, 96)},
    "all_gather coalesced": {("all_gather", WORLD): Traffic(1, 36, 24)},
    "functional gather": {("all_gather", WORLD): Traffic(1, 48, 32)},
}


@pytest.mark.parametrize("route", EXPECTED)
def test_bytes_of_each_route(ranks, route):
    for seen in ranks:
        assert seen[route] == EXPECTED[route]


def test_a_smaller_group_counts_with_its_own_size(ranks):
    assert [seen["all_reduce pair"] for seen in ranks] == [
        {("all_reduce", (0, 1)): Traffic(1, 48, 48)},  # 2 * 1/2 * 48
        {("all_reduce", (0, 1)): Traffic(1, 48, 48)},
        {},
    ]


def test_bytes_of_each_process_group(ranks):
    """48 bytes: an all-reduce and a broadcast over all (64 + 32 sent), an all-reduce of each of two pairs."""
    for rank, seen in enumerate(ranks):
        pairs = {pair: Traffic(1, 48, 48) for pair in ((0, 1), (0, 2)) if rank in pair}
        assert seen["groups"] == {WORLD: Traffic(2, 96, 96)} | pairs


def test_waiting_counts_as_communication_in_the_phase_that_waits(ranks):
    """Rank 0 sleeps twice 0.2 s. The others wait for it 0.2 s at once, and the rest of its second sleep at wait()."""
    late, *punctual = [seen["late"] for seen in ranks]
    assert late["backward_ms"] == pytest.approx(500, abs=90) and late["communication_ms"] < 90
    for seen in punctual:
        assert seen["communication_ms"] == pytest.approx(200 + 100, abs=90)
        assert seen["backward_ms"] == pytest.approx(100, abs=90)
    for seen in (late, *punctual):
        assert seen["optimizer_ms"] == pytest.approx(100, abs=90)
        split = sum(seen[f"{name}_ms"] for name in (*PHASES, "other"))
        assert split == pytest.approx(seen["step_ms"])


def test_meters_nest_and_stop(ranks):
    for seen in ranks:
        assert seen["two meters"] == [64, 64]
        assert seen["after stop"] == [1, 1]


def test_fsdp2_step(ranks):
    """Weights of 36 and 54 floats: each gathered for forward; the last stays until its backward, the first is gathered
    again; both gradients are reduce-scattered. Rows 6 and 9 divide by 3, so there is no padding."""
    for seen in ranks:
        traffic = seen["fsdp2"]["traffic"]
        gathers = traffic["all_gather"].calls
        assert gathers in (3, 4)  # whether the last layer is kept is FSDP2's choice
        assert traffic["all_gather"].payload_bytes == 4 * (36 + 54 + (36 if gathers == 3 else 90))
        assert traffic["reduce_scatter"] == Traffic(2, 4 * 90, 240)
        assert set(traffic) == {"all_gather", "reduce_scatter"}


def test_state_of_a_sharded_optimizer_counts_local_shards(ranks):
    for seen in ranks:
        assert seen["fsdp2"]["state"] == {"exp_avg": 120, "exp_avg_sq": 120, "step": 8}  # 30 of 90 elements, 2 tensors
        assert seen["fsdp2"]["per_parameter"] == pytest.approx(3 * 248 / 90)


def test_stop_puts_the_methods_back():
    before = dict(vars(dist.ProcessGroup))
    operator = torch.ops._c10d_functional.all_reduce
    with CommunicationMeter():
        assert vars(dist.ProcessGroup)["allreduce"] is not before["allreduce"]
    assert dict(vars(dist.ProcessGroup)) == before
    assert torch.ops._c10d_functional.all_reduce is operator


def test_meter_is_started_once():
    meter = CommunicationMeter()
    with meter, pytest.raises(RuntimeError, match="running already; call stop"):
        meter.start()
    with pytest.raises(RuntimeError, match="not running; call start"):
        meter.stop()


@pytest.mark.parametrize(
    ("collective", "size", "factor"),
    [("all_reduce", 4, 1.5), ("all_gather", 4, 0.75), ("send", 4, 1), ("recv", 4, 0), ("all_reduce", 1, 0)],
)
def test_wire_convention(collective, size, factor):
    assert sent_per_payload_byte(collective, size) == factor


def test_state_bytes_by_kind():
    weight = torch.nn.Parameter(torch.ones(3, 5))
    weight.grad = torch.ones(3, 5)
    optimizer = torch.optim.AdamW([weight])
    assert state_bytes(optimizer) == {}
    optimizer.step()
    assert state_bytes(optimizer) == {"step": 4, "exp_avg": 60, "exp_avg_sq": 60}
    assert state_bytes_per_parameter(optimizer, 15) == pytest.approx(124 / 15)

    optimizer.state[weight] = {
        "half": torch.ones(10, dtype=torch.bfloat16),
        "nested": {"a": [torch.ones(2), torch.ones(3)], "count": 7},
        "expanded": torch.ones(1).expand(1000),
    }
    wrapper = type("Wrapper", (), {"optimizer": optimizer})()
    assert state_bytes(wrapper) == {"half": 20, "nested": 20, "expanded": 4}


def test_state_bytes_refuses_what_has_no_state():
    with pytest.raises(TypeError, match="expected an optimizer .* got dict"):
        state_bytes({})
    with pytest.raises(ValueError, match="num_parameters = 0 must be positive"):
        state_bytes_per_parameter(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 0)


class Clock:
    """In the place of the module time: sleeping takes as long as is said, and nothing else takes time."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_timer, "time", clock)
    return clock


def test_step_timer(clock):
    timer = StepTimer(torch.device("cpu"), world_size=2)
    with pytest.raises(ValueError, match="no step was counted"):
        timer.read()
    clock.sleep(0.2)
    timer.start()  # the pause before does not count
    for _ in range(2):
        clock.sleep(0.05)
        timer.count(tokens=100)
    figures = timer.read()
    assert figures["step_ms"] == pytest.approx(50)
    assert figures["tokens_per_s"] == pytest.approx(2000)
    assert figures["tokens_per_s_per_gpu"] == pytest.approx(1000)


def test_step_timer_splits_a_step(clock):
    """Phases inside one another, a forward inside backward as of zeroth-order methods, and one that raises."""
    model = torch.nn.ReLU()
    model.register_forward_hook(lambda *_: clock.sleep(0.05))
    timer = StepTimer(torch.device("cpu"), world_size=1)
    timer.watch(model)
    timer.start()
    for _ in range(2):
        model(torch.ones(1))
        with timer.phase("backward"):
            clock.sleep(0.03)
            model(torch.ones(1))
            with timer.phase("communication"):
                clock.sleep(0.02)
        with contextlib.suppress(TypeError), timer.phase("optimizer"):
            clock.sleep(0.04)
            model("no tensor")
        clock.sleep(0.01)
        timer.count(1)
    figures = timer.read()
    expected = {"forward": 100, "backward": 30, "communication": 20, "optimizer": 40, "other": 10}
    assert {name: figures[f"{name}_ms"] for name in expected} == pytest.approx(expected)
    timer.start()
    clock.sleep(0.01)
    timer.count(1)
    assert "forward_ms" not in timer.read()  # nothing was told in this interval

    timer.start()
    timer.enter("forward")
    timer.enter("backward")  # of a thread that takes turns with the one in forward
    timer.leave("forward")
    clock.sleep(0.05)
    timer.leave("backward")
    timer.count(1)
    assert timer.read()["backward_ms"] == pytest.approx(50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_timer_on_a_gpu_splits_the_time_of_its_stream():
    """The host is done at once; what another stream does meanwhile belongs to no phase."""
    device, side = torch.device("cuda"), torch.cuda.Stream()
    a = torch.randn(8192, 8192, device=device)
    timer = StepTimer(device, world_size=1)
    for _ in range(2):  # the first warms up
        timer.start()
        with timer.phase("forward"):
            a @ a
        with timer.phase("backward"):
            [a @ a for _ in range(10)]
        with torch.cuda.stream(side), timer.phase("communication"):
            a @ a
        timer.count(1)
        figures = timer.read()
    assert figures["communication_ms"] == 0 and 0 < figures["forward_ms"] < figures["backward_ms"] / 4
    assert sum(figures[f"{name}_ms"] for name in (*PHASES, "other")) == pytest.approx(figures["step_ms"])


PEAK = """
import torch
from ds_memopt.measure import GIB, peak_memory_gib
before = peak_memory_gib(torch.device("cpu"))["peak_rss_gib"]
held = torch.ones(2 * GIB // 4 // 4)  # half a GiB, written
print(peak_memory_gib(torch.device("cpu"))["peak_rss_gib"] - before)
"""


def test_peak_memory_on_cpu_sees_an_allocation(tmp_path):
    """In a process of its own: the peak of this one may lie higher already."""
    (tmp_path / "peak.py").write_text(PEAK)
    done = run_script(tmp_path / "peak.py")
    assert 0.4 < float(done.stdout) < 0.7
