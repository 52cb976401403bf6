"""Which back end computes a call: `plain` (PyTorch), `cpp` (CPU) or `triton` (GPU)."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from ds_memopt.kernels.noise_formulas import NoiseSource
from ds_memopt.kernels.packed import Storage
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.plain_gwt import GWTScalars
from ds_memopt.kernels.work import Runs, Tensors, Work

if TYPE_CHECKING:
    from ds_memopt.kernels.stored_weights import Moved, Step

logger = logging.getLogger("ds_memopt")

VARIABLE = "DS_MEMOPT_KERNELS"


class BackEnd(Protocol):
    """What a fused back end offers; every function is one launch.

    Tensors are this rank's elements or entries, 1-D and contiguous, by their number in the call. Scalars say which
    tensors move, or else gradients: runs of others are left alone. Empty runs and empty tensors are welcome.
    slots: [slots, width], what ranks share of cut blocks, see `Runs`.
    TAKES_STORAGE: whether `adam_mini` and `adam_by_element` take weights and states as a `Storage` keeps them, and
    there is `measure_shared_groups`.
    """

    TAKES_STORAGE: bool

    def check(self) -> None:
        """Make it ready. Raises RuntimeError with the reason where it cannot run here."""

    def reason_against(self, tensors: list[torch.Tensor]) -> str:
        """What it lacks for a call on these tensors; "" if nothing."""

    def add_mean_squares(self, gradients: Tensors, runs: Runs, slots: torch.Tensor) -> None:
        """slots[slot, 0] += (sum of a run's squares) / size. runs: of cut blocks."""

    def adam_mini(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
        mean_squares: torch.Tensor | None,
        storage: Storage | None = None,
    ) -> None:
        """Adam with one second moment per block. mean_squares: slots of cut blocks; None: each run is a whole block.

        storage: its `new_scales` hold those of shared groups already, and get the others.
        """

    def adam_by_element(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
        storage: Storage | None = None,
    ) -> None:
        """Adam with one second moment per element, at the runs' entries. storage: as in `adam_mini`."""

    def measure_shared_groups(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors | None,
        work: Work,
        scalars: Mapping[int, AdamScalars],
        storage: Storage,
    ) -> None:
        """Raise `storage.new_scales`, zeros, of groups of codes that do not lie in one part of the step that follows.

        second_moments: of elements; None: that step is `adam_mini`.
        """

    def add_mean_squares_of_blocks(self, gradients: Tensors, runs: Runs, mean_squares: Tensors) -> None:
        """mean_squares[tensor][block] += (sum of a run's squares) / size. runs: of whole and cut blocks."""

    def advance_denominators(
        self, second_moments: Tensors, mean_squares: Tensors, scalars: Mapping[int, AdamScalars]
    ) -> None:
        """v <- v + (1 - beta2) * (mean square - v), and mean_squares <- sqrt(v) / root + eps, for each block."""

    def adam_by_denominator(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        denominators: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
    ) -> None:
        """Adam with the denominators given, one per block; moments at the runs' entries."""

    def add_group_sums(self, gradients: Tensors, runs: Runs, period: int, slots: torch.Tensor) -> None:
        """slots[slot, 0] += (sum of a run) / period, and slots[slot, 1], if it is there, as in `add_mean_squares`."""

    def gwt(
        self,
        parameters: Tensors,
        gradients: Tensors,
        approximations: Tensors,
        second_moments: Tensors | None,
        denominators: Tensors | None,
        runs: Runs,
        period: int,
        scalars: Mapping[int, GWTScalars],
        sums: torch.Tensor,
        norms: torch.Tensor | None,
        *,
        advance: bool,
        apply: bool,
    ) -> None:
        """A step of the groups x of a wavelet transform, or half of one; see `ds_memopt.optimizers.gwt`.

            advance:  M <- M + (1 - beta1) * (mean(x) - M)
                      v <- v + (1 - beta2) * (mean(x^2) - v), where there are no denominators
            with      u  = (x - mean(x) + M / correction) / d,     d = sqrt(v) / root + eps, or denominators[outer]
            advance:  norms[matrix] += sum(u^2) / numel, if norms are given
            apply:    p <- p * decay - step_size * u / norms[matrix], or / 1 without norms

        mean(x) = sum(x) / period. Of a run with a slot mean(x) and mean(x^2) are sums[slot] (the latter only where it
        is needed), and sum(u^2) is its share by elements: with u as above, width / size of

            size * (mean(x^2) + shift^2) / d^2 + 2 * shift * sum(x) / d^2,    shift = M / correction - mean(x)

        second_moments, denominators: one of them is None. Between the halves a back end may leave in p what it likes.
        norms: [places], at `advance` zeros, at `apply` what `turn_into_growths` leaves.
        """

    def turn_into_growths(self, norms: torch.Tensor, update_norms: Tensors, runs: Runs, limiter: float) -> None:
        """With r = sqrt(norm), n = update_norm: growth = max(r / max(n, 1), limiter) / limiter, n <- r / growth.

        norms: [places], mean squares; overwritten with growths. update_norms: n at a run's `block`.
        runs: whole parameters, each a block; its place in norms is `matrix`. Those of other tensors are left alone.
        """

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


def back_end_of(
    work: Work | None, *tensors: Tensors, uncovered: str = COLUMNS, storage: Storage | None = None
) -> BackEnd | None:
    """The fused back end for a call, or None for plain PyTorch. uncovered: why no back end covers it without `work`.

    storage: None, too, where the back end cannot take the tensors as they are kept.
    """
    every = [tensor for of_call in tensors for tensor in of_call.values()]
    back_end = back_end_for(every[0].device) if every else None
    if back_end is None or (storage is not None and not back_end.TAKES_STORAGE):
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
