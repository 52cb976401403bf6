"""What a rank holds and sends under each kind of engine.

States are not computed by formula: the method's own optimizer makes a step on tensors that hold nothing (the meta
device), laid as ZeRO would lay them, and what it then has is counted. So is what it sends for blocks that ranks share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from ds_memopt.blocks import bare_parameters, partition_into_blocks
from ds_memopt.kernels import packed
from ds_memopt.kernels.back_ends import chosen_kernels
from ds_memopt.measure import sent_per_payload_byte, state_bytes
from ds_memopt.optimizers.base.hyper_parameters import check_range
from ds_memopt.plan import gather
from ds_memopt.plan.bytes_moved import BytesMoved
from ds_memopt.plan.planned_layout import (
    FlatPartitions,
    PlannedRank,
    PlannedRows,
    PlannedShards,
    WholeMasters,
)
from ds_memopt.shards import Seams
from ds_memopt.shards.gradients import BUCKET

ALL_REDUCE_BUCKET = 500_000_000
"""Elements of gradients that DeepSpeed joins for one all_reduce at ZeRO-0."""


@dataclass(frozen=True)
class Prediction:
    """Bytes of one rank, in a run whose states have come to be.

    weights: with buffers of the model and padding. masters: fp32 copies. gradients: held from backward to the step.
    states: of the optimizer, by key; "kept" and "residuals" are what rounding to bf16 would drop.
    backward: at most needed besides in forward and backward, activations apart: buckets, gathered and perturbed
        weights, gradients on their way. step: at most needed besides by the engine in the step; not by the rule itself.
    sent: in one step, by collective, as `ds_memopt.measure.CommunicationMeter` counts them.
    seams: of these, what completes blocks that ranks share.
    passes: forward and backward passes of a token in a step, where a forward alone is a third; None: they differ.
    step_bytes: read and written in a step by the rule, and by probes for perturbed copies of weights, with the back end
        that runs on a GPU or that DS_MEMOPT_KERNELS names; not by the engine. None: not known.
    """

    weights: int
    masters: int
    gradients: int
    states: Mapping[str, int]
    backward: int
    step: int
    sent: Mapping[str, int]
    seams: int
    passes: float | None
    step_bytes: int | None

    @property
    def held(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.masters + self.gradients + sum(self.states.values())

    def peak(self, activations: int) -> int:
        """The most bytes at any time, where forward and backward take these bytes for activations."""
        return self.held + max(self.backward + activations, self.step)


class PlannedEngine:
    """What all methods have in common: weights, and what ZeRO-3 gathers."""

    def __init__(self, optimizer: Any, model: nn.Module, place: PlannedRank, checkpointing: bool) -> None:
        self.optimizer, self.model, self.place, self.checkpointing = optimizer, model, place, checkpointing
        self.numels = {name: p.numel() for name, p in bare_parameters(model).items()}
        self.model_dtype = next(model.parameters()).dtype
        self.itemsize = self.model_dtype.itemsize
        self.payload: dict[str, int] = {}

    def send(self, collective: str, size: int) -> None:
        self.payload[collective] = self.payload.get(collective, 0) + size

    def weights(self) -> int:
        numels = self.numels.values()
        elements = sum(map(self.place.piece, numels) if self.place.stage == 3 else numels)
        return elements * self.itemsize + sum(buffer.nbytes for buffer in self.model.buffers())

    def gather(self, trained: set[str]) -> int:
        """Count what ZeRO-3 gathers in a step; returns the most bytes that are gathered at once."""
        if self.place.stage < 3 or self.place.count == 1:
            return 0
        self.owners, zero = gather.owners_of(self.model, _layers(self.model)), self.place.zero
        stays = gather.persistent(self.owners, zero)
        gathered, most, left = list(stays.values()), 0, []  # these are gathered anew after each step
        for visits in self.passes(trained):
            some, live = gather.play(visits, stays, zero.max_reuse_distance, left)
            gathered, most = gathered + some, max(most, live)
            # Backward leaves its last module gathered, until the step, where no gradient goes on from there.
            left = visits[-1:] if visits[0] is visits[-1] else []
        self.send("all_gather", sum(map(self.place.padded, gathered)) * self.itemsize)
        return (sum(stays.values()) + most + min(zero.prefetch_bucket_size, sum(self.numels.values()))) * self.itemsize

    def passes(self, trained: set[str]) -> list[list[gather.Owner]]:
        """The order in which modules run, in each of the passes between which ZeRO-3 releases all weights."""
        return [gather.forward(self.owners) + gather.backward(self.owners, trained, self.checkpointing)]

    def prediction(self, *, states: Mapping[str, int], seams: int, **sizes: int) -> Prediction:
        count = self.place.count
        sent = {name: round(size * sent_per_payload_byte(name, count)) for name, size in self.payload.items()}
        seams = round(seams * sent_per_payload_byte("all_reduce", count))
        sent = {name: size for name, size in sent.items() if size}
        return Prediction(
            states=states, seams=seams, sent=sent, passes=self.optimizer.passes, step_bytes=self.step_bytes(), **sizes
        )

    def step_bytes(self) -> int | None:
        """With fused kernels, unless the user wants plain PyTorch."""
        return None if chosen_kernels() == "plain" else self.optimizer.step_bytes()


class PlannedZero(PlannedEngine):
    """Of the methods for which ZeRO lays flat partitions."""

    def predict(self) -> Prediction:
        place, dtype, bucket = self.place, self.itemsize, self.bucket()
        residuals = self.residuals()
        trained = set(self.optimizer.names_by_tensor().values())
        groups = self.members()
        numel = sum(size for members in groups for _, size in members)
        most = self.gather(trained)
        without_masters = self.optimizer.steps_on_bf16(vars(self.optimizer.hyper))
        held_in = self.model_dtype if without_masters else torch.float32
        layout = FlatPartitions(groups, place, held_in) if place.stage else WholeMasters(self.optimizer)
        seams = self._step(layout)
        flats = [flat for group in layout.by_group for flat in group]
        held, largest = sum(flat.numel() for flat in flats), max(flat.numel() for flat in flats)
        weights = self.weights()
        if place.stage == 0:
            self.send("all_reduce", numel * dtype)
            backward, step = min(numel, ALL_REDUCE_BUCKET) * dtype, held * 4
        elif place.stage == 3:
            self.send("reduce_scatter", sum(place.padded(size) for members in groups for _, size in members) * dtype)
            backward, step = (bucket + min(bucket, numel)) * dtype + most, largest * held_in.itemsize
        else:
            self.send("all_reduce", numel * dtype)
            self.send("all_gather", held * place.count * dtype)
            weights += (held * place.count - numel) * dtype
            buckets = bucket * (2 if place.zero.overlap_comm else 1) + min(bucket, numel)
            backward, step = buckets * dtype, largest * (dtype if without_masters else 4 + dtype)
            if place.stage == 1 and not place.zero.overlap_comm:
                backward += numel * dtype  # nothing is reduced before backward has ended
        has_masters = (place.stage > 0 or dtype < 4) and not without_masters
        return self.prediction(
            weights=weights,
            masters=held * 4 if has_masters else 0,
            gradients=layout.gradient_elements * dtype,
            states=state_bytes(self.optimizer) | residuals,
            backward=backward,
            step=step if has_masters or without_masters else 0,
            seams=seams,
        )

    def bucket(self) -> int:
        """Elements of ZeRO's bucket for gradients."""
        return self.place.zero.reduce_bucket_size

    def members(self) -> list[list[tuple[str | None, int]]]:
        """Each param group's parameters; a name of None: of no interval."""
        return [[(name, self.numels[name]) for name in group["param_names"]] for group in self.optimizer.param_groups]

    def residuals(self) -> dict[str, int]:
        """What the method keeps beside the states of what trains now."""
        return {}

    def step_bytes(self) -> int | None:
        """Where no kernel is fused, what PyTorch's operators move."""
        fused = super().step_bytes()
        return self.of_operators if fused is None else fused

    def _step(self, layout: FlatPartitions | WholeMasters | PlannedRows) -> int:
        """Make a step with all states; returns the bytes that are summed over the ranks."""
        optimizer, sums = self.optimizer, []
        for group, tensors in zip(optimizer.param_groups, layout.by_group, strict=True):
            group["params"] = tensors
            for tensor in tensors:
                tensor.grad = torch.empty_like(tensor) if tensor.grad is None else tensor.grad
        optimizer.bind(layout)

        def begin(_: Seams, slots: torch.Tensor) -> Callable[[], None]:
            return lambda: sums.append(slots.nbytes)

        with mock.patch.multiple(Seams, begin_sum=begin, begin_max=begin):
            with (
                mock.patch.object(packed, "rounding_bits", _no_bits),
                mock.patch.object(packed.Segment, "scales_of", _no_places),
            ):
                optimizer.step()  # which makes the states
            if super().step_bytes() is None:  # no kernel is fused
                sums.clear()
                with (
                    BytesMoved() as counted,
                    mock.patch.object(packed, "rounding_bits", _once_for_each_size(counted)),
                ):
                    optimizer.step()
                self.of_operators = counted.total
        if sums:
            self.send("all_reduce", sum(sums))
        return sum(sums)


