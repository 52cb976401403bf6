"""Write a small fine-tuning task from the source text of Python's standard library: train.jsonl and valid.jsonl.

    python launch/experiments/make_task.py --output_dir runs/task

A row is a line of code that ends with ")", and the question is what follows: ":" as in `def area(self)`, or the end of
the line as in `self.area(2)`. Half of the rows are of either kind. Validation rows come from the files that
launch/pretrain.py holds out of `--data stdlib`, and no line is in both files. The same on every run.

    python launch/experiments/make_task.py --output_dir runs/long_task --long_tail 480

With --long_tail a prompt begins with lines that stand before that one in its file: of few bytes in most rows, of up to
so many in some. Validation rows are then sorted by length, so that batches of them have little padding.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

from ds_memopt.train.data.corpus import is_held_out, stdlib_files

CHOICES = (":", "\n")
SHORT_CONTEXT = 32  # bytes, of the shortest contexts


class Line(NamedTuple):
    """before: the end of the file's text up to the line. ends: what follows the line, wherever it stands."""

    before: str
    ends: set[str]


def read_lines(root: Path, longest: int, long_tail: int) -> dict[bool, dict[str, Line]]:
    """Held out or not -> line up to its last ")". Lines are stripped, of `longest` characters at most, ASCII alone; one
    that is followed by ":" here and by its end there is left out."""
    found: dict[bool, dict[str, Line]] = {False: {}, True: {}}
    for name in stdlib_files(root):
        before = ""
        for text in (root / name).read_text("latin-1").splitlines(keepends=True):
            line = text.strip()
            kept, end = (line[:-1], ":") if line.endswith("):") else (line, "\n")
            if kept.endswith(")") and kept.isascii() and len(kept) <= longest and not kept.startswith("#"):
                found[is_held_out(name)].setdefault(kept, Line(before, set())).ends.add(end)
            before = (before + text)[-long_tail:] if long_tail and text.isascii() else ""
    train, held_out = ({key: line for key, line in found[part].items() if len(line.ends) == 1} for part in found)
    return {False: {key: line for key, line in train.items() if key not in found[True]}, True: held_out}


def choose_rows(lines: dict[str, Line], limit: int, long_tail: int) -> list[dict]:
    """As many rows of either kind, `limit` together at most, in an order that looks random."""
    kinds = [sorted(key for key, line in lines.items() if end in line.ends) for end in CHOICES]
    count = min(limit // 2, *map(len, kinds))
    draw = random.Random(0)
    rows = [
        {"prompt": _context(lines[key].before, long_tail, draw) + key, "completion": end, "choices": list(CHOICES)}
        for end, kind in zip(CHOICES, kinds, strict=True)
        for key in draw.sample(kind, count)
    ]
    draw.shuffle(rows)
    return rows


def _context(before: str, long_tail: int, draw: random.Random) -> str:
    """Whole lines from the end of `before`: half as many rows have twice as much of it."""
    length = min(long_tail, int(SHORT_CONTEXT * draw.paretovariate(1.0))) if long_tail else 0
    lines = before[len(before) - length :].splitlines(keepends=True)
    return "".join(lines if len(before) <= length else lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--longest", type=int, default=24, help="characters of a line")
    parser.add_argument("--long_tail", type=int, default=0, help="bytes of context that the longest prompts begin with")
    parser.add_argument("--train_rows", type=int, default=8000, help="at most")
    parser.add_argument("--validation_rows", type=int, default=400, help="at most")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    lines = read_lines(Path(sysconfig.get_path("stdlib")), arguments.longest, arguments.long_tail)
    for held_out, name, limit in ((False, "train", arguments.train_rows), (True, "valid", arguments.validation_rows)):
        rows = choose_rows(lines[held_out], limit, arguments.long_tail)
        if held_out and arguments.long_tail:
            rows.sort(key=lambda row: len(row["prompt"]))
        path = arguments.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
