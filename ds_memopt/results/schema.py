"""What a line of metrics.jsonl (of a run) and of results.jsonl (of a sweep) and environment.json hold, with units.

A key that is `NotRequired` may be absent: where its text says so, and in files of older versions. GiB is 1024**3 bytes.
"""  # no `from __future__ import annotations`: with it TypedDict would not know which keys are required

from typing import NotRequired, TypedDict

PEAKS = {"peak_allocated_gib": "allocated", "peak_rss_gib": "resident set"}
"""The peak memory of a rank: its key, on a GPU and on a CPU, and what it is."""

OK, OUT_OF_MEMORY, FAILED, TIMEOUT = "ok", "out of memory", "failed", "timeout"
"""The status of a case."""


class ValidationRow(TypedDict):
    """What every line of metrics.jsonl has. The line before the first step, which fine-tuning writes, has no more."""

    step: int
    """Optimizer steps done; 0 before training."""
    tokens: int
    """Tokens that all ranks have seen since step 0."""
    loss: float | None
    """Mean over the steps since the line before, all micro-batches and ranks, nats per token; None before training."""
    validation_loss: float | None
    """Mean over the held-out data of all ranks, nats per predicted token; None if this step had no validation."""
    validation_accuracy: NotRequired[float | None]
    """Share of held-out rows that are right, 0 to 1; None as validation_loss. Absent in pre-training."""


class MetricsRow(ValidationRow):
    """A line of metrics.jsonl after some steps. Times and speeds are means over the steps since the line before."""

    lr: NotRequired[float]
    """Learning rate of the first param group in this step."""
    active_block: NotRequired[str]
    """Name of the block that trained in this step. Absent unless the method rotates blocks."""
    update_kept: NotRequired[float | None]
    """Share of the update that rounding to the weights' dtype kept, 0 to 1; None if it is no finite number. Absent
    unless the method measures it."""
    grad_norm: NotRequired[float | None]
    """Norm of the gradient before clipping; None if it is not computed or no finite number."""

    step_ms: float
    """Wall-clock time of a step, ms."""
    tokens_per_s: float
    """Tokens of all ranks together per second."""
    tokens_per_s_per_gpu: NotRequired[float]
    """Tokens per second and rank."""
    forward_ms: NotRequired[float]
    """Of a step, ms of rank 0 in forward passes; the five times add up to its step_ms."""
    backward_ms: NotRequired[float]
    """In backward passes."""
    optimizer_ms: NotRequired[float]
    """In the optimizer's step."""
    communication_ms: NotRequired[float]
    """In collectives, or waiting for them."""
    other_ms: NotRequired[float]
    """In the rest, such as loading data."""
    save_stall_s: NotRequired[float]
    """Seconds that the steps waited for checkpoints since the line before, that of this step included, on rank 0. Of
    those written behind the steps: for the copy, for the one before, for the name."""
    mfu: NotRequired[float | None]
    """Model FLOPs utilisation, 0 to 1; None if peak or FLOPs are not known, see `measure.utilisation`."""

    peak_allocated_gib: NotRequired[float]
    """GiB that PyTorch's allocator gave out at most since the start, of the rank with most. Absent on CPU."""
    peak_reserved_gib: NotRequired[float]
    """GiB that PyTorch's allocator took from the GPU at most, likewise. Absent on CPU."""
    peak_rss_gib: NotRequired[float]
    """GiB of the process at most (resident set), of the rank with most. Absent on GPU."""
    held_gib: NotRequired[dict[str, float]]
    """GiB that rank 0 holds from step to step: "weights", "masters", "gradients", and each state of the optimizer."""

    bytes_sent_per_step: int
    """Bytes that rank 0 puts on the wire in a step, as `measure.CommunicationMeter` counts them."""
    sent_by_collective: NotRequired[dict[str, int]]
    """Of these, bytes by collective: "all_reduce", "all_gather", ..."""
    sent_by_group: NotRequired[dict[str, int]]
    """Of these, bytes by the ranks of the process group: "0-3"."""
    optimizer_state_bytes_per_parameter: float
    """Bytes of optimizer state, summed over all ranks, per parameter of the model."""


class CaseResult(TypedDict):
    """A line of results.jsonl: how one case of a sweep ended, and of one that is ok the figures, which are medians over
    the lines of its metrics.jsonl without the first where nothing else is said."""

    case: str
    """Name, "AdamW-zero2-batch4"."""
    optimizer: str
    """A type, or the path of a ds_config whose optimizer block is taken."""
    zero_stage: int
    micro_batch: int
    """Sequences per rank and forward pass."""
    options: NotRequired[str]
    """Of the job, that not all cases have, "--attention eager"."""
    status: str
    """OK, OUT_OF_MEMORY, FAILED or TIMEOUT."""
    gpus: NotRequired[int]
    """Ranks."""
    reason: NotRequired[str | None]
    """Why it is not ok; None if it is."""
    folder: NotRequired[str]
    """The run's folder, in the sweep's."""
    command: NotRequired[list[str]]
    """What ran it."""
    seconds: NotRequired[float]
    """Wall-clock time of the whole run."""

    tokens_per_s: NotRequired[float]
    """This and what follows: as in MetricsRow. Absent unless the case is ok."""
    tokens_per_s_per_gpu: NotRequired[float | None]
    step_ms: NotRequired[float | None]
    mfu: NotRequired[float | None]
    tokens_per_s_range: NotRequired[list[float]]
    """Lowest and highest tokens_per_s."""
    peak_gib: NotRequired[float]
    """The highest peak of any line."""
    peak_of: NotRequired[str]
    """What that peak is: "allocated" or "resident set"."""
    bytes_sent_per_step: NotRequired[int]
    """Of the last line."""
    optimizer_state_bytes_per_parameter: NotRequired[float]
    """Of the last line."""


class Environment(TypedDict, total=False):
    """environment.json: what is needed to run this again. Older files lack some."""

    command: list[str]
    """Of a rank, without the launcher before it."""
    world_size: int
    """Ranks."""
    process_gib: float | None
    """GiB of interpreter and libraries before the model; None on a GPU."""
    device: str
    """Name of the GPU or CPU."""
    device_type: str
    """The kind, cuda or cpu."""
    cpu_cores: int | None
    platform: str
    python: str
    """Version."""
    packages: dict[str, str]
    """Versions, by name."""
    cuda: str | None
    """Version that torch was built with; None without CUDA."""
    git_commit: str | None
    """Of this source; None if not known."""
