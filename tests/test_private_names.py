"""The table of private names: what is gone is named, all of it at once, and what the code uses stands in it."""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

from ds_memopt.engines.adapter import HOOKS
from ds_memopt.engines.private_names import ASKED_OF_OURS, ENGINE, NAMES, _stored, check_private_names, missing
from ds_memopt.engines.register import WRAPPERS
from ds_memopt.engines.rotation_adapter import CONFIGURE, KEPT

PACKAGE = Path(__file__).resolve().parent.parent / "ds_memopt"
TABLE = {name for table in (NAMES, ASKED_OF_OURS) for names in table.values() for name in names}


def test_nothing_is_missing():
    assert missing() == []


@pytest.mark.parametrize("number_of_names", [3, 700])
def test_attributes_that_bytecode_sets_are_those_of_dis(number_of_names):
    """With more than 256 names an index takes two steps."""
    lines = "".join(f"    a.read{n}; a.set{n} = 1\n" for n in range(number_of_names // 2))
    space: dict = {}
    exec(f"def f(a):\n{lines}", space)
    code = space["f"].__code__
    told = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    assert {code.co_names[index] for index in _stored(code.co_code)} == told
    assert told == {f"set{n}" for n in range(number_of_names // 2)}


def test_all_that_is_missing_is_named(monkeypatch):
    """A method, functions of modules, what only the constructor sets, and what nobody asks of an optimizer any more."""

    def other(self, *_):
        """What has none of the names."""

    monkeypatch.delattr(DeepSpeedEngine, "_load_zero_checkpoint")
    monkeypatch.delattr(groups, "_create_zero_param_parallel_group")
    monkeypatch.delattr(distributed_c10d, "_get_default_store")
    monkeypatch.setattr(stage3.DeepSpeedZeroOptimizer_Stage3, "__init__", other)
    monkeypatch.setattr(DeepSpeedEngine, "load_checkpoint", other)
    with pytest.raises(RuntimeError) as error:
        check_private_names.__wrapped__()
    of_deepspeed, of_torch = str(error.value).split(", and torch")
    for name in (
        "DeepSpeedEngine._load_zero_checkpoint",
        "deepspeed.utils.groups._create_zero_param_parallel_group",
        "DeepSpeedZeroOptimizer_Stage3.parameter_offload",
        "DeepSpeedEngine._restore_from_bit16_weights, asked of its optimizer",
    ):
        assert name in of_deepspeed
    assert "torch.distributed.distributed_c10d._get_default_store, which ds_memopt needs." in of_torch
    assert str(error.value).endswith("Install deepspeed 0.19.* and torch 2.11 to 2.13.")


def test_every_name_has_a_purpose_and_every_hook_is_listed():
    assert all(purpose for table in (NAMES, ASKED_OF_OURS) for names in table.values() for purpose in names.values())
    assert {*HOOKS, *WRAPPERS} <= {*NAMES[ENGINE]}
    wrappers = {cls.__name__ for cls in CONFIGURE}
    assert {*KEPT} <= {name for owner, names in NAMES.items() if owner.split(":")[-1] in wrappers for name in names}


ENGINES_OBJECTS = ("engine", "wrapper", "zero", "offload", "coordinator", "zero_config", "_config", "profiler")
PUBLIC = {
    "module": "the model, of any engine",
    "train_step": "set by us",
    "start": "of a timer",
    "_replace": "of a NamedTuple",
    "_asdict": "of a NamedTuple",
    "_exit": "of os",
    "_base": "of a tensor",
    "_c10d_functional": "of torch.ops",
    "_ds_memopt_registered": "set by us",
}
"""Names that a search finds and that belong to nobody's private parts."""


def used(tree: ast.AST) -> Iterator[str]:
    """Attributes of engines, of what they hold and of partitioned parameters, and private ones of any object."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        holder = ast.unparse(node.value)
        of_engine = holder.split(".")[-1] in ENGINES_OBJECTS
        private = node.attr.startswith("_") and holder not in ("self", "cls", "super()")
        if of_engine or private or node.attr.startswith("ds_"):
            yield node.attr


def defined(tree: ast.AST) -> Iterator[str]:
    """Private names that are our own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_what_the_code_uses_stands_in_the_table():
    folders = [
        path for folder in ("engines", "shards", "measure", "blocks") for path in (PACKAGE / folder).glob("*.py")
    ]
    trees = {path.name: ast.parse(path.read_text()) for path in folders}
    assert {"_running_engine_backward", "ds_tensor", "_fsdp_param_groups"} <= {
        n for t in trees.values() for n in used(t)
    }
    ours = {name for tree in trees.values() for name in defined(tree) if name.startswith("_")}
    unlisted = {
        name: sorted({attribute for attribute in used(tree)} - TABLE - ours - {*PUBLIC}) for name, tree in trees.items()
    }
    assert {name: attributes for name, attributes in unlisted.items() if attributes} == {}
