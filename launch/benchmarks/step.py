"""Time of one optimizer step against torch's foreach AdamW on the same model, interleaved in one run.

    python launch/benchmarks/step.py --threads 2            # CPU
    python launch/benchmarks/step.py --device cuda          # GPU

Prints the median of each optimizer's step in ms and its ratio to AdamW's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_memopt.optimizers import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    config = LlamaConfig(
        hidden_size=arguments.hidden_size, intermediate_size=arguments.hidden_size * 43 // 16, vocab_size=32000,
        num_hidden_layers=arguments.layers, num_attention_heads=8,
    )  # fmt: skip
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = {
        "AdamW, foreach": torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True),
        "AdamW, fused": torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
    }
    for name in ("AdamMini", "GWT"):  # a rotating block would freeze the model under the others
        optimizers[name] = METHODS[name].from_model(model, lr=1e-6, weight_decay=0.01)

    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for step in range(arguments.steps + 2):
        for name, optimizer in optimizers.items():
            _synchronize(arguments.device)
            start = time.perf_counter()
            optimizer.step()
            _synchronize(arguments.device)
            if step >= 2:
                times[name].append(time.perf_counter() - start)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters in fp32 on {device}, torch {torch.__version__}, median of {arguments.steps} steps"
    )
    baseline = statistics.median(times["AdamW, foreach"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:16} {1e3 * median:8.1f} ms  {median / baseline:5.2f} x foreach AdamW")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
