"""One process: the directions of LeZO, SubZero and Sparse-MeZO against their formulas, written out in numpy."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ds_memopt import MeZO
from ds_memopt.optimizers.probes.noise import Noise

SEED, LR, EPSILON, DECAY, PROBES = 5, 1e-2, 0.5, 0.1, 2
HYPER = {"lr": LR, "epsilon": EPSILON, "weight_decay": DECAY, "probes": PROBES, "seed": SEED, "compiled": False}
LEZO, SUBZERO, SPARSE = {"layer_fraction": 0.4}, {"rank": 3, "refresh_every": 2}, {"magnitude_fraction": 0.25}


class Recording(nn.Linear):
    """Tells the weights that its forwards have seen."""

    def forward(self, hidden):
        self.seen = [*getattr(self, "seen", []), self.weight.detach().clone()]
        return super().forward(hidden)


class Net(nn.Module):
    """In fp64, with an embedding and a head outside its layers, and no square matrix."""

    def __init__(self, layers: int = 2, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, width), Recording(width, 11)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)) for _ in range(layers)
        )
        self.loss_function = cross_entropy  # where lockstep looks for it
        self.double()

    def forward(self, rows, labels):
        hidden = self.embed(rows)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.loss_function(self.head(hidden), labels)


def inputs(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randint(11, (2, 8), generator=generator))


def named(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def direction(optimizer: MeZO, name: str, step: int = 0, probe: int = 0, start: int = 0, end: int | None = None):
    """Elements of z as the optimizer makes them, 1-D."""
    weights = dict(optimizer._model.named_parameters())[name].detach().flatten()[start:end]
    z = torch.zeros(len(weights))
    optimizer.probe.directions.add_(z, weights, name, start, step, probe, 1.0)
    return z


def noise(name: str, shape, step: int, probe: int = 0) -> np.ndarray:
    return Noise(SEED, step, probe).values(name, 0, math.prod(shape)).double().view(*shape).numpy()


def with_noise(optimizer: MeZO, step: int, probe: int = 0) -> set[str]:
    return {name for name, _ in optimizer._model.named_parameters() if direction(optimizer, name, step, probe).any()}


def layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def low_rank(name: str, shape: tuple[int, int], step: int, probe: int = 0, rank: int = 3, refresh_every: int = 2):
    """SubZero's z: LAPACK fixes the signs of the bases."""
    rows, columns = shape
    rank = min(rank, rows, columns)
    number = step // refresh_every
    u = np.linalg.qr(noise(f"{name}, rows", (rows, rank), number)).Q
    v = np.linalg.qr(noise(f"{name}, columns", (columns, rank), number)).Q
    return math.sqrt(rows * columns) / rank * u @ noise(name, (rank, rank), step, probe) @ v.T


def cut_off(weights: np.ndarray) -> np.ndarray:
    """Magnitudes with the 8 significant bits that bf16 has, rounded towards zero."""
    mantissa, exponent = np.frexp(np.abs(weights))
    return np.ldexp(np.floor(mantissa * 256), exponent - 8)


def threshold(weights: np.ndarray, fraction: float) -> float:
    return np.sort(cut_off(weights), axis=None)[math.ceil(fraction * weights.size) - 1]


@pytest.mark.parametrize("layers, fraction, count", [(7, 0.3, 3), (4, 0.25, 1), (3, 0.01, 1), (5, 1.0, 5)])
def test_lezo_draws_that_many_layers_anew_in_every_step(layers, fraction, count):
    """Over 1,000 steps each layer as often as another: within 4.5 standard deviations, measured up to 2.6.

    Layers that took turns, or a draw that ignores the step, would be some of always the same sets."""
    optimizer = MeZO.from_model(Net(layers), layer_fraction=fraction, **HYPER)
    everything = {name for name, _ in optimizer._model.named_parameters()}
    drawn = []
    for step in range(10):
        moving = with_noise(optimizer, step)
        drawn.append(frozenset(layer_of(name) for name in moving) - {None})
        assert moving == {n for n in everything if layer_of(n) is None or layer_of(n) in drawn[-1]}
        assert len(drawn[-1]) == count
        assert with_noise(optimizer, step, probe=1) == moving  # for all probes of a step the same layers
    assert with_noise(MeZO.from_model(Net(layers), layer_fraction=fraction, **HYPER), 0) == with_noise(optimizer, 0)
    counts = np.zeros(layers)
    for step in range(1000):
        skipped = optimizer.probe.directions.skipped(step)
        chosen = [layer for layer in range(layers) if f"layers.{layer}.0.weight" not in skipped]
        counts[chosen] += 1
        drawn.append(frozenset(chosen))
    share = count / layers
    off = np.abs(counts - 1000 * share).max() / max(math.sqrt(1000 * share * (1 - share)), 1)
    print(counts, off)
    assert off < 4.5
    assert len({*drawn}) == math.comb(layers, count)


