"""What a method calls: each function goes to the back end that computes it fastest where its tensors lie.

A fused back end sums first what ranks share; while these sums travel it does what does not need them.

storage: how the step's weights and states are kept, if some are in fewer bits. Such states are then handed over as they
are kept, and `storage.states` has their names of `ds_memopt.optimizers`. Where no back end takes them so, they are
unpacked here.
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_memopt.kernels import plain, plain_gwt
from ds_memopt.kernels.back_ends import COLUMNS, BackEnd, back_end_of
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
    fused = back_end_of(blocks.work, parameters, gradients, moments, second_moments, storage=storage)
    if fused is None and storage is not None:
        with storage.unpacked(parameters, {"exp_avg": moments}) as (masters, states):
            adam_mini(masters, gradients, states["exp_avg"], second_moments, blocks, scalars)
        return
    if fused is None:
        mean_squares = blocks.mean_squares(gradients)
        blocks.complete(mean_squares)
        plain.adam_mini(parameters, gradients, moments, second_moments, mean_squares, blocks.pieces, scalars)
        return
    tensors = parameters, gradients, moments, second_moments
    slots = blocks.new_slots(1)
    if len(blocks.work.cut):
        fused.add_mean_squares(gradients, blocks.work.cut, slots)
    wait = blocks.begin_sum(slots)
    if storage is not None:
        fused.measure_shared_groups(parameters, gradients, moments, None, blocks.work, scalars, storage)
        storage.complete_new_scales()
    kept = () if storage is None else (storage,)
    fused.adam_mini(*tensors, blocks.work.whole, scalars, None, *kept)
    wait()
    if len(blocks.work.cut):
        fused.adam_mini(*tensors, blocks.work.cut, scalars, slots, *kept)
    if storage is not None:
        storage.keep_new_scales()


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
    fused = back_end_of(blocks.work, *tensors, storage=storage)
    if fused is None and storage is not None:
        with storage.unpacked(parameters, {"exp_avg": moments, "exp_avg_sq": second_moments}) as (masters, states):
            adam_by_element(masters, gradients, states["exp_avg"], states["exp_avg_sq"], blocks, scalars)
    elif fused is None:
        plain.adam_by_element(*tensors, blocks.pieces, scalars)
    elif storage is None:
        fused.adam_by_element(*tensors, blocks.work.whole, scalars)
    else:
        fused.measure_shared_groups(*tensors, blocks.work, scalars, storage)
        storage.complete_new_scales()
        fused.adam_by_element(*tensors, blocks.work.whole, scalars, storage)
        storage.keep_new_scales()


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
    if storage is not None:  # no back end takes them as they are
        with storage.unpacked(parameters, states) as (masters, unpacked):
            gwt(masters, gradients, unpacked, blocks, rule, scalars)
        return
    work = None if rule.paper else _gwt_work(blocks)
    uncovered = 'variant="paper" of GWT' if rule.paper else COLUMNS
    fused = back_end_of(work and work[0], parameters, gradients, *states.values(), uncovered=uncovered)
    if fused is None:
        plain_gwt.gwt(parameters, gradients, states, blocks, rule, scalars)
    else:
        _fused_gwt(fused, parameters, gradients, states, blocks, rule, scalars, *work)


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
) -> None:
    groups, matrices, outer = blocks["group"], blocks["matrix"], blocks.get("block")
    limited = rule.limiter is not None
    sums = groups.new_slots(1 if outer is not None and not limited else 2)
    if len(work.cut):
        fused.add_group_sums(gradients, work.cut, rule.period, sums)
    wait = groups.begin_sum(sums)
    dense, m = {number: step.dense for number, step in scalars.items()}, states["exp_avg"]
    denominators = None
    if outer is None:
        fused.adam_by_element(parameters, gradients, m, states["exp_avg_sq"], dense_work.all, dense)
    else:
        denominators = outer.new_blocks(gradients)
        fused.add_mean_squares_of_blocks(gradients, outer.work.all, denominators)
        outer.complete(denominators)
        fused.advance_denominators(states["block_exp_avg_sq"], denominators, dense)
        fused.adam_by_denominator(parameters, gradients, m, denominators, dense_work.all, dense)
    wait()
    norms = matrices.new_places() if limited else None
    tensors = parameters, gradients, states["approximation"], states.get("second_moment"), denominators
    step = *tensors, work.all, rule.period, scalars, sums, norms
    fused.gwt(*step, advance=True, apply=not limited)
    if limited:
        matrices.begin_sum(norms.narrow(0, 0, matrices.num_slots))()
        fused.turn_into_growths(norms, states["update_norm"], matrices.work_within(matrices, None).all, rule.limiter)
        fused.gwt(*step, advance=False, apply=True)
