"""The habits of the house: layers, style, the README's snippets and its table, imports without deepspeed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spawn import free_port

import ds_memopt
from ds_memopt.optimizers import METHODS
from ds_memopt.support import FEATURES, SUPPORT, markdown_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_layers_are_kept():
    run(BIN / "lint-imports")


def test_style_is_kept():
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")


def test_files_stay_short():
    sources = [path for folder in ("ds_memopt", "launch", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in sources if len(path.read_text().splitlines()) > 500] == []


def test_maths_and_placement_import_without_deepspeed():
    blocked = "import sys; sys.modules['deepspeed'] = sys.modules['transformers'] = None; "
    run(sys.executable, "-c", blocked + "import ds_memopt.optimizers, ds_memopt.shards, ds_memopt.blocks, ds_memopt")


def test_every_method_states_its_support_of_every_feature():
    assert set(SUPPORT) == set(METHODS)
    for method, features in SUPPORT.items():
        assert set(features) == set(FEATURES), method
        for feature, support in features.items():
            assert support.status != "refused" or support.note, (method, feature)


def test_the_readme_is_whole():
    assert markdown_table() in README
    assert "EVIDENCE" not in README and "ONE_" not in README


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippets_run(number, tmp_path, monkeypatch):
    """Each runs as it stands, given a model and batches as a user has them."""
    script = tmp_path / "snippet.py"
    script.write_text(SETTING + SNIPPETS[number] + CHECK)
    environment = "import os; os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1')\n"
    with_port = environment + f"os.environ['MASTER_PORT'] = '{free_port()}'\n"
    script.write_text(with_port + script.read_text())
    run(sys.executable, script)


SETTING = f"""
import sys, json
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import llama, batches, full_parameters
import torch
model = llama()
before = full_parameters(model)
data = [dict(input_ids=batch, labels=batch) for batch in batches(2)]
config = {{
    "train_micro_batch_size_per_gpu": 12, "gradient_clipping": 1.0, "zero_optimization": {{"stage": 2}},
    "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}}},
}}
"""
CHECK = """
after = full_parameters(model)
assert any(not torch.equal(before[name], after[name]) for name in before), "the snippet trained nothing"
"""


def test_the_package_exports_its_methods():
    assert all(getattr(ds_memopt, name) is method for name, method in METHODS.items())
    assert issubclass(ds_memopt.AdamMini, torch.optim.Optimizer)
