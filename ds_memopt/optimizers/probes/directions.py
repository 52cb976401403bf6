"""In which directions a zeroth-order step probes and moves: all of them, or those that a variant of MeZO picks.

Every direction is a function of seed, step, probe, name and element, and of the clean weights: it is made again
wherever it is needed, and no rank has to tell another.

Sources: LeZO (arXiv 2410.09823), SubZero (arXiv 2410.08989), Sparse-MeZO (arXiv 2402.15751).
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_memopt import kernels
from ds_memopt.blocks import bare_name, full_shape, partition_into_blocks
from ds_memopt.optimizers.base.hyper_parameters import (
    CHECKED_BY_ITS_USER,
    HyperParameters,
    check_range,
    hyper_parameter,
    integer,
    real,
)
from ds_memopt.optimizers.probes.noise import Noise
from ds_memopt.shards import InPlaceShards

BINS = 2**15
"""Magnitudes are told apart by exponent and 7 bits of mantissa, as bf16 has them."""


@dataclass(frozen=True, kw_only=True)
class DirectionHyperParameters(HyperParameters):
    """What picks directions: LeZO, SubZero and Sparse-MeZO, see `Directions`."""

    layer_fraction: float = hyper_parameter(
        1.0, real("(0, 1]", "1.0 is plain MeZO."), "LeZO: share of the layers, drawn anew in each step, that has noise."
    )
    rank: int = hyper_parameter(
        0, integer(0, None, "0 is plain MeZO."), "SubZero: rank of the noise of a matrix; 0 is full noise."
    )
    refresh_every: int = hyper_parameter(
        1000, integer(1, None, "Try 1000."), "SubZero: steps after which the noise's subspace is drawn anew."
    )
    magnitude_fraction: float = hyper_parameter(
        1.0,
        real("(0, 1]", "1.0 is plain MeZO."),
        "Sparse-MeZO: share of each matrix's weights, the smallest, that has noise.",
    )
    layers: list[list[str]] | None = hyper_parameter(
        None,
        CHECKED_BY_ITS_USER,
        "LeZO: the names of each layer's parameters; None: what the model's structure tells.",
    )


LAYERS = 'Name the parameters of each layer, as layers=[["first.weight", "first.bias"], ["second.weight"]].'


@dataclass
class Directions:
    """z of any step and probe.

    kind, seed, compiled: of the noise, see `Noise`.
    picked: LeZO: in each step a share of the layers, drawn anew, has noise; so has all that is in no layer. The others
        stay where they are but for weight decay, which knows no layers.
        SubZero: for matrices z = sqrt(R C) / rank * U Z V^T, with U [R, rank] and V [C, rank] orthonormal and drawn
        anew every `refresh_every` steps, Z [rank, rank] in every step. Other ranks and placements agree to fp32
        rounding of the product, not bit for bit.
        Sparse-MeZO: of each matrix only the smallest weights have noise, up to the magnitude below which this share of
        them lay at the first step. Where that is 0, as in LoRA's B, all have noise: weights that start at zero would
        leave the mask with their first step, and nothing would train from then on.

    Raises ValueError for layers that are empty, or name a parameter that does not train or
    one twice; and where layer_fraction < 1 finds no layers.
    """

    model: nn.Module
    names: Mapping[torch.Tensor, str]
    kind: str
    seed: int
    compiled: bool
    picked: DirectionHyperParameters
    thresholds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = self.picked.layers
        self.shapes = {name: full_shape(p) for p, name in self.names.items()}
        if self.layers is not None:
            self._check_layers()
        elif self.picked.layer_fraction < 1:
            self.layers = self._find_layers()
        # Of this instance: a cache of the class would keep the model alive. One entry for each step of the momentum.
        self.skipped = functools.lru_cache(maxsize=512)(self.skipped)
        self._bases: dict[tuple[str, torch.device], dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def _check_layers(self) -> None:
        layers, lists = self.layers, (list, tuple)
        filled = isinstance(layers, lists) and layers and all(isinstance(layer, lists) and layer for layer in layers)
        limit = "a list with a list of parameter names for each layer, none of them empty"
        check_range("layers", layers, filled, limit, LAYERS)
        layers = self.layers = [[self._bare(name) for name in layer] for layer in layers]
        seen = set()
        example = f"one of the {len(self.shapes)} parameters that train, such as {next(iter(self.shapes))!r}"
        for number, layer in enumerate(layers):
            for name in layer:
                known = isinstance(name, str) and name in self.shapes
                check_range(f"layers[{number}]", name, known, example, "Use the names of model.named_parameters().")
                check_range(f"layers[{number}]", name, name not in seen, "listed once", "Leave it in one layer.")
                seen.add(name)

    def _bare(self, name: Any) -> Any:
        """A wrapped model's names are as good."""
        return bare_name(name, self.model) if isinstance(name, str) and name not in self.shapes else name

    def _find_layers(self) -> list[list[str]]:
        try:
            blocks = partition_into_blocks(self.model, self.names.values()).blocks
        except ValueError as error:
            cause = str(error).split(". ")[0]  # its remedy is an option of another method
            raise ValueError(f"layer_fraction={self.picked.layer_fraction} needs layers. {cause}. {LAYERS}") from error
        return [list(names) for names in blocks.values()]

    def add_(
        self, target: torch.Tensor, weights: torch.Tensor, name: str, start: int, step: int, probe: int, scale: float
    ) -> None:
        """target += scale * z, for the elements of parameter `name` from `start` on; weights: the same, unperturbed."""
        if name in self.skipped(step):
            return
        if self.are_full(name):
            self._noise(step, probe).add_(target, name, start, scale)
            return
        threshold = self.thresholds.get(name, 0)
        z = torch.zeros_like(target, dtype=torch.float32)
        if self._has_low_rank(name):
            z.add_(self._low_rank(name, start, len(target), step, probe, target.device), alpha=scale)
        else:
            self._noise(step, probe).add_(z, name, start, scale)
        if threshold:
            z.mul_(magnitude_bins(weights) <= threshold)
        target.add_(z)

    def perturb(
        self, copy: torch.Tensor, weights: torch.Tensor, name: str, step: int, probe: int, scale: float
    ) -> None:
        """copy <- weights + scale * z, for a whole parameter, 1-D."""
        if self.are_full(name) and name not in self.skipped(step):
            self._noise(step, probe).add(weights, name, 0, scale, out=copy)
        else:
            copy.copy_(weights)
            self.add_(copy, weights, name, 0, step, probe, scale)

    def are_full(self, name: str) -> bool:
        """Whether z of a parameter is its noise as it is, in a step that does not skip it."""
        return not self._has_low_rank(name) and not self.thresholds.get(name, 0)

    def source(self, name: str, step: int, probe: int) -> kernels.NoiseSource:
        """The noise of a parameter."""
        return self._noise(step, probe).source(name)

    def choose_thresholds(self, shards: InPlaceShards) -> None:
        """Look at the weights, once, before the first step. A collective where ranks hold parts."""
        if self.picked.magnitude_fraction == 1 or self.thresholds:
            return
        parts = {part.name: part.elements for part in shards.parts()}
        for parameter, name in self.names.items():  # the same on every rank, also where one holds nothing of it
            if len(self.shapes[name]) < 2:
                continue
            bins = magnitude_bins(parts[name]) if name in parts else torch.zeros(0, dtype=torch.int32)
            counts = torch.bincount(bins, minlength=BINS).to(parameter.device, torch.float64)
            shards.sum_of_parts(counts)
            below = counts.cumsum(0)
            self.thresholds[name] = int(torch.searchsorted(below, self.picked.magnitude_fraction * below[-1]))

    def skipped(self, step: int) -> frozenset[str]:
        """The parameters that have no noise in this step."""
        if self.picked.layer_fraction == 1:
            return frozenset()
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed}, layers, {step}".encode()))
        order = torch.randperm(len(self.layers), generator=generator, device="cpu").tolist()
        left_out = order[math.ceil(self.picked.layer_fraction * len(self.layers)) :]
        return frozenset(name for number in left_out for name in self.layers[number])

    def _has_low_rank(self, name: str) -> bool:
        return self.picked.rank > 0 and len(self.shapes[name]) == 2

    def _noise(self, step: int, probe: int) -> Noise:
        return Noise(self.seed, step, probe, self.kind, self.compiled)

    def _low_rank(
        self, name: str, start: int, length: int, step: int, probe: int, device: torch.device
    ) -> torch.Tensor:
        rows, columns = self.shapes[name]
        rank = min(self.picked.rank, rows, columns)
        left, right = self._bases_of(name, rank, step // self.picked.refresh_every, device)
        middle = self._noise(step, probe).values(name, 0, rank * rank, device).view(rank, rank)
        first, last = start // columns, -(-(start + length) // columns)
        product = left[first:last] @ middle @ right.T * (math.sqrt(rows * columns) / rank)
        return product.flatten()[start - first * columns :][:length]

    def _bases_of(self, name: str, rank: int, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """U and V of a window of `refresh_every` steps. Only the newest window's stay, and what is asked for after it:
        momentum looks back."""
        held = self._bases.setdefault((name, device), {})
        if number not in held:
            if number > max(held, default=-1):
                held.clear()
            noise = Noise(self.seed, number, 0, "gaussian")
            sides = zip(("rows", "columns"), self.shapes[name], strict=True)
            drawn = [noise.values(f"{name}, {side}", 0, size * rank, device).view(size, rank) for side, size in sides]
            held[number] = tuple(torch.linalg.qr(side).Q for side in drawn)
        return held[number]


class NoiseTerms(NamedTuple):
    """The sum of factor * z over terms (step, probe, factor), for parameter `name` from element `start` on."""

    directions: Directions
    name: str
    start: int
    terms: Sequence[tuple[int, int, float]]

    def sources(self) -> list[tuple[kernels.NoiseSource, float]] | None:
        """The noise behind each term and its factor; None where it is not full."""
        if not self.directions.are_full(self.name):
            return None
        return [
            (self.directions.source(self.name, step, probe), factor)
            for step, probe, factor in self.terms
            if self.name not in self.directions.skipped(step)
        ]

    def add_(self, direction: torch.Tensor, weights: torch.Tensor, start: int) -> None:
        """Add it to a direction of elements that begin `start` after the first, and hold these weights."""
        for step, probe, factor in self.terms:
            self.directions.add_(direction, weights, self.name, self.start + start, step, probe, factor)


def magnitude_bins(weights: torch.Tensor) -> torch.Tensor:
    """The bits of |weight| as bf16 cuts them off, which grow with it; 0 to BINS - 1."""
    return weights.float().abs().view(torch.int32) >> 16
