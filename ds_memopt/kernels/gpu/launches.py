"""How a launch gets its tables and its programs, and what it moved.

A launch covers all tensors of a call. Their addresses and scalars go to the device in one small copy, which nothing
waits for; runs, and which program takes which of them, lie there from the first step on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl

from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.work import FIELDS, Runs, Tensors, Work

PROGRAM = 2**14
"""Elements that a program takes, unless one run has more: few enough to share out evenly, many enough to keep the map
of programs small (3 MB for 7e9 elements)."""

TILE = 2**11
"""Elements that a program takes at once."""

HELD = 2**16
"""Elements of a run up to which its second read in a program is taken to come from a cache."""

ADDRESSES = 12
"""Places for the addresses of a tensor."""

SCALARS = 9
"""Places for the scalars of a tensor."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""No contraction to fused multiply-adds: what is aligned and what is not is compiled apart, and would be contracted
differently, so that an element's bits depended on where a rank's part begins."""

SPANS: dict[str, Callable[[Runs, int], np.ndarray]] = {
    "blocks": lambda runs, period: _over(_count(runs), np.maximum(PROGRAM // np.maximum(runs.column("width"), 1), 1)),
    "elements": lambda runs, period: runs.column("rows") * _over(runs.column("count") * runs.column("width"), PROGRAM),
    "groups": lambda runs, period: _over(_count(runs), PROGRAM // period),
}
"""For each kind of kernel how many programs each piece takes."""


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Of what is kept as it is."""


class Launch(NamedTuple):
    """What one launch was. read, written: bytes of the device's memory, each byte that a program holds on to once."""

    kernel: str
    programs: int
    read: int
    written: int


class Schedule(NamedTuple):
    """What of `Runs` lies on a device. rows: as there. programs: [programs, 2], int32, piece and number within it."""

    rows: torch.Tensor
    programs: torch.Tensor


MATRIX_FIELDS = "tensor", "interval", "numel", "first_share", "last_share", "first_cut", "last_cut"


class Matrices(NamedTuple):
    """How the norms of matrices are found, by their places among the norms.

    table: [places, MATRIX_FIELDS], int64; of a place of which this rank has nothing the tensor is -1.
    shares: [programs], what each program of whole groups adds to its matrix's sum: of one matrix [first, last).
    cut: rows of cut groups, of one matrix [first, last).
    previous: [places], the update norms of the step before.
    """

    table: torch.Tensor
    shares: torch.Tensor
    cut: torch.Tensor
    previous: torch.Tensor


class Tables(NamedTuple):
    """Of a launch's tensors, by number: addresses, int64 [tensors, ADDRESSES]; scalars, fp32 [tensors, SCALARS]."""

    addresses: torch.Tensor
    scalars: torch.Tensor
    aligned: bool


