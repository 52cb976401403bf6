"""`ds-memopt report`: the page, read as a browser would, says what the runs wrote, and nothing else."""

from __future__ import annotations

import ast
import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import transformers
from PIL import Image
from spawn import run_script

from ds_memopt import cli
from ds_memopt.results import plots, schema
from ds_memopt.results.plots import PROCESS, REST, UNDIVIDED
from ds_memopt.results.record import read_json, read_metrics
from ds_memopt.results.report_page import write_report
from ds_memopt.results.schema import Environment, MetricsRow

ROOT = Path(__file__).parent.parent
MIB = 1024**2
PARTS = {"weights": 0.25, "masters": 0.5, "gradients": 0.125, "exp_avg": 0.5, "exp_avg_sq": 0.5}
SENT = {"all_gather": 10 * MIB, "reduce_scatter": 20 * MIB}


class Page(HTMLParser):
    """tables: heading of the section -> {first cell: {heading of the column: cell}}; text; commands; tags; images."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables, self.text, self.commands, self.tags, self.images = {}, "", [], [], {}
        self._heading, self._within, self._row, self._source = "", "", [], path.read_text()
        self.feed(self._source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag in ("h2", "th", "td", "pre"):
            self._within = ""
        elif tag == "tr":
            self._row = []
        elif tag == "img":
            self.images[attributes["alt"]] = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))

    def handle_data(self, data):
        self._within += data
        self.text += data

    def handle_endtag(self, tag):
        if tag == "h2":
            self._heading = self._within
        elif tag == "pre":
            self.commands.append(self._within)
        elif tag in ("th", "td"):
            self._row.append(self._within)
        elif tag == "tr":
            if self._heading not in self.tables:
                self.tables[self._heading] = {}
                self._columns = self._row
            else:
                self.tables[self._heading][self._row[0]] = dict(zip(self._columns[1:], self._row[1:], strict=True))


def make_run(folder: Path, optimizer: str = "AdamW", stage: int = 2, batch: int = 4, speed: float = 1000.0, **new):
    """A run on two GPUs as it is recorded; of `new`, None takes a key away and others are written into every row."""
    rows = []
    for number in range(1, 6):
        row = {
            "step": 10 * number, "tokens": 5120 * number, "loss": 5.0 / number, "lr": 1e-4, "grad_norm": 1.0,
            "validation_loss": 4.0 / number if number % 2 else None,
            "step_ms": 9999.0 if number == 1 else 100.0 + number, "mfu": 0.25,
            "tokens_per_s": 1.0 if number == 1 else speed + number, "tokens_per_s_per_gpu": (speed + number) / 2,
            "forward_ms": 30.0, "backward_ms": 40.0, "optimizer_ms": 20.0, "communication_ms": 10.0,
            "other_ms": float(number), "peak_allocated_gib": 4.0, "peak_reserved_gib": 5.0, "held_gib": PARTS,
            "bytes_sent_per_step": 30 * MIB, "sent_by_collective": SENT, "sent_by_group": {"0-1": 30 * MIB},
            "optimizer_state_bytes_per_parameter": 8.0,
        }  # fmt: skip
        rows.append({key: value for key, value in (row | new).items() if value is not None or key == "validation_loss"})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"optimizer": {"type": optimizer}, "zero_stage": stage, "micro_batch": batch, "mfu": "MFU = a < b & c"}
    (folder / "resolved_config.json").write_text(json.dumps(settings))
    environment = {"command": ["python", "train.py", "--data", "a b"], "world_size": 2, "device": "H100 <80GB>",
                   "device_type": "cuda", "packages": {"torch": "2.13.0"}, "git_commit": "9" * 40}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def case(optimizer: str, stage: int, batch: int, status: str = "ok", **more) -> dict:
    name = f"{optimizer}-zero{stage}-batch{batch}"
    return {"case": name, "optimizer": optimizer, "zero_stage": stage, "micro_batch": batch, "status": status,
            "folder": name, "command": ["deepspeed", "--num_gpus", "2", "train.py"], **more}  # fmt: skip


def write_lines(folder: Path, lines: list) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """What launch/pretrain.py writes by itself, in four steps of a tiny model."""
    place = tmp_path_factory.mktemp("real")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=256)
    transformers.LlamaConfig(**sizes, max_position_embeddings=16).save_pretrained(place / "config")
    options = dict(model=place / "config", data="synthetic", steps=4, seq_length=16, micro_batch=2,
                   validation_interval=2, output_dir=place / "run")  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = run_script("launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    return place / "run"


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> SimpleNamespace:
    """A sweep with gaps, and the report of it."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    lines = [
        case("AdamW", 2, 1),
        case("AdamW", 2, 2, "failed", reason="gave up"),  # a later line knows better
        case("AdamW", 2, 4, "out of memory", reason="tried <2 GiB> & failed"),
        case("AdamW", 3, 1),
        case("AdamMini", 2, 1),
        case("AdamMini", 2, 2),
        case("GWT", 2, 1, "timeout", reason=None) | {"optimizer": "configs/gwt_3.json"},
        case("BAdam", 2, 1),  # its folder is gone
        case("AdamW", 2, 2),
    ]
    write_lines(folder, lines)
    make_run(folder / "AdamW-zero2-batch1", batch=1, speed=1000)
    make_run(folder / "AdamW-zero2-batch2", batch=2, speed=1600)
    make_run(folder / "AdamW-zero3-batch1", stage=3, batch=1, speed=900, sent_by_collective=None, held_gib=None)
    make_run(folder / "AdamMini-zero2-batch1", "AdamMini", batch=1, speed=1200, sent_by_group={"0-1": 29 * MIB})
    make_run(folder / "AdamMini-zero2-batch2", "AdamMini", batch=2, speed=2396.25)
    path = write_report([folder])
    return SimpleNamespace(folder=folder, path=path, page=Page(path))


