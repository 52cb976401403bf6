"""The order of the files, and what the collector of garbage may leave alone."""

from __future__ import annotations

import gc

# Processes take one file after another: with the longest first none is left alone.
LONGEST_FIRST = (
    "test_plan", "test_exactness", "test_portable_job", "test_portable", "test_lockstep", "test_ipsgd", "test_peak",
    "test_features", "test_train_multirank", "test_launchers", "test_zeroth", "test_processes", "test_engines",
    "test_sweep", "test_rotation", "test_storage", "test_resume", "test_finetune", "test_every_method", "test_names",
    "test_examples", "test_noise", "test_triton", "test_compile", "test_checkpoints", "test_badam", "test_launches",
    "test_doctor", "test_documents", "test_wide_state", "test_length_batches", "test_gpu_check", "test_model_speed",
    "test_corpus", "test_measure", "test_stored_weights_kernels", "test_output_folder", "test_packed_kernels",
    "test_train", "test_trajectory", "test_directions", "test_report", "test_addax", "test_house",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is imported: it took a tenth of the time of tests in one process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
