"""Worker of test_checkpoints.py: runs of the main job, with the accidents that befall them, on two ranks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import transformers

from ds_memopt.engines.checkpoint_files import _read_metadata
from ds_memopt.train import checkpoint, fsdp2_job, loop
from ds_memopt.train.options import PretrainOptions

CONFIGS = Path(__file__).parent.parent / "ds_configs"
SIZE = dict(
    steps=6, seq_length=16, micro_batch=2, accumulation=1, validation_interval=0, logging_interval=1, save_interval=2,
    data="synthetic", checkpoint_format="engine",
)  # fmt: skip
STEP = "checkpoints/step{}"
OPTIMIZER_FILE = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


class Case(NamedTuple):
    """A run. source: the folder of another that it goes on from. accident: what is done to its folder before.
    within: entered around it, of (folder); fsdp2: under FSDP2."""

    config: str
    options: dict[str, Any] = {}
    source: str | None = None
    accident: Callable[[Path], None] = lambda folder: None
    within: Callable[[Path], Any] = lambda folder: contextlib.nullcontext()
    fsdp2: bool = False


class Outcome(NamedTuple):
    message: str | None
    printed: str


def make_model(place: Path) -> None:
    """One with weights large enough that NaNs would not hide in rounding."""
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place / "config")
    for name, changes in CHANGED.items():
        source = json.loads((CONFIGS / f"{name.split(' ')[0]}.json").read_text())
        for section, values in changes.items():
            source[section] = source[section] | values if isinstance(values, dict) else values
        (place / f"{name}.json").write_text(json.dumps(source))


CHANGED = {
    "zero0_adamw": {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "gradient_clipping": 0.0},
    "zero2_adam_mini": {},
    "zero3_adamw": {"optimizer": {"type": "AdamW", "params": {}}},
    "zero3_ipsgd": {},
}


def run_cases(place: Path, names: Iterable[str]) -> dict[str, Outcome]:
    torch.set_num_threads(1)
    return {name: _run(place, name, (CASES | FULL_DISK)[name]) for name in names}


def _run(place: Path, name: str, case: Case) -> Outcome:
    folder = place / name
    if dist.get_rank() == 0:
        if case.source:
            shutil.copytree(place / case.source, folder, dirs_exist_ok=True)
        case.accident(folder)
    dist.barrier()
    options = PretrainOptions(
        deepspeed_config=str(place / f"{case.config}.json"), output_dir=str(folder), model=str(place / "config"),
        **SIZE | ({"resume": True} if case.source else {}) | case.options,
    )  # fmt: skip
    printed, message = io.StringIO(), None
    with contextlib.redirect_stdout(printed), case.within(folder):
        try:
            (fsdp2_job.pretrain_fsdp2 if case.fsdp2 else loop.pretrain)(options)
        except (ValueError, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
    return Outcome(message, printed.getvalue())


# --- what goes wrong in a run ---


@contextlib.contextmanager
def nan_gradient(step: int):
    """One NaN in backward, on rank 1."""
    builders = [(loop, "build_model"), (fsdp2_job, "build_without_weights")]

    def poisoned(build: Callable, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        model, calls = build(*arguments, **keywords), []

        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                calls.append(1)
                if len(calls) == step:
                    output.register_hook(lambda gradient: gradient * float("nan"))

        if dist.get_rank() == 1:
            model.model.layers[1].register_forward_hook(hook)
        return model

    with contextlib.ExitStack() as patches:
        for module, name in builders:
            patches.enter_context(mock.patch.object(module, name, partial(poisoned, getattr(module, name))))
        yield


def nan_in(find: Callable[[Any], torch.Tensor]):
    """A NaN in one tensor that rank 1 holds, before step 4 is saved: other tensors are whole."""
    save = checkpoint.save

    def poisoned(engine: Any, step: int, *rest: Any) -> None:
        if step == 4 and dist.get_rank() == 1:
            find(engine).detach().view(-1)[-1] = float("nan")
        save(engine, step, *rest)

    return mock.patch.object(checkpoint, "save", poisoned)


def filled_while_writing(folder: Path):
    """Another program takes what is left of the disk when step 4 is being written."""
    write = checkpoint._write

    def with_filler(engine: Any, aside: Path) -> None:
        if aside.name == ".step4" and dist.get_rank() == 0:
            free = shutil.disk_usage(folder).free
            (folder / "filler").write_bytes(bytes(free - 40_000))
        dist.barrier()
        write(engine, aside)

    return mock.patch.object(checkpoint, "_write", with_filler)


# --- what befalls a folder ---


def flip(path: Path, place: float = 0.5) -> None:
    with path.open("r+b") as stream:
        stream.seek(int(path.stat().st_size * place))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def listed_anew(folder: Path, name: str) -> None:
    """What someone does who can change a file: its checksum in run.json fits again."""
    facts = json.loads((folder / "run.json").read_text())
    facts["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "run.json").write_text(json.dumps(facts))


class Evil:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return open, (self.target, "w")


def evil_file(folder: Path) -> None:
    path = folder / STEP.format(6) / OPTIMIZER_FILE
    torch.save(torch.load(path, weights_only=False) | {"more": Evil(folder / "created")}, path)
    listed_anew(path.parent, path.name)


def evil_metadata(folder: Path) -> None:
    path = folder / STEP.format(6) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Evil(folder / "created")
    path.write_bytes(pickle.dumps(metadata))
    listed_anew(path.parent, path.name)


def evil_entry(folder: Path) -> None:
    """In the place of an object that is no tensor, in a .distcp file."""
    metadata = _read_metadata(folder / STEP.format(6) / ".metadata")
    index, place = next(item for item in metadata.storage_data.items() if item[0].fqn == "progress.global_steps")
    evil = io.BytesIO()
    torch.save(Evil(folder / "created"), evil)
    path = folder / STEP.format(6) / place.relative_path
    with path.open("ab") as stream:
        place.offset, place.length = stream.tell(), stream.write(evil.getvalue())
    (path.parent / ".metadata").write_bytes(pickle.dumps(metadata))
    listed_anew(path.parent, path.name)
    listed_anew(path.parent, ".metadata")


def leave_over(folder: Path) -> None:
    """What a killed run leaves: things written aside, a torn line, and no `latest` if it was the first save."""
    for name in ("checkpoints/.step4", ".model"):
        (folder / name).mkdir()
        (folder / name / "half").write_text("")
    for name in (".metrics.jsonl.17", ".environment.json.17", "checkpoints/.latest.17", ".notes"):
        (folder / name).write_text("")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "tok')
    (folder / "checkpoints/latest").unlink()


NAN = dict(within=lambda folder: nan_gradient(4))


def mix(folder: Path) -> None:
    """Rank 1's optimizer is of an earlier step."""
    shutil.copy(*(folder / STEP.format(step) / OPTIMIZER_FILE for step in (4, 6)))


