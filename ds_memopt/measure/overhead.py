"""What counting bytes and timing the phases of a step costs: `python -m ds_memopt.measure.overhead`.

Two runs of a step differ by more than 1 % from noise alone, so the ratio is built from three steadier figures: the time
that counting adds to one collective (a tight loop with and without the meter), the collectives of one step (counted),
and the time of that step. The step is a small FSDP2 transformer on two CPU ranks with one layer per shard group.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from ds_memopt.measure.communication import CommunicationMeter
from ds_memopt.measure.step_timer import StepTimer

RANKS = 2
CPU = torch.device("cpu")


def added_us_per_call(timed: bool, calls: int = 5_000, repeats: int = 15) -> float:
    """Microseconds that a running meter adds to one all_reduce: the median over `repeats` pairs of loops. timed: the
    meter has a timer."""
    tensor = torch.ones(1)
    alone = dist.new_subgroups(1)[0]  # nothing to wait for: the call itself is what is timed

    def loop() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(tensor, group=alone)
        return time.perf_counter() - began

    loop()
    differences = []
    for _ in range(repeats):
        without = loop()
        with CommunicationMeter(StepTimer(CPU, RANKS) if timed else None):
            differences.append(loop() - without)
    return 1e6 * statistics.median(differences) / calls


def step_ms_and_calls(steps: int = 20) -> tuple[float, float]:
    """Median time in ms of one training step, and its number of collectives."""
    layers = [torch.nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True) for _ in range(8)]
    model = torch.nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(4, 128, 256)
    times = []
    with CommunicationMeter() as meter:
        for _ in range(steps):
            began = time.perf_counter()
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times), meter.calls() / steps


def _rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    step_ms, calls = step_ms_and_calls()
    for timed, what in ((False, "counting"), (True, "counting and timing")):
        added_us = added_us_per_call(timed)
        if rank == 0:
            percent = 100 * added_us * calls / (1000 * step_ms)
            print(
                f"{what} adds {added_us:.2f} us to a collective; a step has {calls:.0f} and takes {step_ms:.0f} ms: "
                f"{percent:.3f} % of it (target: below 1 %)"
            )
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (f"{folder}/rendezvous",), nprocs=RANKS)


if __name__ == "__main__":
    main()
