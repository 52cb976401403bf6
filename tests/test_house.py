"""The habits of the house: layers, style, imports without deepspeed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ds_memopt
from ds_memopt.optimizers import METHODS
from ds_memopt.support import FEATURES, SUPPORT

ROOT = Path(__file__).resolve().parent.parent
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


def tracked() -> list[Path]:
    """The repository's files, also those that are not added yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in tracked() if path.name not in ("__init__.py", "README.md"))
    assert [name for name, count in names.items() if count > 1] == []


def test_scripts_start_in_the_root_and_name_files_that_exist():
    texts = {path: path.read_text() for path in tracked() if path.suffix in (".py", ".sh", ".sbatch", ".md", ".toml")}
    for path, text in texts.items():
        for step in re.findall(r"^cd .*\$\(dirname \"\$\{BASH_SOURCE\[0\]\}\"\)(/[./]+)", text, re.MULTILINE):
            assert Path(f"{path.parent}{step}").resolve() == ROOT, path
        missing = {
            name for name in re.findall(r"\blaunch/[\w/]+\.(?:py|sh|sbatch)\b", text) if not (ROOT / name).is_file()
        }
        assert not missing, path


def test_maths_and_placement_import_without_deepspeed():
    blocked = "import sys; sys.modules['deepspeed'] = sys.modules['transformers'] = None; "
    run(sys.executable, "-c", blocked + "import ds_memopt.optimizers, ds_memopt.shards, ds_memopt.blocks, ds_memopt")


def test_every_method_states_its_support_of_every_feature():
    assert set(SUPPORT) == set(METHODS)
    for method, features in SUPPORT.items():
        assert set(features) == set(FEATURES), method
        for feature, support in features.items():
            assert support.status != "refused" or support.note, (method, feature)


OUR_CLASSES = {
    base.__name__ for method in METHODS.values() for base in method.__mro__ if base.__module__.startswith("ds_memopt.")
}


def stand_ins(source: str) -> Iterator[str]:
    """Where a source asks which method an optimizer is instead of what it can do."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            inside = {getattr(n, "id", getattr(n, "attr", None)) for arg in node.args[1:] for n in ast.walk(arg)}
            if node.func.id == "takes" or (
                node.func.id in ("isinstance", "issubclass") and inside & {*OUR_CLASSES, "METHODS"}
            ):
                yield ast.unparse(node)
        if isinstance(node, ast.Compare | ast.MatchValue):
            constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            classes = {n.id for n in ast.iter_child_nodes(node) if isinstance(n, ast.Name)}
            if constants & {*METHODS} or classes & OUR_CLASSES:
                yield ast.unparse(node)


def test_methods_are_known_by_what_they_can_do():
    sources = [*(ROOT / "ds_memopt").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    outside = [path for path in sources if ROOT / "ds_memopt/optimizers" not in path.parents]
    found = {str(path.relative_to(ROOT)): list(stand_ins(path.read_text())) for path in outside}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("source", [
    "isinstance(engine.basic_optimizer, BAdam)", "issubclass(METHODS.get(name, object), InPlaceOptimizer)",
    "isinstance(x, (int, optimizers.MeZO))", "isinstance(x, tuple(METHODS.values()))", "takes(name, 'zo_batch')",
    "row.method == 'MeZO'", "name in ('AdamW', 'Addax')", "type(x) is GWT",
])  # fmt: skip
def test_a_stand_in_is_found(source):
    assert list(stand_ins(source))


def test_the_package_exports_its_methods():
    assert all(getattr(ds_memopt, name) is method for name, method in METHODS.items())
    assert issubclass(ds_memopt.AdamMini, torch.optim.Optimizer)