_books: list[list[Launch]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """A list to which every launch adds itself."""
    launches: list[Launch] = []
    _books.append(launches)
    try:
        yield launches
    finally:
        _books.remove(launches)


def schedule_of(runs: Runs, kind: str, device: torch.device, period: int = 1) -> Schedule:
    """The runs, and programs for them; longest first, so that no long one is left over at the end."""
    return kept_with(runs, (kind, device, period), lambda: _schedule(runs, kind, device, period))


def _schedule(runs: Runs, kind: str, device: torch.device, period: int) -> Schedule:
    order = _order(runs, kind)
    counts = SPANS[kind](runs, period)[order]
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    programs = np.stack([np.repeat(order, counts), numbers], axis=1).astype(np.int32)
    # Not asynchronous: it is there whatever stream asks for it later.
    return Schedule(torch.from_numpy(runs.rows).to(device), torch.from_numpy(programs).to(device))


def _order(runs: Runs, kind: str) -> np.ndarray:
    if kind == "groups":
        return np.argsort(runs.column("matrix"), kind="stable")
    return np.argsort(-np.maximum(runs.column("width"), PROGRAM), kind="stable")


def holders_of(runs: Runs, slots: int, device: torch.device) -> torch.Tensor:
    """For each slot which of these rows is of its block; -1 where none is on this rank."""
    return kept_with(runs, ("holders", device, slots), lambda: _holders(runs, slots, device))


def _holders(runs: Runs, slots: int, device: torch.device) -> torch.Tensor:
    holders = np.full(slots, -1, dtype=np.int64)
    holders[runs.column("slot")] = np.arange(len(runs))
    return torch.from_numpy(holders).to(device)


def matrices_of(work: Work, places: int, device: torch.device, period: int) -> Matrices:
    return kept_with(work.whole, ("matrices", device, places, period), lambda: _matrices(work, places, device, period))


def _matrices(work: Work, places: int, device: torch.device, period: int) -> Matrices:
    table = np.zeros((places, len(MATRIX_FIELDS)), dtype=np.int64)
    table[:, 0] = -1
    table[work.all.column("matrix"), :3] = np.stack([work.all.column(name) for name in MATRIX_FIELDS[:3]], axis=1)
    order = _order(work.whole, "groups")
    of_program = np.repeat(work.whole.column("matrix")[order], SPANS["groups"](work.whole, period)[order])
    cut = work.cut.rows[_order(work.cut, "groups")]
    for first, of_matrix in ((3, of_program), (5, cut[:, FIELDS.index("matrix")])):
        table[:, first] = np.searchsorted(of_matrix, np.arange(places))
        table[:, first + 1] = np.searchsorted(of_matrix, np.arange(places), "right")
    floats = [torch.empty(count, dtype=torch.float32, device=device) for count in (len(of_program), places)]
    return Matrices(torch.from_numpy(table).to(device), floats[0], torch.from_numpy(cut).to(device), floats[1])


def kept_with(runs: Runs, key: tuple, build: Callable[[], Any]) -> Any:
    if ("gpu", *key) not in runs.schedules:
        runs.schedules["gpu", *key] = build()
    return runs.schedules["gpu", *key]


def _tables(
    count: int, tensors: Sequence[Tensors], scalars: Mapping[int, tuple[float, ...]], device: torch.device
) -> Tables:
    """Tables of `count` tensors. tensors: up to ADDRESSES of each; one that is not there has the address 0."""
    addresses, values = np.zeros((count, ADDRESSES), dtype=np.int64), np.zeros((count, SCALARS), dtype=np.float32)
    for place, of_call in enumerate(tensors):
        addresses[list(of_call), place] = list(map(address, of_call.values()))
    alike: dict[tuple[float, ...], list[int]] = {}  # tensors of one step: all of a param group, as a rule
    for number, of_tensor in scalars.items():
        alike.setdefault(of_tensor, []).append(number)
    for of_tensor, numbers in alike.items():
        values[numbers, : len(of_tensor)] = of_tensor
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    both = _upload(addresses.tobytes() + values.tobytes(), device, stream)
    aligned = bool((addresses % 16 == 0).all())
    of_addresses, of_scalars = both.split([addresses.nbytes, values.nbytes])
    return Tables(of_addresses.view(torch.int64), of_scalars.view(torch.float32), aligned)


@functools.lru_cache(maxsize=32)
def _upload(data: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """Bytes on a device, uint8: copied in the order of a stream, unless the same lie there for it already."""
    host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def launches_of(
    runs: Sequence[Runs], *tensors: Tensors, moving: Iterable[int] | None = None
) -> Iterator[tuple[list[int], tuple[torch.dtype | None, ...], torch.device]]:
    """What has runs and moves, by dtypes: numbers of tensors, dtypes of one of `tensors` each, and the device.

    A dtype is None where there is no tensor.
    """
    combinations: dict[tuple, list[int]] = {}
    for number in tensors[0] if moving is None else moving:
        key = tuple(_dtype(of_call.get(number)) for of_call in tensors), tensors[0][number].device
        combinations.setdefault(key, []).append(number)
    of_runs = {number for some in runs for number in some.column("tensor").tolist()}
    for (dtypes, device), numbers in combinations.items():
        # All of them, so that the tables of whole and of cut blocks are the same, and are copied once.
        if not of_runs.isdisjoint(numbers):
            yield numbers, dtypes, device


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def launches_that_fill(
    memory: torch.Tensor, runs: Sequence[Runs], *tensors: Tensors, moving: Iterable[int] | None = None
) -> Iterator[tuple[bool, tuple]]:
    """At least one, and whether it is the first, which fills what no run of this rank does."""
    nothing = [], (torch.float32,) * len(tensors), memory.device
    for number, of_launch in enumerate([*launches_of(runs, *tensors, moving=moving)] or [nothing]):
        yield number == 0, of_launch


def tables_of(
    runs: Sequence[Runs],
    numbers: Sequence[int],
    tensors: Sequence[Tensors],
    scalars: Mapping[int, Any],
    of: Callable[[Any], tuple[float, ...]],
    device: torch.device,
) -> Tables:
    """Of these tensors; kernels leave runs of others alone."""
    count = max([1, *map(num_tensors, runs), *(number + 1 for number in numbers)])
    of_launch = [{number: of_call[number] for number in numbers if number in of_call} for of_call in tensors]
    steps = {number: of(scalars[number]) for number in numbers if number in scalars}
    return _tables(count, of_launch, steps, device)


def launch(kernel: Any, programs: int, *arguments: Any, moved: Callable[[], tuple[int, int]], **constants: Any) -> None:
    """Start programs of a kernel, if any. moved: tells the bytes read and written, for the books."""
    if not programs:
        return
    for books in _books:
        books.append(Launch(kernel.__name__, programs, *moved()))
    start(kernel, programs, arguments, constants)


def start(kernel: Any, programs: int, arguments: tuple, constants: dict[str, Any]) -> None:
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


def elements_of(runs: Runs, numbers: Sequence[int], longer_than: int = 0) -> int:
    """Elements of the runs of these tensors, of longer runs alone."""
    some = np.isin(runs.column("tensor"), list(numbers)) & (runs.column("width") > longer_than)
    return int((_count(runs) * runs.column("width"))[some].sum())


def blocks_of(runs: Runs, numbers: Sequence[int]) -> int:
    """Runs of these tensors."""
    return int(_count(runs)[np.isin(runs.column("tensor"), list(numbers))].sum())


def _count(runs: Runs) -> np.ndarray:
    return runs.column("rows") * runs.column("count")


def _over(total: np.ndarray, size: np.ndarray | int) -> np.ndarray:
    return -(-total // size)


def num_tensors(runs: Runs) -> int:
    return int(runs.column("tensor").max(initial=-1)) + 1


def moved_by(
    runs: Runs,
    numbers: Sequence[int],
    read: float,
    written: float,
    read_of_blocks: int = 0,
    written_of_blocks: int = 0,
    again: int = 0,
    fixed: int = 0,
) -> Callable[[], tuple[int, int]]:
    """Bytes of a launch from those of an element and of a block.

    again: of elements that a program reads anew. fixed: what is read or written whatever the runs are.
    """

    def moved() -> tuple[int, int]:
        elements, blocks = elements_of(runs, numbers), blocks_of(runs, numbers)
        once_more = elements_of(runs, numbers, longer_than=HELD) * again
        return (
            round(elements * read) + once_more + blocks * read_of_blocks + fixed,
            round(elements * written) + blocks * written_of_blocks,
        )

    return moved


def adam_scalars(step: AdamScalars) -> tuple[float, ...]:
    """In the order of adam_kernels.py."""
    return 1 - step.beta1, 1 - step.beta2, step.eps, step.decay, step.step_size, 1 / step.root
