"""Run a script that cannot be edited, with our methods registered:

    deepspeed --num_gpus 8 --module ds_memopt.run their_script.py --their --options

The script sees its own sys.argv, as if the launcher had started it, `--local_rank` included.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import ds_memopt
from ds_memopt.engines.processes import fail, remove_abandoned_shared_memory


def main(arguments: list[str]) -> None:
    """Register, then run the first argument that is no option as `__main__`, with all the others as its own."""
    place = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), None)
    if place is None or not Path(arguments[place]).is_file():
        given = "no script" if place is None else f"{arguments[place]!r}, which is no file"
        raise ValueError(f"ds_memopt.run was given {given}. Usage: deepspeed --module ds_memopt.run SCRIPT [OPTIONS]")
    script = arguments.pop(place)
    ds_memopt.register()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_abandoned_shared_memory()
    sys.argv = [script, *arguments]
    # Python puts a script's folder first on the path; runpy.run_path does not for a plain file.
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
