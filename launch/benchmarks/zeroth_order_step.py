"""What of a MeZO step is not forward passes: perturbing and updating, against the two plain forwards in the same run.

python launch/benchmarks/zeroth_order_step.py                        # tiny preset, sequences of 512
python launch/benchmarks/zeroth_order_step.py --device cuda --model llama-1b --dtype bf16
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaForCausalLM

from ds_memopt import MeZO
from ds_memopt.train.presets import find_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, _ = find_model(arguments.model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model = LlamaForCausalLM(config).to(arguments.device, dtype)
    ids = torch.randint(config.vocab_size, (arguments.batch, arguments.seq_length), device=arguments.device)
    optimizers = {
        f"{noise}{', compiled' if compiled else ''}": MeZO.from_model(model, lr=1e-9, noise=noise, compiled=compiled)
        for noise in ("gaussian", "rademacher")
        for compiled in (True, False)
    }

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    times: dict[str, list[float]] = {name: [] for name in ("two forwards", *optimizers)}
    for step in range(arguments.steps + 2):
        for name in times:
            _synchronize(arguments.device)
            start = time.perf_counter()
            if name in optimizers:
                optimizers[name].step(forward)
            else:
                forward(), forward()
            _synchronize(arguments.device)
            if step >= 2:
                times[name].append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    print(
        f"{parameters:,} parameters in {arguments.dtype}, {arguments.batch} x {arguments.seq_length} tokens on "
        f"{device}, torch {torch.__version__}, median of {arguments.steps} steps"
    )
    plain = statistics.median(times["two forwards"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:22} {1e3 * median:8.1f} ms  perturbation and update: {1 - plain / median:6.1%} of the step")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
