"""A step of GWT in plain PyTorch: the reference for any other back end. `ds_memopt.optimizers.gwt` has the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ds_memopt.kernels import plain
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.work import Blocks, Tensors


class GWTRule(NamedTuple):
    """What all steps of a run share: elements of a group, the limit of growth, and which formula."""

    period: int
    limiter: float | None
    paper: bool


class GWTScalars(NamedTuple):
    """One tensor's step: p <- p * decay - step_size * (x - mean(x) + M / correction) / (sqrt(v) / root + eps) / L,

    then p <- p * last_decay. dense: Adam's of what is not transformed; its beta1, beta2, eps, decay and root hold for
    all. first: whether it is the tensor's first step.
    """

    dense: AdamScalars
    correction: float
    step_size: float
    last_decay: float
    first: bool


class _Sums(NamedTuple):
    """By number of tensor: sum(x) / k and mean(x^2) of groups, mean(x^2) of blocks; the last two where needed."""

    means: dict[int, torch.Tensor]
    energies: dict[int, torch.Tensor]
    squares: dict[int, torch.Tensor]


class _Update(NamedTuple):
    """One tensor's update (x + shift) * inverse, per group of gradient elements x.

    denominators: with base="adam_mini" those of all blocks, of dense parameters too.
    """

    shift: torch.Tensor
    inverse: torch.Tensor
    denominators: torch.Tensor | None


def gwt(
    parameters: Tensors,
    gradients: Tensors,
    states: Mapping[str, Tensors],
    blocks: Mapping[str, Blocks],
    rule: GWTRule,
    scalars: Mapping[int, GWTScalars],
) -> None:
    """A step of GWT, see `kernels.gwt`."""
    # Together where ranks must add up their parts, else one by one: the temporary tensors are smaller by far.
    together = any(structure.num_slots for structure in blocks.values())
    for numbers in [list(scalars)] if together else [[number] for number in scalars]:
        of_call = {number: gradients[number] for number in numbers}
        sums = _sums(of_call, blocks, rule)
        updates = {number: _advance(number, states, blocks, rule, scalars[number], sums) for number in numbers}
        if rule.limiter is not None:
            _limit(states, blocks, rule, scalars, sums, updates)
        _apply(parameters, of_call, blocks, scalars, updates)
        _apply_dense(parameters, of_call, states, blocks, scalars, updates)
        for number in numbers:
            if scalars[number].last_decay != 1:
                parameters[number].mul_(scalars[number].last_decay)


def _sums(gradients: Tensors, blocks: Mapping[str, Blocks], rule: GWTRule) -> _Sums:
    groups = blocks["group"]
    means = groups.new_blocks(gradients)
    plain.add_means(gradients, groups.pieces, means, size=rule.period)
    # The paper's v and limiter look at sum(x) only.
    if rule.paper or ("block" in blocks and rule.limiter is None):
        energies = {}
        groups.complete(means)
    else:
        energies = groups.mean_squares(gradients)
        groups.complete(means, energies)
    squares = {}
    if "block" in blocks:
        squares = blocks["block"].mean_squares(gradients)
        blocks["block"].complete(squares)
    return _Sums(means, energies, squares)


def _advance(
    number: int,
    states: Mapping[str, Tensors],
    blocks: Mapping[str, Blocks],
    rule: GWTRule,
    step: GWTScalars,
    sums: _Sums,
) -> _Update:
    """Advance the state of one tensor's groups and blocks."""
    mean, dense = sums.means[number], step.dense
    m = states["approximation"][number].lerp_(mean, 1 - dense.beta1)
    if "block" in blocks:
        v = states["block_exp_avg_sq"][number].lerp_(sums.squares[number], 1 - dense.beta2)
    else:
        # A^2 is k times the squared mean.
        square = mean.square().mul_(rule.period) if rule.paper else sums.energies[number]
        v = states["second_moment"][number].lerp_(square, 1 - dense.beta2)
    shift = torch.sub(m / step.correction if step.correction != 1 else m, mean)
    denominator = dense.denominator(v)
    if "block" in blocks:
        return _Update(shift, _spread(denominator, blocks, number).reciprocal_(), denominator)
    return _Update(shift, denominator.reciprocal_(), None)


