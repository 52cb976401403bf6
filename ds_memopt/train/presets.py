"""Model presets with the recipe that each is trained by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

TINY_VOCABULARY = 256  # bytes; byte 0 separates documents


@dataclass(frozen=True)
class Recipe:
    """How a model is trained unless the command says otherwise.

    global_batch: sequences of seq_length tokens per optimizer step, over all ranks. warmup_fraction: of the steps.
    """

    seq_length: int
    global_batch: int
    micro_batch: int
    steps: int
    lr: float
    warmup_fraction: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1


def _llama(hidden: int, layers: int, heads: int, mlp: int, vocabulary: int = 32000, **other: Any) -> Mapping[str, Any]:
    return dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=other.pop("kv_heads", heads),
        intermediate_size=mlp,
        vocab_size=vocabulary,
        rms_norm_eps=1e-5,
        **other,
    )


# The six sizes from 39m to 1b are those of the Adam-mini paper (arXiv 2406.16793, table 4) with its recipe: Llama-2
# architecture and tokenizer, 256 sequences of 512 tokens a step, warm-up over 1 % of the steps, linear decay to 0.
_SCALING = Recipe(seq_length=512, global_batch=256, micro_batch=16, steps=7_800, lr=6e-4)
# 7b, 13b and 8b follow the paper's longer models: 10k steps of 8 sequences of 2048 tokens at lr 1e-4.
_LARGE = Recipe(seq_length=2048, global_batch=8, micro_batch=1, steps=10_000, lr=1e-4)

PRESETS: dict[str, tuple[Mapping[str, Any], Recipe]] = {
    "tiny": (
        _llama(256, 6, 8, 768, TINY_VOCABULARY, kv_heads=4),
        Recipe(seq_length=128, global_batch=4, micro_batch=4, steps=500, lr=2.5e-4, warmup_fraction=0.05),
    ),
    "llama-39m": (_llama(384, 8, 6, 1024), _SCALING),
    "llama-67m": (_llama(512, 10, 8, 1536), replace(_SCALING, steps=13_400)),
    "llama-102m": (_llama(640, 12, 10, 1792), replace(_SCALING, steps=20_400)),
    "llama-162m": (_llama(768, 16, 12, 2048), replace(_SCALING, steps=32_400)),
    "llama-271m": (_llama(1024, 16, 16, 2816), replace(_SCALING, steps=54_200, micro_batch=8)),
    "llama-1b": (_llama(2048, 18, 16, 5632), replace(_SCALING, steps=200_000, micro_batch=4, lr=2e-4)),
    "llama2-7b": (_llama(4096, 32, 32, 11008), _LARGE),
    "llama2-13b": (_llama(5120, 40, 40, 13824), _LARGE),
    "llama3-8b": (
        _llama(4096, 32, 32, 14336, 128256, kv_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        _LARGE,
    ),
}
_FOLDER_RECIPE = Recipe(seq_length=1024, global_batch=8, micro_batch=1, steps=1_000, lr=1e-4)
_FINETUNE_RECIPE = Recipe(
    seq_length=1024, global_batch=16, micro_batch=8, steps=500, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0
)
MODEL = "model"  # in a run's output folder: the trained model as a Hugging Face folder


def find_model(name: str) -> tuple[transformers.PretrainedConfig, Recipe]:
    """The configuration and recipe of a preset, or of a local folder that holds a Hugging Face config.json.

    ValueError if `name` is neither.
    """
    if name in PRESETS:
        settings, recipe = PRESETS[name]
        return transformers.LlamaConfig(**settings, max_position_embeddings=recipe.seq_length), recipe
    if (Path(name) / "config.json").is_file():
        return transformers.AutoConfig.from_pretrained(name), _FOLDER_RECIPE
    raise ValueError(
        f"model {name!r} is neither a preset nor a local folder with a config.json; presets: {', '.join(PRESETS)}"
    )


def trained_folder(name: str) -> Path:
    """The Hugging Face folder that holds weights: `name`, or what the run with the output folder `name` left.

    ValueError if there is none.
    """
    for folder in (Path(name), Path(name) / MODEL):
        if (folder / "config.json").is_file() and has_weights(folder):
            return folder
    if (Path(name) / "checkpoints").is_dir():
        raise ValueError(
            f"--model {name} is the folder of a run that has not ended: it has checkpoints but no {MODEL}/. Give its "
            "command again with --resume; the run ends by writing the model"
        )
    if name in PRESETS:
        raise ValueError(f"--model {name} is a preset, with random weights: pre-train it first, then name its folder")
    if not Path(name).is_dir():
        lacks = "is no folder"
    else:
        lacks = "has no weights (*.safetensors)" if (Path(name) / "config.json").is_file() else "has no config.json"
    raise ValueError(f"--model {name} {lacks}: give the output folder of a run, or a Hugging Face folder with both")


def find_trained(name: str) -> tuple[transformers.PretrainedConfig, Recipe]:
    """The configuration of a Hugging Face folder, and the recipe to fine-tune it by."""
    config = transformers.AutoConfig.from_pretrained(name)
    longest = getattr(config, "max_position_embeddings", None) or _FINETUNE_RECIPE.seq_length
    return config, replace(_FINETUNE_RECIPE, seq_length=min(_FINETUNE_RECIPE.seq_length, longest))


def has_weights(folder: str | Path) -> bool:
    return any(Path(folder).glob("*.safetensors")) or any(Path(folder).glob("pytorch_model*.bin"))


def build_model(
    name: str, config: transformers.PretrainedConfig, seed: int, device: torch.device, partitioned: bool
) -> torch.nn.Module:
    """The model in fp32: pretrained weights if the folder `name` holds some, else random weights that depend on `seed`.

    It is in CPU memory, so that a GPU never holds it in fp32 for a run in bf16. device: draws the random weights.
    partitioned: under ZeRO-3, with a `transformers.integrations.HfDeepSpeedConfig` alive, transformers builds the model
    inside `deepspeed.zero.Init`, so that no rank ever holds all of it. The weights are the same either way on CPU.
    ValueError if the folder lacks some of the model's weights, or if transformers does not fill all of new ones.
    """
    if has_weights(name):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"the files in {name} lack {len(missing)} weights of {type(model).__name__}, such as {missing[0]}: "
                "they would be random; give the folder that its config.json was saved with"
            )
        return model
    if partitioned:
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Without no_init_weights the constructors would draw from the generator too, and the weights differ from ZeRO-3's.
    with no_init_weights(), _EmptyIsNaN():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(seed)
    with _DrawOn(device):
        model.init_weights()
    for parameter, p in model.named_parameters():
        if p.isnan().any():
            raise ValueError(
                f"{type(model).__name__} gives {parameter} no random value of its own: name a folder with weights"
            )
    return model


def build_without_weights(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """The model with its parameters on the meta device, and its buffers in CPU memory."""
    with no_init_weights(), init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


class _EmptyIsNaN(TorchDispatchMode):
    """New tensors of no value hold NaNs, so that what nothing fills is found."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **kwargs or {})
        if operator.name().startswith(("aten::empty", "aten::new_empty")) and result.is_floating_point():
            result.fill_(math.nan)
        return result