class PlannedFsdp2(PlannedZero):
    """Of the methods that step on the rows of weights. dtype: in which these are gathered. reduce_once: whether
    gradients are kept whole until the last micro-batch of a step."""

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module,
        place: PlannedRank,
        checkpointing: bool,
        dtype: torch.dtype,
        reduce_once: bool,
        replicas: int,
    ) -> None:
        super().__init__(optimizer, model, place, checkpointing)
        self.gathered_itemsize, self.reduce_once, self.replicas = dtype.itemsize, reduce_once, replicas

    def predict(self) -> Prediction:
        optimizer, place = self.optimizer, self.place
        rows = {name: place.piece_of_rows(p.shape) for name, p in bare_parameters(self.model).items()}
        layout = PlannedRows(optimizer, place)
        trained = set(optimizer.names_by_tensor().values())
        *layers, root = self._units()
        layers = [{name: rows[name] for name in unit} for unit in layers]
        root = {name: rows[name] for name in root}
        in_layers, in_root = sum(sum(unit.values()) for unit in layers), sum(root.values())
        # The root stays gathered from forward to backward.
        self.send("all_gather", (2 * in_layers + in_root) * place.count * self.gathered_itemsize)
        self.send("reduce_scatter", layout.gradient_elements * place.count * self.itemsize)
        seams, released = self._step(layout), optimizer.releases_gradients
        largest = max((sum(unit.values()) for unit in layers), default=0)
        reduced = max(sum(size for name, size in unit.items() if name in trained) for unit in (*layers, root))
        gathered = (in_root + 2 * largest) * place.count * self.gathered_itemsize
        kept = sum(map(self.numels.get, trained)) if self.reduce_once else layout.gradient_elements
        on_their_way = reduced * place.count * (self.gathered_itemsize + self.itemsize)
        prediction = self.prediction(
            weights=sum(rows.values()) * self.itemsize + sum(buffer.nbytes for buffer in self.model.buffers()),
            masters=0,
            gradients=0 if released else kept * self.itemsize,
            states=state_bytes(optimizer),
            backward=gathered + on_their_way + (reduced * self.itemsize if released else 0),
            step=0,
            seams=seams,
        )
        gradients = layout.gradient_elements * self.itemsize
        between = round(gradients * sent_per_payload_byte("all_reduce", self.replicas))
        if not between:
            return prediction
        return replace(prediction, sent=Counter(prediction.sent) + Counter(all_reduce=between))

    def _units(self) -> list[list[str]]:
        """The parameters of each layer, and of the model besides."""
        layers = [f"{layer}." for layer in _layers(self.model)]
        units = [[name for name in self.numels if name.startswith(layer)] for layer in layers]
        return [*units, [name for name in self.numels if not name.startswith(tuple(layers))]]


