"""Write a small fine-tuning task from the source text of Python's standard library: train.jsonl and valid.jsonl.

    python launch/make_task.py --output_dir runs/task

A row is a line of code that ends with ")", and the question is what follows: ":" as in `def area(self)`, or the end of
the line as in `self.area(2)`. Half of the rows are of either kind. Validation rows come from the files that
launch/pretrain.py holds out of `--data stdlib`, and no line is in both files. The same on every run.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from pathlib import Path

from ds_memopt.train.data import is_held_out, stdlib_files

CHOICES = (":", "\n")


def read_lines(root: Path, longest: int) -> dict[bool, dict[str, str]]:
    """Held out or not -> line up to its last ")" -> what follows. Lines are stripped, of `longest` characters at most,
    ASCII alone; one that is followed by either is left out."""
    follows: dict[bool, dict[str, set[str]]] = {False: {}, True: {}}
    for name in stdlib_files(root):
        for line in (root / name).read_bytes().splitlines():
            line = line.strip()
            kept, end = (line[:-1], ":") if line.endswith(b"):") else (line, "\n")
            if kept.endswith(b")") and kept.isascii() and len(kept) <= longest and not kept.startswith(b"#"):
                follows[is_held_out(name)].setdefault(kept.decode(), set()).add(end)
    train, held_out = (
        {line: ends.copy().pop() for line, ends in follows[part].items() if len(ends) == 1} for part in (False, True)
    )
    return {False: {line: end for line, end in train.items() if line not in follows[True]}, True: held_out}


def choose_rows(lines: dict[str, str], most: int) -> list[dict]:
    """As many rows of either kind, `most` together at most, in an order that looks random."""
    kinds = [sorted(line for line, end in lines.items() if end == kind) for kind in CHOICES]
    count = min(most // 2, *map(len, kinds))
    draw = random.Random(0)
    rows = [
        {"prompt": line, "completion": end, "choices": list(CHOICES)}
        for end, kind in zip(CHOICES, kinds, strict=True)
        for line in draw.sample(kind, count)
    ]
    draw.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--longest", type=int, default=24, help="characters of a prompt")
    parser.add_argument("--train_rows", type=int, default=8000, help="at most")
    parser.add_argument("--validation_rows", type=int, default=400, help="at most")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    lines = read_lines(Path(sysconfig.get_path("stdlib")), arguments.longest)
    for held_out, name, most in ((False, "train", arguments.train_rows), (True, "valid", arguments.validation_rows)):
        rows = choose_rows(lines[held_out], most)
        path = arguments.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
