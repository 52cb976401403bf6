"""The command `ds-memopt`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, or 2 with one line on stderr for a user's mistake."""
    parser = argparse.ArgumentParser(prog="ds-memopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("replay", help="rebuild the weights of a MeZO run from its trajectory")
    command.add_argument("base", type=Path, help="weights before the first step: a file or a Hugging Face folder")
    command.add_argument("trajectory", type=Path, help="the file that the run wrote")
    command.add_argument("out", type=Path, help="where to write the weights after the last step")
    given = parser.parse_args(arguments)
    try:
        _replay(given)
    except ValueError as error:
        print(f"ds-memopt {given.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _replay(given: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ds_memopt.replay import replay

    steps = replay(given.base, given.trajectory, given.out, partial(tqdm, unit="step", disable=not sys.stderr.isatty()))
    print(f"{given.out}: {steps} steps applied")


if __name__ == "__main__":
    sys.exit(main())
