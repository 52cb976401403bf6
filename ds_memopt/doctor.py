"""What this machine has for training with ds_memopt, and what will not work without the rest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

from ds_memopt.kernels.back_ends import BACK_ENDS, VARIABLE, chosen_kernels, status
from ds_memopt.measure import GIB


class Finding(NamedTuple):
    """One thing that was looked for. without: what does not work; empty where nothing is amiss."""

    name: str
    found: str
    without: str = ""


def examine() -> Iterator[Finding]:
    """Look at one thing after the other. Changes nothing; compiles one small function, which takes some seconds."""
    for look in (
        _python, _torch, _gpus, _deepspeed, _compiler, _compilation, _headers, _operators, _libraries, _mpi, _pdsh,
    ):  # fmt: skip
        yield look()
    yield from _kernels()
    if torch.cuda.is_available():
        yield from _variables(os.environ)


def report(show: Callable[[str], None] = print) -> int:
    """Show all findings, a line each, and what will not work; returns how many are amiss."""
    amiss = 0
    for finding in examine():
        show(f"{'--' if finding.without else 'ok'}  {finding.name}: {finding.found}")
        if finding.without:
            amiss += 1
            show(f"      {finding.without}")
    return amiss


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    tested = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python", found, "" if tested else "ds_memopt is tested with 3.11 to 3.13: install one of them.")


def _torch() -> Finding:
    return Finding(
        "torch", f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'}"
    )


def _gpus() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPUs", "none", "Training runs on the CPU, over gloo: to try things out, not to train a model.")
    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    found = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names)
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("GPUs", found, "They have no bf16, with which ds_memopt is tested: fp16 is not.")
    return Finding("GPUs", found)


def _deepspeed() -> Finding:
    missing = "Plain PyTorch and FSDP2 work; methods as a word in a ds_config, launch/ and `ds-memopt plan` do not."
    if (version := _version("deepspeed")) is None:
        return Finding("DeepSpeed", "not installed", missing)
    from ds_memopt import register

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            register()
        except RuntimeError as error:
            return Finding("DeepSpeed", version, f"{error} {missing}")
    untested = [str(warning.message) for warning in caught if "ds_memopt was tested" in str(warning.message)]
    return Finding("DeepSpeed", version, untested[0] if untested else "")


def _compiler() -> Finding:
    compiler = os.environ.get("CXX", "c++")
    if found := shutil.which(compiler):
        return Finding("C++ compiler", found)
    return Finding(
        "C++ compiler", f"no {compiler}",
        "DeepSpeed cannot build its operators: install one (Debian: g++), or set CXX.",
    )  # fmt: skip


def _compilation() -> Finding:
    from ds_memopt.kernels import NoiseSource, noise_formulas

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        noise_formulas.elements(NoiseSource("gaussian", 0, 0, 0, compiled=True), 0, 1, device)
    except RuntimeError as error:
        return Finding(
            "torch.compile", "does not work here",
            "MeZO and Addax make their noise without it, several times slower where no fused back end does: "
            f"{str(error).splitlines()[0]}",
        )  # fmt: skip
    return Finding("torch.compile", f"works on {device.type}, and gives the same bits")


def _headers() -> Finding:
    import sysconfig

    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if os.path.exists(header):
        return Finding("Python's headers", header)
    without = "DeepSpeed's operators and Triton's kernels cannot be built: install them (Debian: python3-dev)."
    return Finding("Python's headers", f"no {header}", without)


def _operators() -> Finding:
    """torch takes the file `lock` in an operator's folder for a compilation that goes on, and waits for its end."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    names = sorted({path.stem for path in folder.glob("**/*.so")})
    found = f"{', '.join(names) or 'none'} compiled in {folder}, the others when they are first used"
    for lock in folder.glob("**/lock"):
        if not _is_open(lock):
            without = f"A compilation that was killed left {lock}, for which the next one waits for ever: remove it."
            return Finding("DeepSpeed's operators", found, without)
    return Finding("DeepSpeed's operators", found)


def _is_open(file: Path) -> bool:
    """Whether a process that this one may look at holds the file open. Where that cannot be told, yes."""
    if not Path("/proc/self/fd").exists():
        return True
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it is gone, or another user's
            if descriptor.samefile(file):
                return True
    return False


def _libraries() -> Finding:
    names = ("transformers", "accelerate", "datasets")
    versions = {name: _version(name) for name in names}
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "none"
    absent = [name for name, version in versions.items() if not version]
    return Finding(
        "Libraries", found, f"launch/ needs {', '.join(absent)}: pip install -e '.[train]'." if absent else ""
    )


def _kernels() -> Iterator[Finding]:
    """Each fused back end. One that cannot run is amiss where there are tensors of its device."""
    try:
        chosen = chosen_kernels()
    except ValueError as error:
        yield Finding("Kernels", "no back end", str(error))
        return
    for name, reason in status().items():
        device = BACK_ENDS[name].device
        there = device == "cpu" or torch.cuda.is_available()
        found = f"steps on {device}: {'not here' if reason else 'fused'}"
        if chosen not in (None, name):
            found += f", but {VARIABLE}={chosen}"
        without = f"Steps on {device} are made by plain PyTorch, which is slower: {reason}" if reason and there else ""
        yield Finding(f"Kernels, {name}", f"{found}. {reason}" if reason and not there else found, without)


FOR_DEBUGGING = (
    "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE", "NCCL_ALGO", "NCCL_PROTO",
)  # fmt: skip
"""Usual ones of those that NCCL's documentation (Environment Variables, Debugging) wants out of production."""


def _variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """What the environment tells PyTorch's allocator, NCCL and CUDA."""
    allocator = environment.get("PYTORCH_ALLOC_CONF") or environment.get("PYTORCH_CUDA_ALLOC_CONF")
    advice = "PYTORCH_ALLOC_CONF=expandable_segments:True may lose less to fragments where memory is short"
    yield Finding("PyTorch's allocator", allocator or f"as it is by default; {advice}")
    given = [f"{name}={environment[name]}" for name in FOR_DEBUGGING if name in environment]
    yield Finding(
        "NCCL", ", ".join(given) or "chooses its ways by itself",
        "NCCL's documentation has these for debugging alone: they keep it from choosing what is fastest. Unset them."
        if given else "",
    )  # fmt: skip
    if environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        yield Finding(
            "CUDA_DEVICE_MAX_CONNECTIONS", "1",
            "Collectives of ZeRO and FSDP2 wait for computing, and computing for them, instead of running beside it: "
            "Megatron-LM refuses 1 with FSDP2. Unset it; tensor parallelism alone wants it.",
        )  # fmt: skip


def _mpi() -> Finding:
    command, package = shutil.which("mpirun"), _version("mpi4py")
    found = ", ".join(filter(None, (command, package and f"mpi4py {package}"))) or "none"
    absent = [name for name, there in (("mpirun", command), ("mpi4py", package)) if not there]
    without = f"`deepspeed --launcher openmpi` and mpirun do not start ranks: install {' and '.join(absent)}."
    return Finding("MPI", found, without if absent else "")


def _pdsh() -> Finding:
    if found := shutil.which("pdsh"):
        return Finding("pdsh", found)
    return Finding(
        "pdsh", "none", "`deepspeed --hostfile` starts no other machine: install it, or use another launcher."
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
