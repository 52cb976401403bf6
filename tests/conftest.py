"""The order of the files: two processes take one after another, so the longest come first and none is left alone."""

from __future__ import annotations

LONGEST_FIRST = (
    "test_exactness", "test_ipsgd", "test_peak", "test_plan", "test_zeroth", "test_launchers", "test_train_multirank",
    "test_finetune", "test_features", "test_sweep", "test_processes", "test_rotation", "test_every_method",
    "test_engines", "test_lockstep", "test_directions", "test_resume", "test_checkpoints",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