def _spread(per_block: torch.Tensor, blocks: Mapping[str, Blocks], number: int) -> torch.Tensor:
    """Each group's block's value. A group never lies in two blocks: these are whole rows, or rows of a head."""
    counts, total = blocks["block"].count_within(number, blocks["group"])
    # With the sum of the counts at hand nothing is read back from the device.
    return torch.repeat_interleave(per_block, counts, output_size=total)


def _limit(
    states: Mapping[str, Tensors],
    blocks: Mapping[str, Blocks],
    rule: GWTRule,
    scalars: Mapping[int, GWTScalars],
    sums: _Sums,
    updates: dict[int, _Update],
) -> None:
    """Divide each matrix's update as L says. Overwrites the sums.

    All stays on the device: nothing is read back.
    """
    norms = _square_norms(states, blocks, rule, sums, updates)
    blocks["matrix"].complete(norms)
    growths = {}
    for number in updates:
        norm, previous = norms[number].clamp_(min=0).sqrt_(), states["update_norm"][number]
        growth = norm / (previous + 1e-8 if rule.paper else previous.clamp(min=1))
        growth.clamp_(min=rule.limiter).div_(rule.limiter)
        if rule.paper and scalars[number].first:
            growth.fill_(1.0)
        previous.copy_(norm / growth)
        growths[number] = growth
    inverses = {number: update.inverse for number, update in updates.items()}
    plain.divide_blocks(inverses, growths, blocks["group"].pieces)


def _square_norms(
    states: Mapping[str, Tensors],
    blocks: Mapping[str, Blocks],
    rule: GWTRule,
    sums: _Sums,
    updates: dict[int, _Update],
) -> dict[int, torch.Tensor]:
    """For each matrix, the part of its update's squared norm, or mean square, that lies on this rank.

    Of a group that ranks share each adds its share by elements, so that together they add it once.
    """
    groups, matrices = blocks["group"], blocks["matrix"]
    for number, update in updates.items():
        inverse = update.inverse
        if rule.paper:
            # |u|^2 = k * (M / denominator)^2 of each group.
            torch.mul(states["approximation"][number], inverse, out=sums.means[number]).square_()
        else:
            # sum((x + shift)^2) of a group of c elements is c * (mean(x^2) + shift^2) + 2 * shift * sum(x).
            sums.energies[number].addcmul_(update.shift, update.shift).mul_(inverse).mul_(inverse)
            sums.means[number].mul_(update.shift).mul_(inverse).mul_(inverse).mul_(2)
    terms = [(sums.means, rule.period)] if rule.paper else [(sums.energies, None), (sums.means, rule.period)]
    sizes = {}
    for number in updates:
        numels = matrices.numels(number)
        sizes[number] = [1] * len(numels) if rule.paper else numels
    norms = matrices.new_blocks(updates)
    plain.add_sums_of_blocks(norms, terms, groups.pieces, sizes)
    return norms


def _apply(
    parameters: Tensors,
    gradients: Tensors,
    blocks: Mapping[str, Blocks],
    scalars: Mapping[int, GWTScalars],
    updates: dict[int, _Update],
) -> None:
    inverses = {number: update.inverse for number, update in updates.items()}
    shifts = {number: update.shift.mul_(update.inverse) for number, update in updates.items()}
    decays = {number: scalars[number].dense.decay for number in updates}
    factors = {number: -scalars[number].step_size for number in updates}
    pieces = blocks["group"].pieces
    plain.add_scaled_and_shifted(parameters, gradients, inverses, shifts, pieces, decays, factors)


def _apply_dense(
    parameters: Tensors,
    gradients: Tensors,
    states: Mapping[str, Tensors],
    blocks: Mapping[str, Blocks],
    scalars: Mapping[int, GWTScalars],
    updates: dict[int, _Update],
) -> None:
    """Adam, or Adam-mini, on the parameters that are not transformed."""
    m, dense = states["exp_avg"], blocks["dense"]
    of_dense = {number: scalars[number].dense for number in updates}
    if "block" in blocks:
        denominators = {number: update.denominators for number, update in updates.items()}
        pieces = blocks["block"].packed_as(dense)
        plain.adam_by_block(parameters, gradients, m, denominators, pieces, of_dense)
    else:
        v = states["exp_avg_sq"]
        plain.adam_by_element(parameters, gradients, m, v, dense.packed_as(dense), of_dense)
