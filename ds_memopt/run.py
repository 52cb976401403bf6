"""Run a script, or a module, that cannot be edited, with our methods registered:

    deepspeed --num_gpus 8 --module ds_memopt.run their_script.py --their --options
    torchrun --nproc_per_node 8 -m ds_memopt.run -m their.module --their --options

It sees its own sys.argv, as if the launcher had started it, deepspeed's `--local_rank` included.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import ds_memopt
from ds_memopt.engines.processes import fail, remove_abandoned_shared_memory


def main(arguments: list[str]) -> None:
    """Register, then run the first argument that is no option as `__main__`, with all the others as its own."""
    place = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), None)
    is_module = place is not None and place > 0 and arguments[place - 1] == "-m"
    if place is None or not (_is_module(arguments[place]) if is_module else Path(arguments[place]).is_file()):
        kind = "module that Python finds" if is_module else "file"
        given = "no script" if place is None else f"{arguments[place]!r}, which is no {kind}"
        raise ValueError(
            f"ds_memopt.run was given {given}. Usage: deepspeed --module ds_memopt.run SCRIPT [OPTIONS], "
            "or -m MODULE in the place of SCRIPT"
        )
    program = arguments.pop(place)
    if is_module:
        del arguments[place - 1]
    ds_memopt.register()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_abandoned_shared_memory()
    sys.argv = [program, *arguments]
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            # Python puts a script's folder first on the path; runpy.run_path does not for a plain file.
            sys.path.insert(0, str(Path(program).resolve().parent))
            runpy.run_path(program, run_name="__main__")
    except Exception as error:
        fail(error)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package that its name starts with is missing
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
