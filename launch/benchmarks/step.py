"""Time of one optimizer step, of ours and of others on the same model, interleaved in one run.

    python launch/benchmarks/step.py --threads 2                                  # CPU
    python launch/benchmarks/step.py --threads 2 --layers 16 --vocab_size 4096    # as few dense parameters as a 7B has
    python launch/benchmarks/step.py --device cuda                                # GPU

Prints the median of each optimizer's step in ms, and of its CPU time, with their ratios to the faster of torch's fused
AdamW and, on a CPU, DeepSpeedCPUAdam. On a busy machine look at the CPU time, with --threads 1: threads that wait for
each other spend it, too. Ours stand there twice: by plain PyTorch and by the back end for the device; and again on the
same model in bf16, without fp32 masters and with states in fewer bits, with the ratio to their own step in fp32.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_memopt.kernels.back_ends import BACK_ENDS, VARIABLE, status
from ds_memopt.optimizers import GWT, AdamMini
from ds_memopt.optimizers.adamw import AdamW

FUSED = "AdamW, torch fused"
DEEPSPEED = "AdamW, DeepSpeedCPUAdam"
HYPER = {"lr": 1e-6, "weight_decay": 0.01}
OURS = {
    "AdamMini": (AdamMini, {}),
    "AdamW": (AdamW, {}),
    "GWT, no limiter": (GWT, {"limiter": None}),
    "GWT": (GWT, {}),
    "GWT over adam_mini": (GWT, {"base": "adam_mini"}),
}
STORAGES = [
    {"state_dtype": states, "masters": masters}
    for states in ("fp32", "bf16", "int8")
    for masters in ("remainder16", "remainder8")
]
"""Of bf16 weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument(
        "--kept_in_bf16", nargs="*", default=["AdamMini", "AdamW"], choices=OURS, help="ours on bf16 weights, too"
    )
    parser.add_argument("--without_plain", action="store_true", help="leave out ours by plain PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    config = LlamaConfig(
        hidden_size=arguments.hidden_size, intermediate_size=arguments.hidden_size * 43 // 16,
        vocab_size=arguments.vocab_size, num_hidden_layers=arguments.layers, num_attention_heads=8,
    )  # fmt: skip
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    steps = _others(model, config, arguments.device)
    for name, (rule, options) in OURS.items():  # a rotating block would freeze the model under the others
        for word in ("plain", _back_end(arguments.device)):
            if word and not (word == "plain" and arguments.without_plain):
                steps[f"{name}, {word}"] = _with_kernels(word, rule.from_model(model, **HYPER, **options).step)

    in_bf16 = copy.deepcopy(model).bfloat16()
    for parameter, master in zip(in_bf16.parameters(), model.parameters(), strict=True):
        parameter.grad = master.grad.bfloat16()
    own: dict[str, str] = {}
    for name, storage in itertools.product(arguments.kept_in_bf16, STORAGES):
        (rule, options), word = OURS[name], _back_end(arguments.device)
        if word:
            packed = f"{name}, {word}, bf16, {storage['state_dtype']}, {storage['masters']}"
            steps[packed] = _with_kernels(word, rule.from_model(in_bf16, **HYPER, **options, **storage).step)
            own[packed] = f"{name}, {word}"

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(arguments.steps + 2):
        for name, step in steps.items():
            _synchronize(arguments.device)
            start, cpu = time.perf_counter(), time.process_time()
            step()
            _synchronize(arguments.device)
            if number >= 2:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters in fp32 on {device}, torch {torch.__version__}, median of {arguments.steps} steps"
    )
    medians = {name: [statistics.median(of) for of in zip(*measured, strict=True)] for name, measured in times.items()}
    fastest = [min(medians[name][column] for name in (FUSED, DEEPSPEED) if name in medians) for column in (0, 1)]
    for name, (wall, cpu) in medians.items():
        print(
            f"{name:44} {1e3 * wall:8.1f} ms {wall / fastest[0]:6.2f} x   "
            f"CPU {1e3 * cpu:8.1f} ms {cpu / fastest[1]:6.2f} x"
            + (f"   of fp32 {_ratio(times[name], times[own[name]]):6.2f} x" if name in own else "")
        )


def _ratio(times: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """The median of the ratios of each round, by wall-clock time."""
    return statistics.median(time / other for (time, _), (other, _) in zip(times, others, strict=True))


def _others(model: LlamaForCausalLM, config: LlamaConfig, device: str) -> dict[str, Callable[[], object]]:
    """The steps of optimizers that are not ours, as far as their packages are installed."""
    parameters = list(model.parameters())
    steps = {
        "AdamW, torch foreach": torch.optim.AdamW(parameters, **HYPER, foreach=True).step,
        FUSED: torch.optim.AdamW(parameters, **HYPER, fused=True).step,
    }
    if device == "cpu":
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        except ImportError as error:
            print(f"{DEEPSPEED} is left out: {error}")
        else:
            steps[DEEPSPEED] = DeepSpeedCPUAdam(parameters, **HYPER).step
            # It has no copy of its own any more: DeepSpeed copies what it has updated.
            stepped = DeepSpeedCPUAdam(parameters, **HYPER).step
            in_bf16 = [parameter.detach().bfloat16() for parameter in parameters]
            steps[f"{DEEPSPEED}, and a copy to bf16"] = lambda: (stepped(), torch._foreach_copy_(in_bf16, parameters))
    try:
        from adam_mini import Adam_mini
    except ImportError as error:
        print(f"the official Adam-mini is left out: {error}")
    else:
        sizes = {"dim": config.hidden_size, "n_heads": config.num_attention_heads}
        official = Adam_mini(model.named_parameters(), **HYPER, **sizes, verbose=False)
        steps["Adam-mini, official"] = official.step
    return steps


def _back_end(device: str) -> str | None:
    """The back end for the device, if it can run here."""
    name = next(name for name, offer in BACK_ENDS.items() if offer.device == device)
    if reason := status()[name]:
        print(f"{name} is left out: {reason}")
        return None
    return name


def _with_kernels(word: str, step: Callable[[], object]) -> Callable[[], None]:
    def chosen() -> None:
        os.environ[VARIABLE] = word
        step()

    return chosen


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