def damage_all(folder: Path) -> None:
    flip(folder / STEP.format(6) / "mp_rank_00_model_states.pt")
    (folder / STEP.format(4) / OPTIMIZER_FILE).unlink()
    (folder / STEP.format(2) / "run.json").write_text("{")


def add_file(folder: Path) -> None:
    shutil.copy(*(folder / STEP.format(6) / f"mp_rank_0{number}_model_states.pt" for number in (0, 1)))


CASES = {
    "zero2": Case("zero2_adam_mini"),
    "fsdp2": Case("zero3_adamw", fsdp2=True),
    # Numbers that are none.
    "nan zero0": Case("zero0_adamw", **NAN),
    "nan zero0 again": Case("zero0_adamw", source="nan zero0"),
    "nan fsdp2": Case("zero3_adamw", fsdp2=True, **NAN),
    "nan master": Case(
        "zero2_adam_mini", dict(dtype="bf16"),
        within=lambda folder: nan_in(lambda engine: engine.optimizer.single_partition_of_fp32_groups[0]),
    ),
    "nan state": Case(
        "zero3_adamw", fsdp2=True,
        within=lambda folder: nan_in(lambda e: list(e.optimizer.state.values())[0]["exp_avg"].to_local()),
    ),
    "nan ipsgd": Case("zero3_ipsgd", dict(steps=5, save_interval=0), **NAN),
    # Damage.
    "mixed": Case("zero2_adam_mini", source="zero2", accident=mix),
    "metadata": Case(
        "zero3_adamw", source="fsdp2", fsdp2=True,
        accident=lambda folder: flip(folder / STEP.format(6) / ".metadata", 0.9),
    ),
    "gone": Case("zero2_adam_mini", source="zero2", accident=lambda folder: shutil.rmtree(folder / STEP.format(6))),
    "added": Case("zero2_adam_mini", source="zero2", accident=add_file),
    "all": Case("zero2_adam_mini", source="zero2", accident=damage_all),
    "step 2": Case("zero2_adam_mini", dict(resume=2), source="zero2"),
    "step 3": Case("zero2_adam_mini", dict(resume=3), source="zero2"),
    "step 6": Case("zero2_adam_mini", dict(resume=6), source="zero2", accident=mix),
    "leftovers": Case("zero2_adam_mini", source="zero2", accident=leave_over),
    # Code.
    "evil file": Case("zero2_adam_mini", source="zero2", accident=evil_file),
    "evil file, trusted": Case("zero2_adam_mini", dict(trust_checkpoint=True), source="zero2", accident=evil_file),
    "evil metadata": Case("zero3_adamw", source="fsdp2", accident=evil_metadata, fsdp2=True),
    "evil entry": Case("zero3_adamw", source="fsdp2", accident=evil_entry, fsdp2=True),
}  # fmt: skip
FULL_DISK = {
    "small": Case("zero2_adam_mini"),
    "filled": Case("zero2_adam_mini", within=filled_while_writing),
    "filled fsdp2": Case("zero3_adamw", within=filled_while_writing, fsdp2=True),
}