def test_lezo_takes_layers_that_it_is_told():
    layers = [["embed.weight"], ["head.weight", "head.bias"]]
    optimizer = MeZO.from_model(Net(), layer_fraction=0.5, layers=layers, **HYPER)
    for step in range(10):
        still = {name for name, _ in optimizer._model.named_parameters()} - with_noise(optimizer, step)
        assert still in ({"embed.weight"}, {"head.weight", "head.bias"})


def test_a_lezo_step_moves_what_has_noise_and_nothing_else():
    """By -lr g z: limit 1e-6 of that, measured 9e-8. What was drawn for another step would move other layers."""
    model = Net(5)
    optimizer, worst = MeZO.from_model(model, **HYPER | LEZO | {"weight_decay": 0.0, "probes": 1}), 0.0
    for step, g in enumerate((0.7, -1.3, 2.1)):
        before, moving = named(model), with_noise(optimizer, step)
        optimizer.apply([g])
        for name, after in named(model).items():
            if name not in moving:
                assert np.array_equal(after, before[name])
                continue
            expected = -LR * g * noise(name, after.shape, step)
            worst = max(worst, np.abs(after - before[name] - expected).max() / np.abs(expected).max())
    print(worst)
    assert worst < 1e-6


def test_subzero_is_a_product_of_three():
    """Of tall, wide and small matrices: limit 1e-5 of the largest element, measured 6e-7; vectors have plain noise."""
    model = Net()
    model.small = nn.Parameter(torch.zeros(2, 9, dtype=torch.float64))  # its rank is 2
    optimizer = MeZO.from_model(model, **HYPER | SUBZERO)
    worst = 0.0
    for name, p in model.named_parameters():
        for step, probe in ((0, 0), (1, 0), (1, 1), (2, 0), (5, 1)):
            z = direction(optimizer, name, step, probe).view(p.shape).double().numpy()
            expected = low_rank(name, p.shape, step, probe) if p.ndim == 2 else noise(name, p.shape, step, probe)
            worst = max(worst, np.abs(z - expected).max() / np.abs(expected).max())
    print(worst)
    assert worst < 1e-5


def test_subzero_has_orthonormal_bases():
    """Then z has the singular values of Z, times sqrt(R C) / rank: limit 1e-5 of the largest, measured 3e-7. With bases
    as they were drawn they would be 8 times larger.

    So its squared norm is R C / rank^2 times that of Z, and on average that of full noise, R C: measured 1.03 of it."""
    optimizer = MeZO.from_model(Net(), **HYPER | SUBZERO)
    name, (rows, columns), rank = "layers.1.0.weight", (12, 6), 3
    scale, lengths, worst = math.sqrt(rows * columns) / rank, [], 0.0
    for step in range(400):
        z = direction(optimizer, name, step).view(rows, columns).double().numpy()
        middle = noise(name, (rank, rank), step)
        found, expected = (np.linalg.svd(matrix, compute_uv=False) for matrix in (z, scale * middle))
        worst = max(worst, np.abs(found - np.pad(expected, (0, columns - rank))).max() / expected[0])
        lengths.append((z**2).sum())
        assert lengths[-1] == pytest.approx(rows * columns / rank**2 * (middle**2).sum(), rel=1e-5)
    mean = np.mean(lengths) / (rows * columns)
    print(worst, mean)
    assert worst < 1e-5 and abs(mean - 1) < 0.1  # 4 standard deviations


def test_subzero_stays_in_its_subspace_until_the_next_refresh():
    """What lies outside the last step's row and column space: measured up to 1.5e-6 of z, after a refresh 0.8."""
    optimizer = MeZO.from_model(Net(), **HYPER | SUBZERO | {"refresh_every": 3})
    matrices = [
        direction(optimizer, "head.weight", step, probe).view(11, 6).double().numpy()
        for step in range(7)
        for probe in range(PROBES)
    ]
    kept, new = [], []

    def outside(z: np.ndarray, other: np.ndarray) -> float:
        u, _, vt = np.linalg.svd(other)
        outside_columns, outside_rows = z - u[:, :3] @ u[:, :3].T @ z, z - z @ vt[:3].T @ vt[:3]
        return max(np.abs(outside_columns).max(), np.abs(outside_rows).max()) / np.abs(z).max()

    for number, (last, z) in enumerate(zip(matrices, matrices[1:], strict=False), 1):
        (new if number in (3 * PROBES, 6 * PROBES) else kept).append(outside(z, last))
        assert np.abs(z - last).max() > 0.1  # Z is new in every step and probe
    print(max(kept), new)
    assert max(kept) < 1e-5 and min(new) > 0.1


