"""Compare runs of launch/pretrain.py or finetune.py: python launch/compare.py runs/a runs/b --plot loss.png"""

import argparse
import sys
from pathlib import Path

from ds_memopt.results.comparison import plot, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="their output folders")
    parser.add_argument("--plot", type=Path, default=Path("loss.png"), help="PNG to write")
    arguments = parser.parse_args()
    try:
        print(table(arguments.runs))
        plot(arguments.runs, arguments.plot)
    except ValueError as error:
        sys.exit(f"ValueError: {error}")
    print(f"\nloss curves: {arguments.plot.resolve()}")


if __name__ == "__main__":
    main()
