"""Which back end computes a call: `plain` (PyTorch), `cpp` (CPU) or `triton` (GPU)."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ds_memopt.kernels.noise_formulas import NoiseSource
from ds_memopt.kernels.packed import Storage
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.plain_gwt import GWTRule, GWTScalars
from ds_memopt.kernels.work import Blocks, Runs, Tensors, Work

if TYPE_CHECKING:
    from ds_memopt.kernels.stored_weights import Moved, Step

logger = logging.getLogger("ds_memopt")

VARIABLE = "DS_MEMOPT_KERNELS"


@dataclass(frozen=True, eq=False)
class GWTCall:
    """A step of the groups x of a wavelet transform; see `ds_memopt.optimizers.gwt`. Its halves are

        advance:  M <- M + (1 - beta1) * (mean(x) - M)
                  v <- v + (1 - beta2) * (mean(x^2) - v), where it is not that of a block
        with      u  = (x - mean(x) + M / correction) / (sqrt(v) / root + eps)
        advance:  norms[matrix] = sum(u^2) / numel, with a limiter
        apply:    p <- p * decay - step_size * u / growth
        with      growth = max(sqrt(norms[matrix]) / max(n, 1), limiter) / limiter, or 1 without a limiter

    mean(x) = sum(x) / period. Of a run with a slot mean(x) and mean(x^2) are sums[slot] (the latter only where it is
    needed), and sum(u^2) is its share by elements: with d = sqrt(v) / root + eps, width / size of

        size * (mean(x^2) + shift^2) / d^2 + 2 * shift * sum(x) / d^2,    shift = M / correction - mean(x)

    states: by the names of `ds_memopt.optimizers.GWT`; v is "second_moment", or "block_exp_avg_sq" at a run's `outer`,
    and n is "update_norm", one for each interval. groups: their runs. dense: runs of what is not transformed.
    sums: [slots, 1 or 2]; norms: [places], if there is a limiter; memory until a function sets them. storage: how
    parameters and states are kept, if some are in fewer bits; those in codes are kept by `finish_as_kept` alone.
    kept: what a back end derives for the functions that follow.

    Between the halves a back end may leave in p what it likes.
    """

    parameters: Tensors
    gradients: Tensors
    states: Mapping[str, Tensors]
    groups: Work
    dense: Runs
    rule: GWTRule
    scalars: Mapping[int, GWTScalars]
    sums: torch.Tensor
    norms: torch.Tensor | None
    storage: Storage | None = None
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def by_block(self) -> bool:
        """Whether the second moments are those of blocks, which have advanced before."""
        return "block_exp_avg_sq" in self.states

    @property
    def waits_for_scales(self) -> bool:
        """Whether states can be kept only when all ranks know the scales."""
        return self.storage is not None and bool(self.storage.new_scales)

    @property
    def in_halves(self) -> bool:
        """Whether `apply` of groups must wait for what ranks share; else it follows `advance` at once."""
        return self.norms is not None or self.waits_for_scales


class BackEnd(Protocol):
    """What a fused back end offers; on a GPU every function is one launch for each combination of dtypes.

    Tensors are this rank's elements or entries, 1-D and contiguous, by their number in the call. Scalars say which
    tensors move, or else gradients: runs of others are left alone. Empty runs and empty tensors are welcome.
    slots: [slots, width], what ranks share of cut blocks, see `Runs`.
    Functions `..._as_kept` step on weights and states as a `Storage` keeps them, and those of a `GWTCall` do.
    """

    def check(self) -> None:
        """Make it ready. Raises RuntimeError with the reason where it cannot run here."""

    def reason_against(self, tensors: list[torch.Tensor]) -> str:
        """What it lacks for a call on these tensors; "" if nothing."""

    def sum_cut_squares(self, gradients: Tensors, runs: Runs, slots: torch.Tensor) -> None:
        """slots[slot, 0] <- (sum of a cut run's squares) / size; 0 where this rank has none with a gradient."""

    def adam_mini(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
        mean_squares: torch.Tensor | None,
    ) -> None:
        """Adam with one second moment per block. mean_squares: slots of cut blocks; None: each run is a whole block."""

    def adam_by_element(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
    ) -> None:
        """Adam with one second moment per element, at the runs' entries."""

    def adam_mini_as_kept(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        blocks: Blocks,
        scalars: Mapping[int, AdamScalars],
        storage: Storage,
    ) -> None:
        """The whole step of `calls.adam_mini` on what is kept in fewer bits: several launches, and its collectives, the
        sums of cut blocks and then the maxima of cut groups, as where this is unpacked."""

    def adam_by_element_as_kept(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        blocks: Blocks,
        scalars: Mapping[int, AdamScalars],
        storage: Storage,
    ) -> None:
        """The same of `calls.adam_by_element`; the maxima of each state in turn."""

    def advance_second_moments(
        self,
        gradients: Tensors,
        second_moments: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
        mean_squares: torch.Tensor | None,
    ) -> None:
        """v <- v + (1 - beta2) * (mean square - v) of each block. mean_squares: as in `adam_mini`."""

    def sum_cut_groups(self, call: GWTCall) -> None:
        """sums[slot] <- a cut run's (sum of x) / period, and (sum of x^2) / size where there is room, or zeros."""

    def step_whole_groups(self, call: GWTCall) -> None:
        """Whole groups, `advance` where a call is in halves and else both; and Adam on what is not transformed, which
        waits for scales as they do."""

    def step_cut_groups(self, call: GWTCall) -> None:
        """The same of cut groups, once `sums` are complete. With a limiter norms <- this rank's part, or zeros."""

    def apply_groups(self, call: GWTCall) -> None:
        """`apply` of all groups, and n <- |u| / growth, once `norms` and new scales are complete."""

    def finish_as_kept(self, call: GWTCall) -> None:
        """Of a call with a storage all that is left, once `norms` are complete; in the place of `apply_groups`. Its
        collectives are the maxima of cut groups, of each state in turn."""

    def add_noise(
        self,
        out: torch.Tensor,
        weights: torch.Tensor | None,
        source: NoiseSource,
        start: int,
        scale: float,
    ) -> None:
        """As `kernels.add_noise`, to the bit; out and weights in fp32, or in bf16."""

    def move(self, steps: Sequence[Step]) -> Moved:
        """As `kernels.move`, the weights to the bit; weights and gradients in fp32 and bf16. Returns what it moved."""


class _Offer(NamedTuple):
    """A module that offers a `BackEnd`, and the type of the devices that it is for."""

    module: str
    device: str


BACK_ENDS = {"cpp": _Offer("ds_memopt.kernels.cpp", "cpu"), "triton": _Offer("ds_memopt.kernels.gpu", "cuda")}

COLUMNS = "blocks of columns, as weights have that are stored [in, out]"


def status() -> dict[str, str]:
    """For each fused back end why it cannot run here; "" where it can."""
    return {name: _load(name)[1] for name in BACK_ENDS}


def chosen_kernels() -> str | None:
    """The back end that DS_MEMOPT_KERNELS names. Raises ValueError for another word."""
    word = os.environ.get(VARIABLE) or None
    if word not in (None, "plain", *BACK_ENDS):
        raise ValueError(
            f"{VARIABLE}={word} is out of range: it must be {', '.join(BACK_ENDS)} or plain. Unset it to take the "
            "fastest one."
        )
    return word


def back_end_for(device: torch.device) -> BackEnd | None:
    """The fused back end for tensors of a device, or None for plain PyTorch.

    Raises RuntimeError where DS_MEMOPT_KERNELS names one that cannot run here or is not for the device.
    """
    word = chosen_kernels()
    if word == "plain" or device.type == "meta":  # where nothing is computed
        return None
    name = next((name for name, offer in BACK_ENDS.items() if offer.device == device.type), None)
    if word == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        name = word  # its interpreter takes tensors of any device
    if word not in (None, name):
        raise RuntimeError(
            f"{VARIABLE}={word} is for tensors on {BACK_ENDS[word].device}, but these are on {device.type}. Unset it."
        )
    if name is None:
        return None
    back_end, reason = _load(name)
    if reason and word is not None:
        raise RuntimeError(f"{VARIABLE}={word} cannot run here: {reason}")
    if reason:
        _say_once(logging.WARNING, f"Steps on {device.type} are made by plain PyTorch, which is slower: {reason}")
    return back_end


def back_end_of(work: Work | None, *tensors: Tensors, uncovered: str = COLUMNS) -> BackEnd | None:
    """The fused back end for a call, or None for plain PyTorch. uncovered: why no back end covers it without `work`."""
    every = [tensor for of_call in tensors for tensor in of_call.values()]
    back_end = back_end_for(every[0].device) if every else None
    if back_end is None:
        return None
    if reason := uncovered if work is None else back_end.reason_against(every):
        tell_of_plain(reason)
        return None
    return back_end


def tell_of_plain(reason: str) -> None:
    """Say once what a fused back end lacks, for which plain PyTorch takes its place."""
    _say_once(logging.INFO, f"Some steps are made by plain PyTorch, which is slower: fused ones lack {reason}.")


@functools.cache
def _load(name: str) -> tuple[BackEnd | None, str]:
    """A back end, or why it cannot run here."""
    try:
        back_end = importlib.import_module(BACK_ENDS[name].module)
        back_end.check()
    except (ImportError, RuntimeError) as error:
        return None, str(error)
    return back_end, ""


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)