@pytest.mark.parametrize("options", [SUBZERO, SPARSE, SUBZERO | SPARSE], ids=str)
def test_a_slice_is_a_slice_of_the_whole(options):
    """To fp32 rounding of the product, 1e-6 of the largest element; measured 5e-8, and 0 without a product."""
    model = Net()
    optimizer = MeZO.from_model(model, **HYPER | options)
    optimizer.probe.choose_thresholds()
    worst = 0.0
    for name, p in model.named_parameters():
        whole = direction(optimizer, name, step=3)
        for start, end in ((0, 1), (0, 5), (1, p.numel()), (5, 6), (4, p.numel() - 1), (p.numel() - 1, p.numel())):
            off = direction(optimizer, name, 3, start=start, end=end) - whole[start:end]
            worst = max(worst, off.abs().max().item() / whole.abs().max().item())
    print(worst)
    assert worst < 1e-6 if "rank" in options else worst == 0


def test_sparse_mezo_masks_by_magnitude():
    """Of matrices the smallest weights have noise, in whole steps of a bf16 number: measured shares 0.250 to 0.254, in
    both dtypes. The threshold is that of the first weights, for good; which weights lie below it changes with them."""
    for dtype in (torch.float64, torch.bfloat16):
        model = Net(width=24).to(dtype)
        optimizer = MeZO.from_model(model, **HYPER | SPARSE)
        limits = {name: threshold(w, 0.25) for name, w in named(model).items()}
        optimizer.apply([0.0] * PROBES)
        saved = copy.deepcopy(optimizer.state_dict())
        for factor in (1.0, -1.5, 0.2):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(factor)
            resumed = MeZO.from_model(model, **HYPER | SPARSE)
            resumed.load_state_dict(saved)
            resumed.apply([0.0] * PROBES)
            for name, weights in named(model).items():
                small = cut_off(weights) <= limits[name] if weights.ndim == 2 else np.ones_like(weights, dtype=bool)
                expected = noise(name, weights.shape, 0) * small
                for chosen in (optimizer, resumed):
                    z = direction(chosen, name).view(weights.shape).double().numpy()
                    assert np.array_equal(z, expected), (dtype, name, factor)
                if weights.ndim == 2 and factor == 1.0:
                    print(name, small.mean())
                    assert 0.25 <= small.mean() < 0.26


def test_sparse_mezo_perturbs_the_same_weights_with_both_signs():
    """Those that are small before, also in lockstep, where one sign takes the other's place in the middle of a module.

    Epsilon is large: a mask of perturbed weights would be another one."""
    model = Net(width=24)
    optimizer = MeZO.from_model(model, **HYPER | SPARSE | {"probes": 1})
    weights = model.head.weight.detach().clone()
    small = cut_off(weights.numpy()) <= threshold(weights.numpy(), 0.25)
    optimizer.probe.evaluate(lambda: model(*inputs(0)))
    with optimizer.probe.perturbed(optimizer.probe.evaluations()[0]), torch.no_grad():
        optimizer.probe.new_lockstep().run(model, inputs(0), {})
    above, below, *together = model.head.seen
    assert np.array_equal((above != weights).numpy(), small) and np.array_equal((below != weights).numpy(), small)
    assert torch.equal(below, together[0]) and torch.equal(above, together[1])
    assert not np.array_equal(cut_off(above.numpy()) <= threshold(weights.numpy(), 0.25), small)