class _DrawOn(TorchDispatchMode):
    """What fills a tensor in place with random numbers takes them from a device's generator, wherever the tensor is."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        in_place = operator.name().partition(".")[0].endswith("_")
        if not in_place or torch.Tag.nondeterministic_seeded not in operator.tags or args[0].device == self.device:
            return operator(*args, **kwargs or {})
        filled, *others = args
        return filled.copy_(operator(torch.empty_like(filled, device=self.device), *others, **kwargs or {}))


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of the whole model, also when ZeRO-3 has partitioned them; tied ones count once."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def parameter_groups(model: torch.nn.Module, weight_decay: float | None) -> list[dict[str, Any]]:
    """Two groups: weights with 2 or more dimensions decay (None: the optimizer's default), norms and biases do not."""
    decay, no_decay = [], []
    for p in model.parameters():
        (decay if len(getattr(p, "ds_shape", p.shape)) >= 2 else no_decay).append(p)
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
    return [group for group in groups if group["params"]]


def split_batch(recipe: Recipe, micro_batch: int | None, accumulation: int | None, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation) that make up the recipe's global batch, where they are not given.

    A micro-batch that is not given is at most the recipe's. If the ranks or the given size do not divide the global
    batch, it is rounded up.
    """
    share = math.ceil(recipe.global_batch / world_size)
    if micro_batch is None:
        if accumulation is not None:
            micro_batch = math.ceil(share / accumulation)
        else:
            micro_batch = max(size for size in range(1, min(recipe.micro_batch, share) + 1) if share % size == 0)
    return micro_batch, accumulation or math.ceil(share / micro_batch)
