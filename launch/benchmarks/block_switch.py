"""What a step of BAdam costs beside one of AdamW, in the same run: time, bytes sent, masters and state, and the switch.

deepspeed --num_gpus 2 launch/benchmarks/block_switch.py                       # ZeRO-1, 2 and 3
deepspeed --num_gpus 8 launch/benchmarks/block_switch.py --hidden_size 4096 --layers 32 --dtype bf16 --stages 2
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import ds_memopt
from ds_memopt.measure import CommunicationMeter, state_bytes
from ds_memopt.train.ranks import Ranks, start_ranks, stop_ranks

VISIT = 5  # steps between the measured switches; the table relates their cost to --switch_every steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seq_length", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--switch_every", type=int, default=100)
    parser.add_argument("--visits", type=int, default=4)
    arguments = parser.parse_args()
    ranks = start_ranks()
    ds_memopt.register()
    for name in ("DeepSpeed", "ds_memopt"):
        logging.getLogger(name).setLevel(logging.WARNING)
    device = ranks.device.type if ranks.device.type == "cpu" else torch.cuda.get_device_name()
    if ranks.is_main:
        print(f"{ranks.world_size} x {device}, {arguments.dtype}, torch {torch.__version__}; per rank and step:")
        print("stage  optimizer  step ms  sent MB  masters + state MB  switch ms  share of the visit's time")
    for stage in arguments.stages:
        rows = {method: measure(method, stage, arguments, ranks) for method in ("AdamW", "BAdam")}
        for method, (step, sent, held_bytes, switch) in rows.items() if ranks.is_main else ():
            line = f"{stage:5}  {method:9}  {1e3 * step:7.1f}  {sent / 1e6:7.2f}  {held_bytes / 1e6:18.2f}"
            if method != "AdamW":
                line += f"  {1e3 * switch:9.1f}  {switch / (arguments.switch_every * step):.2%}"
            print(line)
        if ranks.is_main:
            ratios = [b / a for a, b in zip(rows["AdamW"][:3], rows["BAdam"][:3], strict=True)]
            print("       BAdam / AdamW: time {:.2f}, sent {:.3f}, masters + state {:.3f}".format(*ratios), flush=True)
    stop_ranks()


def measure(method: str, stage: int, arguments: argparse.Namespace, ranks: Ranks) -> tuple[float, float, int, float]:
    """Median seconds and mean bytes of a step amid a visit; bytes held; seconds that a switch adds to its two steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=arguments.hidden_size, intermediate_size=arguments.hidden_size * 43 // 16,
            num_hidden_layers=arguments.layers, num_attention_heads=8, vocab_size=arguments.vocab_size, use_cache=False,
        )
    )  # fmt: skip
    # torch's AdamW, not DeepSpeed's fused one, which is to be compiled first.
    own = {"torch_adam": True} if method == "AdamW" else {"switch_every": VISIT}
    config = {
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "optimizer": {"type": method, "params": {"lr": 1e-5, **own}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    ids = torch.randint(arguments.vocab_size, (arguments.micro_batch, arguments.seq_length), device=ranks.device)
    times: dict[int, list[float]] = {place: [] for place in range(VISIT)}
    sent, held_bytes = [], 0
    for number in range(VISIT * (arguments.visits + 1)):
        place = number % VISIT  # the last step of a visit makes the switch, the first after it builds buffers
        with CommunicationMeter() as meter:
            get_accelerator().synchronize()
            start = time.perf_counter()
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            get_accelerator().synchronize()
        if number >= VISIT:  # all blocks have their buffers, ZeRO-3 its trace
            times[place].append(time.perf_counter() - start)
            if 0 < place < VISIT - 1:
                sent.append(meter.bytes_sent())
                now_held = sum(state_bytes(engine.optimizer).values()) + master_bytes(engine.optimizer)
                held_bytes = max(held_bytes, now_held)
    engine.destroy()
    step = statistics.median(seconds for place in range(1, VISIT - 1) for seconds in times[place])
    switch = statistics.median(times[VISIT - 1]) + statistics.median(times[0]) - 2 * step
    return step, statistics.mean(sent), held_bytes, switch


def master_bytes(zero) -> int:
    """Bytes of this rank's fp32 masters under ZeRO-1, 2 or 3."""
    masters = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    return sum(master.numel() * master.element_size() for master in masters)


if __name__ == "__main__":
    main()