def by_hand(model: nn.Module, steps: int, optimizer: MeZO, options: dict) -> dict[str, np.ndarray]:
    """The weights after some steps of MeZO along directions that are made here; only LeZO's draw is the optimizer's."""
    weights = named(model)
    limits = {name: threshold(w, options.get("magnitude_fraction", 1.0)) for name, w in weights.items()}

    def loss(step: int, moved: dict[str, np.ndarray]) -> float:
        return float(functional_call(model, {n: torch.from_numpy(w) for n, w in moved.items()}, inputs(step)))

    for step in range(steps):
        total = {name: np.zeros_like(w) for name, w in weights.items()}
        for probe in range(PROBES):
            z = {}
            for name, w in weights.items():
                z[name] = noise(name, w.shape, step, probe)
                if "rank" in options and w.ndim == 2:
                    z[name] = low_rank(name, w.shape, step, probe)
                if "magnitude_fraction" in options and w.ndim == 2:
                    z[name] = z[name] * (cut_off(w) <= limits[name])
                if name in optimizer.probe.directions.skipped(step):
                    z[name] = np.zeros_like(w)
            above = loss(step, {name: w + EPSILON * z[name] for name, w in weights.items()})
            below = loss(step, {name: w - EPSILON * z[name] for name, w in weights.items()})
            for name in weights:
                total[name] += (above - below) / (2 * EPSILON) * z[name] / PROBES
        for name, w in weights.items():
            weights[name] = w * (1 - LR * DECAY * (w.ndim > 1)) - LR * total[name]
    return weights


