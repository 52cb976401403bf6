"""`ds-memopt doctor` tells what a machine has, and what will not work without the rest."""

from __future__ import annotations

import deepspeed
import torch
from spawn import run_script

from ds_memopt import doctor
from ds_memopt.engines.private_names import check_private_names


def findings(**environment: str) -> dict[str, str]:
    """Each line that it prints: {name: found}; {name + " without": what does not work}."""
    done = run_script("ds_memopt.cli", "doctor", **environment)
    assert done.returncode == 0, done.stderr
    results, name = {}, ""
    for line in done.stdout.splitlines():
        if line.startswith(("ok  ", "--  ")):
            name, _, found = line[4:].partition(": ")
            results[name] = found
        elif line.startswith("      "):
            results[f"{name} without"] = line.strip()
    results["last"] = done.stdout.splitlines()[-1]
    return results


def test_a_machine_that_runs_these_tests_has_what_they_need():
    found = findings()
    assert found["torch"].startswith(torch.__version__) and found["DeepSpeed"] == deepspeed.__version__
    for name in ("Python", "torch", "DeepSpeed", "C++ compiler", "DeepSpeed's operators", "Libraries"):
        assert f"{name} without" not in found
    assert ("GPUs without" in found) == (not torch.cuda.is_available())
    assert found["Kernels, cpp"] == "steps on cpu: fused" and "Kernels, cpp without" not in found
    assert found["Kernels, triton"].startswith("steps on cuda: ")
    amiss = sum("without" in name for name in found)
    assert found["last"] == (f"{amiss} of these will keep something from working." if amiss else "All is there.")


def test_what_is_not_there_is_told(tmp_path):
    """Without any command, and with an empty cache, in which a compiled function could be."""
    found = findings(PATH="", CXX="no-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert found["C++ compiler"] == "no no-compiler"
    assert "cannot build its operators" in found["C++ compiler without"]
    assert "MeZO and Addax make their noise without it" in found["torch.compile without"]
    assert found["Kernels, cpp"] == "steps on cpu: not here"
    assert found["Kernels, cpp without"].startswith("Steps on cpu are made by plain PyTorch, which is slower: ")
    assert "install mpirun" in found["MPI without"] and "starts no other machine" in found["pdsh without"]


def test_the_word_for_kernels_is_looked_at(monkeypatch):
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "plain")
    assert all("but DS_MEMOPT_KERNELS=plain" in one.found for one in doctor._kernels())
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "cuda")
    (finding,) = doctor._kernels()
    assert "DS_MEMOPT_KERNELS=cuda is out of range" in finding.without


def test_what_the_environment_costs_on_a_gpu_is_told():
    plain = list(doctor._variables({}))
    assert [one.name for one in plain] == ["PyTorch's allocator", "NCCL"] and not any(one.without for one in plain)
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in plain[0].found
    given = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_ALGO": "Ring", "NCCL_SOCKET_IFNAME": "eth0"}
    allocator, nccl, connections = doctor._variables(given | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    assert allocator.found == "expandable_segments:True" and nccl.found == "NCCL_ALGO=Ring"
    assert "Unset them" in nccl.without and "Unset it" in connections.without


def test_a_lock_that_nobody_holds_is_told(tmp_path, monkeypatch):
    """DeepSpeed would wait for ever; while a process compiles, it is right to."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert doctor._operators() == (
        "DeepSpeed's operators", f"cpu_adam compiled in {tmp_path}, the others when they are first used", ""
    )  # fmt: skip
    lock = tmp_path / "cpu_adam" / "lock"
    with lock.open("w"):
        assert not doctor._operators().without
    assert doctor._operators().without.startswith(f"A compilation that was killed left {lock}, for which")


def test_a_deepspeed_that_is_not_there_or_another_is_told(monkeypatch):
    import deepspeed.runtime.engine as engine

    monkeypatch.setattr(doctor, "_version", lambda package: None)
    missing = doctor._deepspeed()
    assert missing.found == "not installed" and "methods as a word in a ds_config" in missing.without
    monkeypatch.undo()
    monkeypatch.delattr(engine.DeepSpeedEngine, "_ds_memopt_registered", raising=False)
    check_private_names.cache_clear()  # another test may have registered in this process
    monkeypatch.delattr(engine.DeepSpeedEngine, "_configure_zero_optimizer")
    other = doctor._deepspeed()
    assert "lacks DeepSpeedEngine._configure_zero_optimizer, which ds_memopt needs" in other.without
