"""Compiles the C++ files of this folder into one shared library, at first use, and loads it.

The files are plain C++ behind C functions on raw pointers: no header of PyTorch, so that compiling takes seconds.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent

# No contraction of a * b + c into one rounding: else an element's result would depend on whether the compiler put it
# into a vector or into the rest of a loop, and so on where it lies.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions of all files.

    Raises RuntimeError with the reason and the remedy where they cannot be compiled or loaded.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    file = _folder() / f"kernels_{_key(compiler)}.so"
    try:
        if not file.exists():
            _compile(compiler, file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise RuntimeError(f"{file} cannot be written or loaded: {error}. Set TORCH_EXTENSIONS_DIR.") from error


def _folder() -> Path:
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(extensions) / "ds_memopt" if extensions else Path.home() / ".cache" / "ds_memopt"


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cpp"))


def _key(compiler: list[str]) -> str:
    """Of all that the compiled code depends on. Machines that differ may share a folder."""
    version = _run([*compiler, "--version"])
    parts = [*compiler, *FLAGS, version, _processor(), torch.__version__]
    contents = [path.read_bytes() for path in [*_sources(), *sorted(FOLDER.glob("*.h"))]]
    return hashlib.sha256(b"\0".join([*map(str.encode, parts), *contents])).hexdigest()[:16]


def _processor() -> str:
    """Its name and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features")))


def _compile(compiler: list[str], file: Path) -> None:
    """Aside, then renamed: several ranks may compile at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as aside:
        _run([*compiler, *FLAGS, "-c", *map(str, _sources())], aside)
        objects, built = [f"{path.stem}.o" for path in _sources()], Path(aside) / file.name
        link = [*compiler, "-shared", *objects, "-o", built.name]
        _run(link, aside)
        try:
            # PyTorch's OpenMP runtime, if this process has it for all to see: a second one would have threads of its
            # own, which wait for work while the first one's do it.
            ctypes.CDLL(str(built))
        except OSError:
            _run([*link, "-fopenmp"], aside)
        built.rename(file)


def _run(command: list[str], folder: str | None = None) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        remedy = "Install a C++ compiler (Debian, Ubuntu: apt-get install g++), or set CXX to one."
        raise RuntimeError(f"no C++ compiler {command[0]!r}: {error.strerror}. {remedy}") from error
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[-300:])
        remedy = "It must know C++17, OpenMP and this processor: set CXX to another one."
        raise RuntimeError(f"the C++ compiler {command[0]!r} failed: {first} {remedy}") from error
