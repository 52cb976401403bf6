"""One page, to be read without a network, that lays runs and sweeps side by side, and its plots as PNG files."""

from __future__ import annotations

import base64
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ds_memopt.results import sections
from ds_memopt.results.comparison import steps, summarize
from ds_memopt.results.record import METRICS, RESULTS, first_free, read_json, read_results
from ds_memopt.results.schema import OK, CaseResult
from ds_memopt.results.sections import Failure, Run

PAGE = "index.html"
GENERATOR = "ds-memopt report"  # what a former report is known by


@dataclass(frozen=True)
class _Case:
    """A run that was wanted. sweep, result: as in `Run`."""

    folder: Path
    name: str
    sweep: Path | None = None
    result: CaseResult | None = None


def write_report(given: list[Path], output: Path | None = None) -> Path:
    """Read runs and sweeps, and write the report's folder; returns the path of the page.

    output: by default `report` in the folder of the only sweep, else the first free of runs/report-1, runs/report-2,
    ... A former report there is replaced. Damaged lines of runs and sweeps are left out, and told on stderr and on the
    page. ValueError for a folder that is neither a run nor a sweep, if no run can be read, and if `output` holds
    something else than a report.
    """
    given = [folder.resolve() for folder in given]
    damaged: list[str] = []
    cases = list({case.folder: case for folder in given for case in _cases(folder, damaged)}.values())
    output = (output or _default_output(given)).resolve()
    _check_output(output)
    runs, failures = _read(cases, damaged)
    for line in damaged:
        print(f"left out: {line}", file=sys.stderr)
    loader = jinja2.PackageLoader("ds_memopt", "results")
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                  lstrip_blocks=True).get_template("report.html.jinja")  # fmt: skip
    parts = list(sections.all_sections(runs, failures))
    images = {part.image_name: part.image for part in parts if part.image}
    page = template.render(
        generator=GENERATOR,
        title=", ".join(folder.name for folder in given[:3]) + (", ..." if len(given) > 3 else ""),
        sections=parts,
        failures=failures,
        damaged=damaged,
        runs=runs,
        commands=[(run.name, _command(run)) for run in runs],
        data={name: base64.b64encode(image).decode() for name, image in images.items()},
    )
    _write(output, {PAGE: page.encode(), **images})
    return output / PAGE


def _cases(folder: Path, damaged: list[str]) -> list[_Case]:
    """The run in a folder, or the cases of the sweep in it."""
    if not (folder / RESULTS).exists():
        if not (folder / METRICS).exists():
            raise ValueError(
                f"{folder} is neither the folder of a run nor that of a sweep: it has no {METRICS} and no {RESULTS}; "
                "name the --output_dir of a run or of a sweep"
            )
        return [_Case(folder, folder.name)]
    results = read_results(folder, damaged)
    if not results:
        raise ValueError(f"{folder / RESULTS} has no whole line yet: wait until the sweep has finished a case")
    return [_Case(folder / (result.get("folder") or name), name, folder, result) for name, result in results.items()]


def _read(cases: list[_Case], damaged: list[str]) -> tuple[list[Run], list[Failure]]:
    runs, failures = [], []
    for case, name in zip(cases, _names(cases), strict=True):
        try:
            if case.result and case.result["status"] != OK:
                status, reason = case.result["status"], case.result.get("reason")
                failures.append(Failure(name, case.sweep, case.result, status, reason))
            else:
                runs.append(_read_run(case, name, damaged))
        except ValueError as error:
            failures.append(Failure(name, case.sweep, case.result, "cannot be read", str(error)))
    if not runs and all(failure.sweep is None for failure in failures):
        raise ValueError("; ".join(failure.reason for failure in failures))
    return runs, failures


def _read_run(case: _Case, name: str, damaged: list[str]) -> Run:
    environment = case.folder / "environment.json"
    return Run(
        name=name,
        sweep=case.sweep,
        result=case.result,
        rows=steps(case.folder, damaged),
        summary=summarize(case.folder, []),
        settings=read_json(case.folder / "resolved_config.json"),
        environment=read_json(environment) if environment.exists() else {},
    )


def _names(cases: list[_Case]) -> list[str]:
    """Cases by their own names; those that share one, by their paths as far as they differ."""
    count = Counter(case.name for case in cases)
    above = os.path.commonpath([case.folder.parent for case in cases])
    return [case.name if count[case.name] == 1 else os.path.relpath(case.folder, above) for case in cases]


def _command(run: Run) -> str:
    command = run.result.get("command") if run.result else None
    command = command or run.environment.get("command")
    return shlex.join(command) if command else "-"


def _default_output(given: list[Path]) -> Path:
    if len(given) == 1 and (given[0] / RESULTS).exists():
        return given[0] / "report"
    return first_free("runs/report")


def _check_output(output: Path) -> None:
    """Refuse to overwrite what no report wrote."""
    if not output.exists():
        return
    page = output / PAGE
    entries = list(output.iterdir()) if output.is_dir() else [output]
    made_by_us = page.is_file() and f'content="{GENERATOR}"' in page.read_text(errors="replace")
    others = [entry.name for entry in entries if not (made_by_us and (entry == page or entry.suffix == ".png"))]
    if others or output.is_file():
        raise ValueError(
            f"--output {output} exists and is not a former report (it holds {', '.join(sorted(others)[:3])}): "
            "choose another folder"
        )


def _write(output: Path, files: dict[str, bytes]) -> None:
    """Write aside, then rename: a reader never sees half a report."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=output.parent) as aside:
            new = Path(aside) / output.name
            new.mkdir()
            for name, content in files.items():
                (new / name).write_bytes(content)
            if output.exists():
                shutil.rmtree(output)
            os.rename(new, output)
    except OSError as error:
        raise ValueError(f"cannot write --output {output}: {error.strerror}; choose another folder") from error
