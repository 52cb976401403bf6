"""The order of the files, and what the collector of garbage may leave alone."""

from __future__ import annotations

import gc

# Two processes take one file after another: with the longest first none is left alone.
LONGEST_FIRST = (
    "test_exactness", "test_ipsgd", "test_plan", "test_train_multirank", "test_peak", "test_lockstep", "test_launchers",
    "test_finetune", "test_zeroth", "test_sweep", "test_features", "test_names", "test_rotation", "test_every_method",
    "test_engines", "test_compile", "test_badam", "test_noise", "test_checkpoints", "test_documents", "test_processes",
    "test_doctor", "test_directions", "test_resume",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is imported: it took a tenth of the time of tests in one process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
