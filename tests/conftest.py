"""The order of the files: two processes take one after another, so the longest come first and none is left alone."""

from __future__ import annotations

LONGEST_FIRST = (
    "test_exactness", "test_ipsgd", "test_plan", "test_train_multirank", "test_peak", "test_lockstep", "test_launchers",
    "test_finetune", "test_zeroth", "test_sweep", "test_features", "test_names", "test_rotation", "test_every_method",
    "test_engines", "test_compile", "test_badam", "test_noise", "test_checkpoints", "test_documents", "test_processes",
    "test_doctor", "test_directions", "test_resume",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
