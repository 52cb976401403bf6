"""Reading a DeepSpeed configuration, and giving every "auto" in it a value.

`deepspeed.initialize` itself fails on some "auto" values, at initialisation or only at the first step, and drops others
silently (`bf16.enabled`, `zero_optimization.stage`). So none may reach it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hjson
import torch

from ds_memopt.optimizers import METHODS

AUTO = "auto"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Of weights, by the words of a DeepSpeed configuration."""
SHARED_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def load_config(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file, which may hold what DeepSpeed's own reader allows: comments above all.

    ValueError naming the file, and the line where the JSON is wrong.
    """
    try:
        config = _parse(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read the DeepSpeed config {path}: {error.strerror or error}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the DeepSpeed config {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the DeepSpeed config {path} holds a {type(config).__name__}; it must be a JSON object")
    return config


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as of_json:
        try:
            return hjson.loads(text, object_pairs_hook=_without_duplicates)
        except hjson.HjsonDecodeError:
            if text[of_json.pos :].lstrip().startswith(("/", "#")):
                raise  # a comment is no mistake, so what Hjson says is
            raise of_json from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object: remove one")
    return content


def choose(config: dict[str, Any], path: str, given: Any, default: Any) -> Any:
    """The value for a setting that both the config (at dotted `path`) and the command line may fix.

    The config's own value unless it is missing or "auto"; then `given`; then `default`.
    ValueError if config and command line disagree.
    """
    value = value_at(config, path)
    if value is None or value == AUTO:
        return default if given is None else given
    if given is not None and given != value:
        raise ValueError(
            f'{path} is {value} in the DeepSpeed config but {given} on the command line: give one, or put "auto" there'
        )
    return value


def override_optimizer(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The config with another optimizer type; of `lr betas eps weight_decay` stay those that it takes.

    ValueError if the block has hyper-parameters that only its own type knows.
    """
    block = config.get("optimizer", {})
    params = block.get("params", {})
    own = sorted(set(params) - set(SHARED_HYPERPARAMETERS))
    if own and block.get("type") != name:
        raise ValueError(
            f"--optimizer {name} cannot replace {block.get('type')} of the DeepSpeed config, whose hyper-parameters "
            f"{', '.join(own)} belong to it alone; use a config written for {name}"
        )
    params = params or dict.fromkeys(SHARED_HYPERPARAMETERS, AUTO)
    if name in METHODS and block.get("type") != name:
        params = METHODS[name].accepted(params)
    return {**config, "optimizer": {**block, "type": name, "params": params}}


def resolve_config(
    config: dict[str, Any],
    *,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_clipping: float,
    dtype: str,
    hidden_size: int | None = None,
    steps: int | None = None,
    warmup_steps: int | None = None,
) -> dict[str, Any]:
    """A copy of `config` in which every "auto" has a value and the batch sizes and gradient_clipping are explicit.

    micro_batch: sequences per rank and forward pass. accumulation: micro-batches per step. dtype: "fp32" or "bf16",
    for `bf16.enabled`; `fp16.enabled` becomes false. hidden_size sets ZeRO-3's buckets as transformers does. steps and
    warmup_steps are for a `scheduler` block.
    ValueError for an "auto" at a path that is not known here (the path is named), for an explicit batch size or
    gradient_clipping that differs from the arguments, and for an unknown dtype.
    """
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f'dtype {dtype!r} is unknown: choose "fp32" or "bf16"')
    batch = {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping,
    }
    values = {
        **batch,
        "optimizer.params.lr": lr,
        "optimizer.params.betas": list(betas),
        "optimizer.params.eps": eps,
        "optimizer.params.weight_decay": weight_decay,
        **_settled_by_methods(),
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": lr,
        "scheduler.params.warmup_num_steps": warmup_steps,
        "scheduler.params.total_num_steps": steps,
        "bf16.enabled": dtype == "bf16",
        "fp16.enabled": False,
        "zero_optimization.reduce_bucket_size": hidden_size and hidden_size**2,
        "zero_optimization.stage3_prefetch_bucket_size": hidden_size and int(0.9 * hidden_size**2),
        "zero_optimization.stage3_param_persistence_threshold": hidden_size and 10 * hidden_size,
    }
    resolved = copy.deepcopy(config)
    for path, holder, key in list(places(resolved)):
        if holder[key] != AUTO:
            continue
        if values.get(path) is None:
            raise ValueError(
                f'"auto" at {path} in the DeepSpeed config has no value that could be derived; write it out. '
                f'"auto" is known at: {", ".join(values)}'
            )
        holder[key] = values[path]
    for key, value in batch.items():
        if resolved.setdefault(key, value) != value:
            raise ValueError(
                f"{key} is {resolved[key]} in the DeepSpeed config, but this run has {value} "
                f'({micro_batch} sequences x {accumulation} accumulated x {world_size} ranks): change one or put "auto"'
            )
    return resolved


def _settled_by_methods() -> dict[str, str]:
    """The hyper-parameters to which a method gives a value itself, once it has the model: they stay "auto"."""
    rules = [item for method in METHODS.values() for item in method.hyper_parameters.rules().items()]
    return {f"optimizer.params.{name}": AUTO for name, rule in rules if AUTO in rule.words}


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a resolved config: 0, 1, 2 or 3."""
    return config.get("zero_optimization", {}).get("stage", 0)


def places(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every value in nested objects and lists: its dotted path, what holds it, and by which key."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, node, key
        yield from places(value, here)


def value_at(config: dict[str, Any], path: str) -> Any:
    """What lies at a dotted path, None if nothing does."""
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    return node