class PlannedRotation(PlannedZero):
    """Of the methods that train one block at a time. block: its name, or None for the largest."""

    def __init__(
        self, optimizer: Any, model: nn.Module, place: PlannedRank, checkpointing: bool, block: str | None
    ) -> None:
        super().__init__(optimizer, model, place, checkpointing)
        optimizer.go_to((_visit_of(optimizer, block, self.numels), 0))

    def bucket(self) -> int:
        return min(super().bucket(), self.optimizer.largest_block())

    def members(self) -> list[list[tuple[str | None, int]]]:
        """One that has none in a block is lent its smallest, as the engine does."""
        self.optimizer.keep_all_groups()
        groups = super().members()
        lent = [min(p.numel() for p in trained) for _, trained in self.optimizer.trained_by_group()]
        return [members or [(None, size)] for members, size in zip(groups, lent, strict=True)]

    def residuals(self) -> dict[str, int]:
        """With keep_residual, once all blocks have trained: 2 bytes of each element that a rank ever holds."""
        optimizer = self.optimizer
        if not optimizer.keep_residual or self.itemsize == 4:
            return {}
        elements, position = 0, optimizer.position
        always = set(optimizer.partition.always_active)
        for visit in range(optimizer.rotation.num_blocks):
            optimizer.go_to((visit, 0))
            if self.place.stage == 0:
                elements += sum(size for group in self.members() for name, size in group if name not in always)
                continue
            for _, held, _ in FlatPartitions(self.members(), self.place).flats:
                elements += sum(interval.length for interval in held if interval.name not in always)
        optimizer.go_to(position)
        return {"residuals": 2 * elements}