def test_a_real_run(real, tmp_path, capsys):
    assert cli.main(["report", str(real), "--output", str(tmp_path / "out")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "out" / "index.html"
    page, rows = Page(path), read_metrics(real, [])
    assert len(rows) == len((real / "metrics.jsonl").read_text().splitlines())  # all are whole
    for row in rows:
        assert MetricsRow.__required_keys__ <= row.keys() <= get_type_hints(MetricsRow).keys()
    assert read_json(real / "environment.json").keys() == get_type_hints(Environment).keys()
    steady = sorted(rows[1:], key=lambda row: row["step_ms"])
    middle = steady[(len(steady) - 1) // 2]

    figures = page.tables["Figures"]["run"]
    assert figures["CPU ranks"] == "1" and figures["optimizer"] == "AdamMini" and figures["micro-batch"] == "2"
    assert figures["final validation loss"] == f"{rows[-1]['validation_loss']:.4f}"
    assert figures["tokens/s"] == f"{sorted(row['tokens_per_s'] for row in rows[1:])[1]:.0f}"
    assert figures["step, ms"] == f"{middle['step_ms']:.1f}"
    peak = max(row["peak_rss_gib"] for row in rows)
    assert figures["peak memory of a rank, GiB (resident set)"] == f"{peak:.3f}"

    memory = page.tables["Peak memory of a rank (resident set)"]["run"]
    assert memory["sum"] == f"{peak:.3f}"
    assert sum(float(cell) for name, cell in memory.items() if name != "sum") == pytest.approx(peak, abs=5e-3)
    times = page.tables["Time of a step"]["run"]
    assert sum(float(cell) for name, cell in times.items() if name != "sum") == pytest.approx(
        middle["step_ms"], abs=0.5
    )
    environment = read_json(real / "environment.json")
    versions = page.tables["Versions"]["run"]
    assert versions["torch"] == environment["packages"]["torch"] and versions["GPUs"] == "0 (1 on CPU)"
    assert page.commands == [" ".join(environment["command"])]


def test_every_key_of_a_metrics_row_says_what_it_is():
    classes = [node for node in ast.parse(Path(schema.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    for row in classes[:2]:
        keys, texts = row.body[1::2], row.body[2::2]
        assert all(isinstance(key, ast.AnnAssign) for key in keys) and len(keys) == len(texts)
        assert all(isinstance(text, ast.Expr) and isinstance(text.value.value, str) for text in texts), row.name


def test_figures_of_a_sweep(swept):
    assert swept.path == swept.folder / "report" / "index.html"
    figures = swept.page.tables["Figures"]
    assert list(figures) == ["AdamW-zero2-batch1", "AdamW-zero2-batch2", "AdamW-zero3-batch1", "AdamMini-zero2-batch1",
                             "AdamMini-zero2-batch2"]  # fmt: skip
    first = figures["AdamW-zero2-batch1"]
    expected = {"tokens/s": "1004", "tokens/s per GPU": "502", "step, ms": "103.0", "MFU": "25.0%", "ZeRO stage": "2",
                "peak memory of a rank, GiB (allocated)": "4.000", "peak reserved by PyTorch, GiB": "5.000",
                "sent per rank and step, MiB": "30.00", "final validation loss": "0.8000", "GPUs": "2"}  # fmt: skip
    assert {name: first[name] for name in expected} == expected
    assert [row["micro-batch"] for row in figures.values()] == ["1", "2 (max)", "1 (max)", "1", "2 (max)"]
    assert "All runs: MFU = a < b & c." in swept.page.text
    assert swept.page.commands[0] == "deepspeed --num_gpus 2 train.py"


def test_a_sweep_is_judged(swept):
    sweep = swept.page.tables["Sweep sweep"]
    assert list(sweep["AdamW, ZeRO-2"].values()) == ["2", "1604", "1604", "2", "4: out of memory"]
    assert list(sweep["gwt_3, ZeRO-2"].values()) == ["none", "-", "-", "-", "1: timeout"]
    assert "AdamMini trains 1.50 times as many tokens/s as AdamW: 2,400 at ZeRO-2, micro-batch 2" in swept.page.text
    assert "5 of 8 cases ran." in swept.page.text
    failed = swept.page.tables["Cases without figures"]
    assert list(failed) == ["AdamW-zero2-batch4", "GWT-zero2-batch1", "BAdam-zero2-batch1"]
    assert failed["AdamW-zero2-batch4"] == {"status": "out of memory", "reason": "tried <2 GiB> & failed"}
    assert failed["GWT-zero2-batch1"] == {"status": "timeout", "reason": "-"}
    assert failed["BAdam-zero2-batch1"]["status"] == "cannot be read"


def test_parts_add_up_and_what_is_missing_is_said(swept):
    memory = swept.page.tables["Peak memory of a rank (allocated)"]
    known = {name: f"{gib:.3f}" for name, gib in PARTS.items()}
    assert memory["AdamW-zero2-batch1"] == {**known, REST: "2.125", UNDIVIDED: "-", "sum": "4.000"}
    older = memory["AdamW-zero3-batch1"]
    assert older == {**dict.fromkeys([*known, REST], "-"), UNDIVIDED: "4.000", "sum": "4.000"}
    sent = swept.page.tables["Sent per rank and step"]
    assert list(sent["AdamW-zero2-batch1"].values()) == ["10", "20", "-", "30", "30"]
    assert list(sent["AdamW-zero3-batch1"].values()) == ["-", "-", "30", "30", "30"]
    assert [row["of it in group 0-1"] for row in sent.values()] == [
        "30",
        "30",
        "30",
        "29",
        "30",
    ]
    assert swept.page.text.count("AdamW-zero3-batch1: no parts recorded, so it is drawn as one bar.") == 2
    assert list(swept.page.tables["Time of a step"]["AdamW-zero2-batch1"].values()) == [
        "30.0", "40.0", "20.0", "10.0", "3.0", "103.0"
    ]  # fmt: skip


def test_versions_are_told_and_the_page_needs_nothing_else(swept):
    assert "http:" not in swept.path.read_text() and "https:" not in swept.path.read_text()
    for tag, attributes in swept.page.tags:
        assert tag not in ("script", "link", "iframe")
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")
    expected = {"torch": "2.13.0", "deepspeed": "-", "Python": "-", "GPUs": "2", "commit": "9" * 12}
    versions = swept.page.tables["Versions"]["AdamW-zero2-batch1"]
    assert {name: versions[name] for name in expected} == expected
    assert "<80GB>" not in swept.path.read_text() and "H100 <80GB>" in swept.page.text


def test_plots_lie_beside_the_page(swept):
    names = ["loss", "memory", "micro_batch", "sent", "step_time", "tokens_per_s"]
    files = sorted(swept.path.parent.glob("*.png"))
    assert [file.stem for file in files] == names
    assert sorted(swept.page.images.values()) == sorted(file.read_bytes() for file in files)
    for image in swept.page.images.values():
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            assert opened.width >= 1400 and 350 <= opened.height <= 2000
            assert len(opened.convert("RGB").getcolors(2**24)) > 50  # something is drawn


def test_bars_begin_at_zero_and_kinds_keep_their_colours():
    kinds = ["weights", "gradients", "some_state", REST]
    parts = [dict(zip(kinds, (1.0, 2.0, 3.0, 4.0), strict=True)), {"weights": 0.5, REST: 1.0}]
    axes = plots.stacked(["a", "$b_"], kinds, parts, "title", "GiB").axes[0]
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > 10
    widths = {row: sum(bar.get_width() for bar in axes.patches if round(bar.get_y() + 0.35) == row) for row in (0, 1)}
    assert widths == {0: 10.0, 1: 1.5}
    assert [bars[0].get_x() for bars in axes.containers] == [0, 1, 3, 6]  # one begins where the one before it ends
    assert [text.get_text() for text in axes.texts] == ["10.0", "1.50"]

    def color(axes, kind):
        return next(bars[0].get_facecolor() for bars in axes.containers if bars.get_label() == kind)

    other = plots.stacked(["a"], ["gradients", REST], [{"gradients": 1.0, REST: 2.0}], "title", "GiB").axes[0]
    assert color(axes, "gradients") == color(other, "gradients") and color(axes, REST) == color(other, REST)


def test_runs_of_one_name_on_cpu_and_without_figures_of_their_own(tmp_path):
    """Names are told apart by their folders; what an older run lacks is "-"; parts beyond the peak are not drawn."""
    on_cpu = dict(peak_allocated_gib=None, peak_reserved_gib=None, peak_rss_gib=4.0)
    first = make_run(tmp_path / "one" / "same <b>", **on_cpu)
    environment = read_json(first / "environment.json") | {"process_gib": 0.5}
    (first / "environment.json").write_text(json.dumps(environment))
    second = make_run(tmp_path / "two" / "same <b>", **on_cpu, forward_ms=None, mfu=None)
    (second / "environment.json").unlink()
    third = make_run(tmp_path / "large", **on_cpu, held_gib={"weights": 4.5})
    empty = make_run(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    page = Page(write_report([first, second, third, empty, first], tmp_path / "out"))

    one, two = "one/same <b>", "two/same <b>"
    memory = page.tables["Peak memory of a rank (resident set)"]
    assert list(memory) == [one, two, "large"]
    assert (memory[one][PROCESS], memory[one][REST]) == ("0.500", "1.625")
    assert (memory[two][PROCESS], memory[two][REST]) == ("-", "2.125")
    assert memory["large"][UNDIVIDED] == memory["large"]["sum"] == "4.000"
    assert f'{two}: the process was not measured before the model, so it is part of "{REST}".' in page.text
    assert "large: the parts add up to more than the peak, so it is drawn as one bar." in page.text
    assert page.tables["Figures"][two]["MFU"] == page.tables["Figures"][two]["CPU ranks"] == "-"
    assert page.tables["Time of a step"][two][UNDIVIDED] == "103.0"
    assert set(page.tables["Versions"][two].values()) == {"-"} and page.commands[1] == "-"
    assert page.commands[0] == "python train.py --data 'a b'"
    assert "has logged no step yet" in page.tables["Cases without figures"]["empty"]["reason"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is neither the folder of a run nor that of a sweep: it has no metrics.jsonl and no results.jsonl"),
        ({"metrics.jsonl": ""}, "has logged no step yet"),
        ({"metrics.jsonl": '{"step": 1'}, "has logged no step yet"),
        ({"results.jsonl": ""}, "results.jsonl has no whole line yet"),
        ({"results.jsonl": '[1]\n{"case": "a", "status": "ok"}\n'}, "results.jsonl has no whole line yet"),
    ],
)
def test_what_cannot_be_reported(tmp_path, capsys, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


DAMAGED = ['{"step": 20, "tok', "null", '{"step": "x"}', "\0\0", "[" * 5000]


def test_a_damaged_line_is_left_out_and_told(tmp_path, capsys):
    """Torn lines, lines of others, and each figure of a row in another type: the rest of the report is as without."""
    whole = write_lines(tmp_path / "whole", [case("AdamW", 2, 1)])
    torn = write_lines(tmp_path / "torn", [case("AdamW", 2, 1)])
    pages = []
    for folder in (whole, torn):
        metrics = make_run(folder / "AdamW-zero2-batch1", batch=1) / "metrics.jsonl"
        if folder is torn:
            row = json.loads(metrics.read_text().splitlines()[-1])
            wrong = [json.dumps(row | {key: "x" if key != "active_block" else 1}) for key in row]
            wrong += [json.dumps(row | {key: {"weights": None}}) for key in ("held_gib", "sent_by_group")]
            metrics.write_text("\n".join([*DAMAGED, metrics.read_text(), *wrong]))
            with (folder / "results.jsonl").open("a") as file:
                file.write('{"case": "Ada\n{"case": 1}')
        pages.append(Page(write_report([folder])))
    figures, rest = (page.tables["Figures"] for page in pages)
    assert figures == rest and pages[0].tables["Versions"] == pages[1].tables["Versions"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(told) == 2 + len(DAMAGED) + 1 + len(wrong)  # 1: of the empty line
    assert 'torn/results.jsonl, line 2, is damaged: \'{"case": "Ada\'' in told[0]
    assert 'batch1/metrics.jsonl, line 1, is damaged: \'{"step": 20, "tok\'' in told[2]
    assert all(line.removeprefix("left out: ")[:60] in pages[1].text for line in told)


@pytest.fixture
def failed(tmp_path) -> Path:
    """A sweep in which nothing ran: its report has no plots."""
    return write_lines(tmp_path / "sweep", [case("AdamW", 2, 1, "failed", reason="first")])


def test_a_report_replaces_a_report_and_nothing_else(failed, tmp_path):
    output = tmp_path / "out"
    write_report([failed], output)
    (output / "old.png").write_bytes(b"")
    write_lines(failed, [case("AdamW", 2, 1, "failed", reason="second")])
    page = Page(write_report([failed], output))
    assert page.tables["Cases without figures"]["AdamW-zero2-batch1"]["reason"] == "second"
    assert "No case of AdamW ran" in page.text
    assert [path.name for path in output.iterdir()] == ["index.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sweep"]  # nothing is left aside

    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out exists and is not a former report \(it holds .*notes.txt"):
        write_report([failed], output)
    for foreign in ("index.html", "plot.png"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / foreign).write_text("<html>")
        with pytest.raises(ValueError, match=f"is not a former report .it holds {foreign}"):
            write_report([failed], tmp_path / "other")
        (tmp_path / "other" / foreign).unlink()
        (tmp_path / "other").rmdir()
    with pytest.raises(ValueError, match="results.jsonl exists and is not a former report"):
        write_report([failed], failed / "results.jsonl")
    with pytest.raises(ValueError, match="cannot write --output .*results.jsonl/report"):
        write_report([failed], failed / "results.jsonl" / "report")


def test_where_a_report_goes_by_itself(failed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_report([failed]) == failed / "report" / "index.html"
    monkeypatch.chdir(failed)
    assert "Sweep sweep" in Page(write_report([Path(".")])).text
    monkeypatch.chdir(tmp_path)
    more = write_lines(tmp_path / "more", [case("GWT", 2, 1, "failed")])
    assert write_report([failed, more]) == tmp_path / "runs/report-1/index.html"
    assert write_report([failed, more]) == tmp_path / "runs/report-2/index.html"