@pytest.mark.parametrize("options", [LEZO, SUBZERO, SPARSE, LEZO | SUBZERO | SPARSE], ids=str)
def test_steps_follow_the_formula(options):
    """Four steps in fp64, over a refresh: limit 1e-5 of the distance moved, measured 3e-8 to 3e-7, as noise is in fp32.

    Plain MeZO's are 1 and more away."""
    model = Net()
    start, optimizer = named(model), MeZO.from_model(model, **HYPER | options)
    expected, plain = by_hand(copy.deepcopy(model), 4, optimizer, options), Net()
    for step in range(4):
        optimizer.step(lambda step=step: model(*inputs(step)))
    other = MeZO.from_model(plain, **HYPER)
    for step in range(4):
        other.step(lambda step=step: plain(*inputs(step)))

    def length(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
        return math.sqrt(sum(((a[name] - b[name]) ** 2).sum() for name in a))

    errors = [length(named(which), expected) / length(expected, start) for which in (model, plain)]
    print(options, errors)
    assert errors[0] < 1e-5 and errors[1] > 0.3


WRONG = {
    "layer_fraction": (0, "a number in (0, 1]"), "magnitude_fraction": (1.5, "a number in (0, 1]"),
    "rank": (-1, "an integer >= 0"), "refresh_every": (True, "an integer >= 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_hyper_parameter_out_of_range_is_refused(name):
    value, limit = WRONG[name]
    with pytest.raises(ValueError) as error:
        MeZO.from_model(Net(), **HYPER | {name: value})
    assert f"{name}={value!r} is out of range: it must be {limit}" in str(error.value)


LAYERS = 'Name the parameters of each layer, as layers=[["first.weight", "first.bias"], ["second.weight"]].'
NOT_LAYERS = "it must be a list with a list of parameter names for each layer, none of them empty. " + LAYERS
UNKNOWN = (
    "it must be one of the 10 parameters that train, such as 'embed.weight'. Use the names of model.named_parameters"
)
WRONG_LAYERS = {
    "no layer": ([], f"layers=[] is out of range: {NOT_LAYERS}"),
    "an empty layer": ([["head.bias"], []], f"layers=[['head.bias'], []] is out of range: {NOT_LAYERS}"),
    "no list": ("head", f"layers='head' is out of range: {NOT_LAYERS}"),
    "names for lists": (["head.bias"], f"layers=['head.bias'] is out of range: {NOT_LAYERS}"),
    "an unknown name": ([["head.bias"], ["head"]], f"layers[1]='head' is out of range: {UNKNOWN}"),
    "a frozen parameter": ([["head.weight"]], f"layers[0]='head.weight' is out of range: {UNKNOWN}"),
    "no name": ([[["head.bias"]]], f"layers[0]=['head.bias'] is out of range: {UNKNOWN}"),
    "a name in two": (
        [["head.bias"]] * 2,
        "layers[1]='head.bias' is out of range: it must be listed once. Leave it in",
    ),
    "a name twice": ([["head.bias"] * 2], "layers[0]='head.bias' is out of range: it must be listed once. Leave it in"),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
def test_layers_that_are_none_are_refused(case):
    """Also where all layers train: the option would wait for a layer_fraction to fail."""
    layers, message = WRONG_LAYERS[case]
    model = Net()
    model.head.weight.requires_grad_(False)
    for options in ({}, LEZO):
        with pytest.raises(ValueError) as error:
            MeZO.from_model(model, layers=layers, **HYPER | options)
        assert message in str(error.value)


def test_lezo_needs_layers():
    with pytest.raises(ValueError) as error:
        MeZO.from_model(nn.Sequential(nn.Linear(3, 3)), **HYPER | LEZO)
    cause = "The model has no nn.ModuleList, nn.ModuleDict or nn.Sequential of two or more layers to train."
    assert str(error.value) == f"layer_fraction=0.4 needs layers. {cause} {LAYERS}"


def test_skipped_layers_decay():
    model = Net(5)
    optimizer, before = MeZO.from_model(model, **HYPER | LEZO), named(model)
    optimizer.apply([1.0] * PROBES)
    skipped = [name for name in optimizer.probe.directions.skipped(0) if name.endswith("weight")]
    assert len(skipped) == 2 * 3
    for name in skipped:
        assert np.abs(named(model)[name] / before[name] - (1 - LR * DECAY)).max() < 1e-12


def test_a_matrix_that_starts_at_zero_trains_on_under_sparse_mezo():
    """All of it, as LoRA's B, also after a resume; so does one that begins with more zeros than the share."""
    model = Net()
    with torch.no_grad():
        model.head.weight.zero_()
        model.embed.weight[:4] = 0
    optimizer = MeZO.from_model(model, **HYPER | SPARSE)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = MeZO.from_model(model, **HYPER | SPARSE)
            optimizer.load_state_dict(saved)
        before = named(model)
        optimizer.apply([1.0] * PROBES)
        after = named(model)
        for name in ("head.weight", "embed.weight"):
            assert (after[name] != before[name]).all()
            expected = noise(name, after[name].shape, step)
            assert np.array_equal(direction(optimizer, name, step).view(expected.shape).double().numpy(), expected)
        assert not direction(optimizer, "layers.0.0.weight", step).all()  # the others stay masked


def references_after_a_run(options: dict) -> list[weakref.ref]:
    model = Net()
    optimizer = MeZO.from_model(model, **HYPER | options)
    for step in range(3):
        optimizer.step(lambda step=step: model(*inputs(step)))
    return [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.head.weight)]


@pytest.mark.parametrize("options", [{}, LEZO, SUBZERO, SPARSE], ids=str)
def test_an_optimizer_that_is_dropped_keeps_nothing_alive(options):
    references = references_after_a_run(options)
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@pytest.fixture
def bases(monkeypatch) -> list[weakref.ref]:
    """One for every basis that is made."""
    made, qr = [], torch.linalg.qr

    def recording(matrix):
        result = qr(matrix)
        made.append(weakref.ref(result.Q))
        return result

    monkeypatch.setattr(torch.linalg, "qr", recording)
    return made


def alive(references: list[weakref.ref]) -> int:
    return sum(reference() is not None for reference in references)


def test_bases_are_made_once_for_a_window_and_then_dropped(bases):
    """For so many matrices that a cache of a fixed size, of 1,024 for instance, would drop each before its next use."""
    model = nn.Module()
    model.all = nn.ParameterList(torch.ones(3, 2) for _ in range(1100))
    optimizer = MeZO.from_model(model, **HYPER | {"rank": 1, "refresh_every": 2})
    for step, windows in enumerate((1, 1, 2, 2, 3)):
        for name, p in model.named_parameters():
            optimizer.probe.directions.add_(torch.zeros(6), p.detach().view(-1), name, 0, step, 0, 1.0)
        assert (len(bases), alive(bases)) == (windows * 2 * 1100, 2 * 1100)


def test_momentum_makes_the_last_bases_but_once_more(bases):
    """In steps after a refresh it adds up noise of both windows, and an update changes between them many times."""
    model = Net()
    optimizer = MeZO.from_model(model, momentum=0.5, **HYPER | {"rank": 2, "refresh_every": 10})
    seen = []
    for step in range(21):
        optimizer.step(lambda step=step: model(*inputs(step)))
        seen.append((len(bases) / 12, alive(bases) / 12))  # 6 matrices have 12 bases
    assert seen == [(1, 1)] * 10 + [(3, 2)] * 10 + [(5, 2)]


def test_the_state_of_other_layers_is_refused():
    first, second = [["embed.weight"], ["head.weight"]], [["embed.weight"], ["head.bias"]]
    saved = MeZO.from_model(Net(), layers=first, **HYPER | LEZO).state_dict()
    MeZO.from_model(Net(), layers=first, **HYPER | LEZO).load_state_dict(saved)
    for layers in (second, None):
        with pytest.raises(ValueError, match="state is of .*layers [0-9a-f]{8}"):
            MeZO.from_model(Net(), layers=layers, **HYPER | LEZO).load_state_dict(saved)
