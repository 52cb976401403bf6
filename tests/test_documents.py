"""The documents: their code runs, their links lead somewhere, and each folder's README names its files."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from spawn import ROOT, free_port, run_script

from ds_memopt.support import markdown_table

FOLDERS = ("ds_memopt", "ds_configs", "launch")
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))
READMES = [path for path in DOCUMENTS if path.name == "README.md" and path.parent != ROOT]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_table_of_support_is_whole():
    assert markdown_table() in (ROOT / "ds_memopt/README.md").read_text()


def test_no_figure_is_missing():
    for document in DOCUMENTS:
        assert not {"EVIDENCE", "ONE_", "@@"} & set(re.findall("EVIDENCE|ONE_|@@", document.read_text())), document


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, section = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if section:
            assert section in sections(target), link


def sections(path: Path) -> set[str]:
    """The anchors of a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("readme", READMES, ids=shown)
def test_a_readme_names_the_files_of_its_folder_and_no_others(readme):
    """In the first column of its first table, as patterns of names; a folder inside that has a README by its name."""
    table = re.search(r"(?:^\|.*\n)+", readme.read_text(), re.MULTILINE).group()
    named = {name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    files = set(files_of(readme.parent))
    assert {file for file in files if not any(fnmatch(file, name) for name in named)} == set(), "not named"
    assert {name for name in named if not any(fnmatch(file, name) for file in files)} == set(), "no such file"


def files_of(folder: Path, inside: str = "") -> list[str]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "README.md").exists():
            found.append(f"{inside}{path.name}/")
        elif path.is_dir() and path.name != "__pycache__":
            found += files_of(path, f"{inside}{path.name}/")
        elif path.is_file() and path.name not in ("README.md", "__init__.py"):
            found.append(inside + path.name)
    return found


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "json")], ids=shown)
def test_json_is_json(document):
    for block in blocks(document, "json"):
        json.loads(block if block.startswith("{") else f"{{{block}}}")


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "python")], ids=shown)
def test_snippets_run(document, tmp_path):
    """Each runs as it stands, given a model and batches as a user has them, one after another in one process."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    script = tmp_path / "snippets.py"
    sources = [(f"{shown(document)}, snippet {n}", code) for n, code in enumerate(blocks(document, "python"), 1)]
    script.write_text(RUN.format(tests=str(ROOT / "tests"), environment=environment, sources=sources))
    done = run_script(script)
    assert done.returncode == 0, done.stdout + done.stderr


RUN = """
import os, sys
os.environ.update({environment})
sys.path.insert(0, {tests!r})
import torch
from tiny import batches, full_parameters, llama
for name, source in {sources}:
    model = llama()
    before = full_parameters(model)
    config = {{
        "train_micro_batch_size_per_gpu": 12, "gradient_clipping": 1.0, "zero_optimization": {{"stage": 2}},
        "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}}},
    }}
    data = [dict(input_ids=batch, labels=batch) for batch in batches(2)]
    given = {{"model": model, "data": data, "config": config, "torch": torch, "__name__": "snippet"}}
    exec(compile(source, name, "exec"), given)
    after = full_parameters(model)
    assert any(not torch.equal(before[key], after[key]) for key in before), name + " trained nothing"
"""
