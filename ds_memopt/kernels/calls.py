"""What a method calls: each function goes to the back end that computes it fastest where its tensors lie.

A fused back end sums first what ranks share; while these sums travel it does what does not need them.

storage: how the step's weights and states are kept, if some are in fewer bits. Such states are then handed over as they
are kept, and `storage.states` has their names of `ds_memopt.optimizers`. Where no back end takes them so, they are
unpacked here.
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_memopt.kernels import plain, plain_gwt
from ds_memopt.kernels.back_ends import COLUMNS, BackEnd, GWTCall, back_end_of
from ds_memopt.kernels.packed import Storage
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.plain_gwt import GWTRule, GWTScalars
from ds_memopt.kernels.work import Blocks, Tensors, Work


def adam_mini(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
    storage: Storage | None = None,
) -> None:
    """Adam with one second moment per block. A collective where ranks share blocks, or groups of codes."""
    tensors = parameters, gradients, moments, second_moments
    fused = back_end_of(blocks.work, *tensors)
    if storage is not None:
        if fused is not None:
            fused.adam_mini_as_kept(*tensors, blocks, scalars, storage)
            return
        with storage.unpacked(parameters, {"exp_avg": moments}) as (masters, states):
            adam_mini(masters, gradients, states["exp_avg"], second_moments, blocks, scalars)
        return
    if fused is None:
        mean_squares = blocks.mean_squares(gradients)
        blocks.complete(mean_squares)
        plain.adam_mini(parameters, gradients, moments, second_moments, mean_squares, blocks.pieces, scalars)
        return
    slots = blocks.new_slots(1)
    if blocks.num_slots:
        fused.sum_cut_squares(gradients, blocks.work.cut, slots)
    wait = blocks.begin_sum(slots)
    fused.adam_mini(*tensors, blocks.work.whole, scalars, None)
    wait()
    if len(blocks.work.cut):
        fused.adam_mini(*tensors, blocks.work.cut, scalars, slots)


def adam_by_element(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
    storage: Storage | None = None,
) -> None:
    """Adam as it is: one second moment per element. Each block of `blocks` is one element.

    A collective where ranks share groups of codes.
    """
    tensors = parameters, gradients, moments, second_moments
    fused = back_end_of(blocks.work, *tensors)
    if fused is None and storage is not None:
        with storage.unpacked(parameters, {"exp_avg": moments, "exp_avg_sq": second_moments}) as (masters, states):
            adam_by_element(masters, gradients, states["exp_avg"], states["exp_avg_sq"], blocks, scalars)
    elif fused is None:
        plain.adam_by_element(*tensors, blocks.pieces, scalars)
    elif storage is not None:
        fused.adam_by_element_as_kept(*tensors, blocks, scalars, storage)
    else:
        fused.adam_by_element(*tensors, blocks.work.whole, scalars)


def gwt(
    parameters: Tensors,
    gradients: Tensors,
    states: Mapping[str, Tensors],
    blocks: Mapping[str, Blocks],
    rule: GWTRule,
    scalars: Mapping[int, GWTScalars],
    storage: Storage | None = None,
) -> None:
    """A step of GWT. A collective where ranks share groups, blocks, or matrices whose update is limited.

    states: those of `ds_memopt.optimizers.GWT` by its names. blocks: "group"; "matrix", whole parameters; "dense",
    elements of what is not transformed; and with one second moment per row or head "block", these, of all parameters.
    """
    work = None if rule.paper else _gwt_work(blocks)
    uncovered = 'variant="paper" of GWT' if rule.paper else COLUMNS
    tensors = parameters, gradients, *states.values()
    fused = back_end_of(work and work[0], *tensors, uncovered=uncovered)
    if fused is None and storage is not None:
        with storage.unpacked(parameters, states) as (masters, unpacked):
            gwt(masters, gradients, unpacked, blocks, rule, scalars)
    elif fused is None:
        plain_gwt.gwt(parameters, gradients, states, blocks, rule, scalars)
    else:
        _fused_gwt(fused, parameters, gradients, states, blocks, rule, scalars, *work, storage)


def _gwt_work(blocks: Mapping[str, Blocks]) -> tuple[Work, Work] | None:
    """The runs of groups, and those of what is not transformed."""
    outer, dense = blocks.get("block"), blocks["dense"]
    groups = blocks["group"].work_within(blocks["matrix"], outer)
    packed = (outer or dense).packed_work(dense)
    return (groups, packed) if groups is not None and packed is not None else None


def _fused_gwt(
    fused: BackEnd,
    parameters: Tensors,
    gradients: Tensors,
    states: Mapping[str, Tensors],
    blocks: Mapping[str, Blocks],
    rule: GWTRule,
    scalars: Mapping[int, GWTScalars],
    work: Work,
    dense_work: Work,
    storage: Storage | None,
) -> None:
    groups, matrices, outer = blocks["group"], blocks["matrix"], blocks.get("block")
    limited = rule.limiter is not None
    sums = groups.new_slots(1 if outer is not None and not limited else 2)
    norms = matrices.new_places() if limited else None
    call = GWTCall(parameters, gradients, states, work, dense_work.all, rule, scalars, sums, norms, storage)
    if groups.num_slots:
        fused.sum_cut_groups(call)
    wait = groups.begin_sum(sums)
    if outer is not None:
        dense = {number: step.dense for number, step in scalars.items()}
        _advance_second_moments(fused, gradients, states["block_exp_avg_sq"], outer, dense)
    fused.step_whole_groups(call)
    wait()
    if limited or len(work.cut):
        fused.step_cut_groups(call)
    if limited:
        matrices.begin_sum(norms.narrow(0, 0, matrices.num_slots))()
    if storage is not None:
        fused.finish_as_kept(call)
    elif limited:
        fused.apply_groups(call)


def _advance_second_moments(
    fused: BackEnd, gradients: Tensors, second_moments: Tensors, blocks: Blocks, scalars: Mapping[int, AdamScalars]
) -> None:
    slots = blocks.new_slots(1)
    if blocks.num_slots:
        fused.sum_cut_squares(gradients, blocks.work.cut, slots)
    wait = blocks.begin_sum(slots)
    fused.advance_second_moments(gradients, second_moments, blocks.work.whole, scalars, None)
    wait()
    if len(blocks.work.cut):
        fused.advance_second_moments(gradients, second_moments, blocks.work.cut, scalars, slots)
