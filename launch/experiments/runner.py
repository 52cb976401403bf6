"""Many runs of the jobs of launch/, each a single process, some at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ds_memopt.results.comparison import summarize
from ds_memopt.results.record import METRICS

LAUNCH = Path(__file__).resolve().parent.parent


class Trial(NamedTuple):
    """name: of its folder. script: of launch/. config: for DeepSpeed. options: of the script."""

    name: str
    script: str
    config: dict[str, Any]
    options: list[str]


def load_config(name: str, **params: Any) -> dict[str, Any]:
    """A file of ds_configs with some of the optimizer's params changed."""
    config = json.loads((LAUNCH.parent / "ds_configs" / f"{name}.json").read_text())
    config["optimizer"]["params"] |= params
    return config


class Runner:
    """Runs some at a time, in folders of `folder`. Runs that have finished are kept and not run again; others go on
    from their newest checkpoint, if they have saved one."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder, self._jobs = folder, jobs

    def run(self, trials: list[Trial]) -> list[Path]:
        """Their folders."""
        with ThreadPoolExecutor(self._jobs) as pool:
            return list(pool.map(self._one, trials))

    def _one(self, trial: Trial) -> Path:
        folder = self._folder / trial.name
        if (folder / "done").exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ds_config.json").write_text(json.dumps(trial.config, indent=2))
        begun = any(folder.glob("checkpoints/*"))
        if not begun:
            (folder / METRICS).unlink(missing_ok=True)  # of a run that did not finish
        command = [sys.executable, LAUNCH / trial.script, "--deepspeed_config", folder / "ds_config.json"]
        command += ["--output_dir", folder, *trial.options, *(["--resume"] if begun else [])]
        threads = str(max(1, (os.cpu_count() or 1) // self._jobs))
        with open(folder / "log.txt", "a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
        (folder / "done").touch()
        print(f"{trial.name}: {summarize(folder).validation_loss:.4f}", flush=True)
        return folder