class PlannedStoredWeights(PlannedEngine):
    """Of the methods that write the stored weights themselves."""

    def predict(self) -> Prediction:
        optimizer, place = self.optimizer, self.place
        names = optimizer.names_by_tensor()
        shards = PlannedShards(self.model, names, place)
        gathered = self.gather(set(names.values()))
        optimizer.bind(shards)
        if optimizer.uses_gradients:
            optimizer.watch_gradients(elements=min(BUCKET, place.zero.reduce_bucket_size))
            buckets = self._step(optimizer)
        else:
            list(optimizer.named_state())  # which makes what is kept
            shards.publish()
            buckets = 0
        for collective, size in shards.payload.items():
            self.send(collective, size)
        owners = gather.owners_of(self.model, [])
        largest = max(sum(owner.numels.values()) for owner in owners) if optimizer.uses_losses else 0
        joined = max(BUCKET, *self.numels.values()) if place.stage in (1, 2) and place.count > 1 else 0
        return self.prediction(
            weights=self.weights(),
            masters=0,
            gradients=0,
            states=state_bytes(optimizer),
            backward=(largest + buckets) * self.itemsize + gathered,
            step=min(joined, sum(self.numels.values())) * self.itemsize,
            seams=shards.shared,
        )

    def _step(self, optimizer: Any) -> int:
        """Take all gradients through the method's own buckets; returns the elements of the two that may be held."""
        # Steps are described, which makes what is kept, and not made.
        with mock.patch.object(optimizer, "move", list):
            for measuring in (True, False) if optimizer.clip == "two_pass" else (False,):
                with optimizer.using_gradients(measuring):
                    pass  # none comes: all count as zero
        optimizer.end_step(done=True)
        return 2 * max(sum(p.numel() for p in bucket) for bucket in optimizer.gradients.buckets)

    def passes(self, trained: set[str]) -> list[list[gather.Owner]]:
        optimizer, once = self.optimizer, gather.forward(self.owners)
        if not optimizer.uses_gradients:
            if self._in_lockstep():
                return [gather.forward(self.owners, times_in_layer=2)] * optimizer.probe.probes
            return [once] * len(optimizer.probe.evaluations())
        (first_order,) = super().passes(trained)
        again = [first_order] if optimizer.clip == "two_pass" else []
        if not optimizer.uses_losses:
            return [first_order, *again]
        back = first_order[len(once) :]
        if self._in_lockstep():
            return [gather.forward(self.owners, times_in_layer=3, times_outside=2) + back, *again]
        return [once * (len(optimizer.probe.evaluations()) + 1) + back, *again]

    def _in_lockstep(self) -> bool:
        optimizer = self.optimizer
        try:
            return optimizer.probe.lockstep and optimizer.probe.two_sided and bool(optimizer.probe.new_lockstep())
        except ValueError:
            return False


def _visit_of(optimizer: Any, block: str | None, numels: Mapping[str, int]) -> int:
    """A visit at which a block trains: the one that is given, else the largest that is ever visited."""
    names, rotation = list(optimizer.partition.blocks), optimizer.rotation
    visits = {names[rotation.block(visit)]: visit for visit in range(rotation.num_blocks)}
    if block is not None:
        check_range("block", block, block in visits, f"one of {', '.join(map(repr, visits))}", "Leave it out.")
        return visits[block]
    sizes = {
        name: sum(map(numels.get, members)) for name, members in optimizer.partition.blocks.items() if name in visits
    }
    return visits[max(sizes, key=sizes.get)]


def _layers(model: nn.Module) -> list[str]:
    """Paths of the model's layers, none if it has no list of them."""
    try:
        return list(partition_into_blocks(model, bare_parameters(model)).blocks)
    except ValueError:
        return []


def _no_bits(part: packed.Segment, step: int, probe: int, device: torch.device) -> torch.Tensor:
    """In the place of `packed.rounding_bits`, whose formula would take most of a step on tensors that hold nothing."""
    return torch.empty(part.count, dtype=torch.int32, device=device)


def _no_places(part: packed.Segment, device: torch.device) -> torch.Tensor:
    """In the place of `packed.Segment.scales_of`, likewise."""
    return torch.empty(part.count, dtype=torch.int64, device=device)


def _once_for_each_size(counted: BytesMoved) -> Callable[..., torch.Tensor]:
    """As `_no_bits`, where what is moved is counted: the formula runs once for each number of bits, and then what it
    moves is added."""
    moved: dict[tuple[int, int], int] = {}
    rounding_bits = packed.rounding_bits

    def bits(part: packed.Segment, step: int, probe: int, device: torch.device) -> torch.Tensor:
        size = part.first % 16, part.count  # a counter of the noise gives 16
        if size in moved:
            counted.total += moved[size]
        else:
            before = counted.total
            rounding_bits(part, step, probe, device)
            moved[size] = counted.total - before
        return _no_bits(part, step, probe, device)

    return bits
