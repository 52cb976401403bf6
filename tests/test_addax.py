"""One process: IPSGD and Addax against their formulas written out by hand, what backward holds, bf16, user errors."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from test_peak import AliveBytes
from tiny import batches, distance, equal, full_parameters, llama, train_plain
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ds_memopt import Addax, MeZO
from ds_memopt.kernels import stored_weights
from ds_memopt.measure import state_bytes
from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.probes.noise import Noise
from ds_memopt.optimizers.probes.trajectory import SKIPPED, read_trajectory
from ds_memopt.replay import replay

STEPS, SEED, EPSILON, ALPHA = 3, 5, 1e-3, 0.01
BOTH, WHERE = ("IPSGD", "Addax"), ("forward", "full_backward")


class Net(nn.Module):
    """Tied weights, dropout, a parameter of three dimensions, one that no loss reaches, and a frozen matrix."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.body = nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Dropout(0.3), nn.Linear(13, 8))
        self.mix, self.unused = nn.Parameter(torch.randn(3, 8, 5) / 4), nn.Parameter(torch.ones(4, 2))
        self.back, self.shares = nn.Linear(5, 8).requires_grad_(False), nn.Buffer(torch.tensor([1.0, 2.0, 0.5]))
        nn.init.zeros_(self.head.bias)
        self.to(dtype)

    def forward(self, rows, labels):
        hidden = self.embed(rows)
        hidden = hidden + self.body(hidden)
        logits = self.head(hidden + self.back(torch.einsum("bth,nhk,n->btk", hidden, self.mix, self.shares)))
        precise = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(precise, labels.flatten())


def inputs(step: int, rows: slice = slice(4)) -> tuple[torch.Tensor, torch.Tensor]:
    batch = next(batches(1, seed=step))
    return batch[rows, :5] % 11, batch[rows, 5:10] % 11


def group_of(name: str, step: int, scale: float = 1.0) -> tuple[float, float]:
    """Learning rate, which changes between steps, and decay."""
    return (0.2 * (1 + step) * scale, 0.5) if "body" in name else (0.1 * scale, 0.1)


def build(method: str, model, **options):
    """With two param groups, whose rates `train` sets."""
    body, other = ([p for n, p in model.named_parameters() if ("body" in n) == inside] for inside in (True, False))
    groups = [{"params": body, "weight_decay": 0.5}, {"params": [p for p in other if p.requires_grad]}]
    if method != "IPSGD":
        options = {"epsilon": EPSILON, "seed": SEED, "compiled": False} | options
    if method == "Addax":
        options = {"alpha": ALPHA, "length_threshold": None} | options
    return METHODS[method].from_model(model, groups, weight_decay=0.1, **options)


def halves(model, step: int) -> tuple:
    """A closure for each half: they return sums over samples, and their number."""
    zo, fo = inputs(step, slice(4)), inputs(step, slice(4, 11))
    return lambda: (model(*zo) * 4, 4), lambda: (model(*fo) * 7, 7)


def set_rates(optimizer, step: int, scale: float = 1.0) -> None:
    for group, name in zip(optimizer.param_groups, ("body", "other"), strict=True):
        group["lr"] = group_of(name, step, scale)[0]


def train(model, optimizer, steps: range, loop: str = "", scale: float = 1.0) -> dict[str, torch.Tensor]:
    for step in steps:
        set_rates(optimizer, step, scale)
        zo, fo = halves(model, step)
        if isinstance(optimizer, Addax):
            optimizer.step(zo, fo)
        elif isinstance(optimizer, MeZO):
            optimizer.step(zo)
        elif loop != "backward":
            optimizer.step(fo)
        else:
            total, count = fo()
            (total / count).backward()
            optimizer.step()
    return named(model)


def named(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def apart(a, b, start) -> float:
    """Distance between two models, relative to the distance that training moved the second."""
    return distance(a, b) / distance(b, start)


def by_hand(model, *, alpha=0.0, rule="sgd", clip="none", max_norm=1.0, noise="gaussian") -> dict[str, torch.Tensor]:
    """The weights after some steps of the formulas, by loops over parameters and on tensors of their own."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    weights, moments = named(model), {}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for step in range(STEPS):
        zo, fo = inputs(step), inputs(step, slice(4, 11))
        z = {n: Noise(SEED, step, 0, noise).values(n, 0, weights[n].numel()).view(weights[n].shape) for n in trained}
        model.eval()
        above, below = (
            functional_call(model, weights | {n: weights[n] + sign * EPSILON * z[n] for n in trained}, zo).item()
            for sign in (1, -1)
        )
        g0 = (above - below) / (2 * EPSILON)
        model.train()
        leaves = {n: weights[n].clone().requires_grad_() for n in trained}
        loss = functional_call(model, weights | leaves, fo)
        g1 = dict(zip(trained, torch.autograd.grad(loss, leaves.values(), allow_unused=True), strict=True))
        g1 = {n: torch.zeros_like(weights[n]) if g is None else g for n, g in g1.items()}
        whole = torch.cat([g.flatten() for g in g1.values()]).norm()
        for n in trained:
            lr, decay = group_of(n, step)
            if clip != "none":
                g1[n] = g1[n] * min(1.0, max_norm / ((g1[n].norm() if clip == "tensor" else whole) + 1e-6))
            if rule == "adalomo":
                g1[n] = adalomo(g1[n], moments.setdefault(n, {}), step + 1)
                lr = lr * max(1e-3, weights[n].square().mean().sqrt().item())
            weights[n] = weights[n] * (1 - lr * decay) - lr * (alpha * g0 * z[n] + (1 - alpha) * g1[n])
    return weights


def adalomo(gradient: torch.Tensor, moments: dict, step: int) -> torch.Tensor:
    """The update, matrix after matrix."""
    decay, squares = 1 - step**-0.8, gradient.square() + 1e-30

    def moment(key, value):
        moments[key] = decay * moments.get(key, 0) + (1 - decay) * value
        return moments[key]

    if gradient.ndim < 2:
        update = gradient / moment("all", squares).sqrt()
    else:
        update = torch.empty_like(gradient)
        for index in [()] if gradient.ndim == 2 else range(len(gradient)):
            row = moment(("row", index), squares[index].mean(1))
            column = moment(("column", index), squares[index].mean(0))
            update[index] = gradient[index] / (torch.outer(row, column) / row.mean()).sqrt()
    return update / max(1.0, update.square().mean().sqrt().item())


CLIPS = {"none": {}, "tensor": {"clip": "tensor"}, "two_pass": {"clip": "two_pass", "max_norm": 5.3}}


def run_on(model, optimizer, steps: range = range(STEPS), **options) -> dict[str, torch.Tensor]:
    """Weights after some steps, which begin with the same random numbers for dropout."""
    torch.manual_seed(1)
    return train(model, optimizer, steps, **options)


@pytest.mark.parametrize("loop", [*CLIPS, "backward"])
def test_ipsgd_is_torchs_sgd(loop):
    """With its clip_grad_norm_. Each group has its own rate, which changes, and decay; without a gradient torch needs
    zeros to decay it. Dropout is the same in both passes of "two_pass".

    Measured 6e-16 of the distance moved; with other dropout in the second pass 0.2."""
    clip = "none" if loop == "backward" else loop
    max_norm = CLIPS[clip].get("max_norm", 1.0)
    model, other, start = Net(), Net(), named(Net())
    by_name = dict(other.named_parameters())
    weights, follows = run_on(model, build("IPSGD", model, **CLIPS[clip]), loop=loop), torch.rand(1)
    groups = [(g["weight_decay"], g["param_names"]) for g in build("IPSGD", Net()).param_groups]
    sgd = torch.optim.SGD([{"params": [by_name[n] for n in names], "weight_decay": d} for d, names in groups])
    trained, shares = [p for g in sgd.param_groups for p in g["params"]], []
    torch.manual_seed(1)
    for step in range(STEPS):
        other.unused.grad = torch.zeros_like(other.unused)
        other(*inputs(step, slice(4, 11))).backward()
        for clipped in {"none": [], "tensor": [[p] for p in trained], "two_pass": [trained]}[clip]:
            shares.append(max_norm / torch.nn.utils.clip_grad_norm_(clipped, max_norm))
        set_rates(sgd, step)
        sgd.step()
        sgd.zero_grad()
    print(loop, apart(weights, named(other), start), shares)
    assert apart(weights, named(other), start) < 1e-12 and follows == torch.rand(1)
    assert clip == "none" or min(shares) < 0.9  # something was clipped
    assert clip == "none" or max(shares) > 1.05  # and something not
    assert {n for n in start if torch.equal(start[n], weights[n])} == {"back.weight", "back.bias"}


RULES = {
    **{f"adalomo {clip}": ("IPSGD", {"rule": "adalomo", **CLIPS[clip]}) for clip in CLIPS},
    **{f"addax {clip}": ("Addax", CLIPS[clip]) for clip in CLIPS},
    "addax rademacher": ("Addax", {"noise": "rademacher"}),
}


@pytest.mark.parametrize("rule", RULES)
def test_steps_follow_the_formula(rule):
    """AdaLomo of vectors, matrices and one parameter of three matrices. Addax with its zeroth-order half first, and
    without dropout; what has no gradient moves along the noise, and decays.

    Measured up to 9e-16 of the distance moved."""
    method, options = RULES[rule]
    model, start = Net(), named(Net())
    expected, random = by_hand(model, alpha=ALPHA * (method == "Addax"), **options), torch.rand(1)
    error = apart(run_on(model, build(method, model, **options)), expected, start)
    print(rule, error)
    assert error < 1e-12 and torch.rand(1) == random
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["MeZO", "IPSGD"])
def test_at_either_end_addax_is_another_method(method, dtype):
    """To the bit: MeZO on the zeroth-order half at alpha 1, IPSGD on the first-order half at alpha 0."""
    model, other = Net(dtype), Net(dtype)
    weights = run_on(model, build("Addax", model, alpha=1.0 if method == "MeZO" else 0.0))
    assert equal(weights, run_on(other, build(method, other))) and not equal(weights, named(Net(dtype)))


@pytest.mark.parametrize("empty", ["zo", "fo"])
@pytest.mark.parametrize("how", ["None", "counts 0"])
def test_a_half_without_samples_is_left_out(empty, how):
    """The other keeps its factor: as at the same rate times alpha, or times 1 - alpha."""
    model, other = Net(), Net()
    optimizer, reference = build("Addax", model), build("MeZO" if empty == "fo" else "IPSGD", other)
    for group in (*optimizer.param_groups, *reference.param_groups):
        group["weight_decay"] = 0.0
    torch.manual_seed(1)
    for step in range(STEPS):
        set_rates(optimizer, step)
        zo, fo = halves(model, step)
        loss = zo if empty == "zo" else fo
        nothing = None if how == "None" else lambda loss=loss: (loss()[0] * 0, 0)
        optimizer.step(nothing if empty == "zo" else zo, nothing if empty == "fo" else fo)
    expected = run_on(other, reference, scale=ALPHA if empty == "fo" else 1 - ALPHA)
    assert apart(named(model), expected, named(Net())) < 1e-7 and optimizer.skipped_steps == 0


@pytest.mark.parametrize("method", BOTH)
def test_residuals_lose_no_update(method):
    """At rates below a bf16 weight's precision. The weights are the same to the bit as with fp32 masters."""
    ends, kept, state, start = {}, {}, {}, full_parameters(Net(torch.bfloat16))
    for keep in ("residual", "fp32", "none"):
        model = Net(torch.bfloat16)
        optimizer, kept[keep] = build(method, model, keep=keep), []
        torch.manual_seed(1)
        for step in range(40):
            train(model, optimizer, range(step, step + 1), scale=1e-4 / (1 + step))
            kept[keep].append(optimizer.update_kept)
        ends[keep], state[keep] = full_parameters(model), sum(state_bytes(optimizer).values())
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lost = apart(ends["none"], ends["fp32"], start)
    print(lost, sum(kept["none"]) / 40, {keep: min(shares) for keep, shares in kept.items()})
    assert state == {"residual": 2 * total, "fp32": 4 * total, "none": 0}
    assert equal(ends["residual"], ends["fp32"]) and lost > 0.5 and sum(kept["none"]) / 40 < 0.5
    assert all(abs(share - 1) < 1e-5 for keep in ("residual", "fp32") for share in kept[keep])


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(16)))


def most_matrices(step) -> int:
    """That come to be at once in a step, beside what is there before."""
    with AliveBytes() as alive:
        before = alive.alive
        step()
    return (alive.peak - before) // 2**18


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("method", BOTH)
def test_no_set_of_gradients_is_ever_held(method, clip, monkeypatch):
    """Of 16 matrices one gradient is alive, and where it is clipped a second copy; 16 without the method."""
    monkeypatch.setattr(stored_weights, "PIECE", 2**10)  # temporary memory of an update, which is not to count here
    model, plain, x = layers(), layers(), torch.ones(1, 256)
    options = {} if method == "IPSGD" else {"length_threshold": None, "compiled": False}
    optimizer = METHODS[method].from_model(model, clip=clip, **options)
    most = most_matrices(lambda: optimizer.step(*[None] * (method == "Addax"), lambda: model(x).square().mean()))
    print(method, clip, most)
    assert 1 <= most <= (1 if clip == "none" else 2) and all(p.grad is None for p in model.parameters())
    assert most_matrices(lambda: plain(x).square().mean().backward()) >= 16


def test_checkpointed_activations_change_nothing():
    """Weights have moved by the time that layers below are computed again."""
    ends = []
    for checkpointed in (False, True):
        model = llama(tie_word_embeddings=True).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train_plain(model, METHODS["IPSGD"].from_model(model, lr=0.1), batches(STEPS))
        ends.append(named(model))
    assert equal(*ends) and not equal(ends[0], named(llama(tie_word_embeddings=True)))


def bits(model) -> dict[str, bytes]:
    return {name: p.detach().flatten().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def step_with(method: str, model, optimizer, zo_loss: float = 1.0, fo_loss: float = 1.0, root: bool = False) -> None:
    """A step whose losses are multiplied by factors, or that a parameter's root is added to."""

    def closure(rows: slice, factor: float):
        return model(*inputs(0, rows)) * factor + (model.unused[0, 0].sqrt() if root else 0.0)

    closures = functools.partial(closure, slice(4), zo_loss), functools.partial(closure, slice(4, 11), fo_loss)
    optimizer.step(*closures[method == "IPSGD" :])


NOT_FINITE = {
    "IPSGD": [{"fo_loss": math.nan}, {"fo_loss": math.inf}, {"root": True}],
    "Addax": [{"fo_loss": math.nan}, {"zo_loss": math.nan}, {"zo_loss": math.inf}, {"root": True}],
}


@pytest.mark.parametrize("method, factors", [(m, f) for m in BOTH for f in NOT_FINITE[m]], ids=str)
def test_what_is_not_finite_skips_the_step(method, factors):
    """A loss; in two passes the gradient too: that of the root of 0 is not. The run goes on as after it."""
    models = [Net(), Net()]
    with torch.no_grad():
        [model.unused.zero_() for model in models]
    optimizer, reference = (build(method, m, **CLIPS["two_pass" if "root" in factors else "none"]) for m in models)
    before = bits(models[0])
    step_with(method, models[0], optimizer, **factors)
    assert bits(models[0]) == before and (optimizer.steps, optimizer.skipped_steps) == (1, 1)
    assert all(p.grad is None for p in models[0].parameters())
    reference.set_progress(steps=1)
    assert equal(run_on(models[0], optimizer, range(1, 3)), run_on(models[1], reference, range(1, 3)))
    assert optimizer.skipped_steps == 1 and bits(models[0]) != before


def test_fp16_weights_train_with_a_loss_scale():
    """It halves until no gradient overflows, and doubles after 2,000 steps without.

    Measured 1e-3 of the distance moved from what fp32 weights do; with a scale that is not taken back, thousands."""
    options = {"clip": "two_pass", "keep": "fp32", "max_norm": 1.0}
    models = [Net(torch.float16), Net(torch.float16).float()]
    for model in models:
        model.body[2].p = 0.0  # fp16 draws other random numbers
    start, (optimizer, reference) = full_parameters(models[0]), (build("IPSGD", m, **options) for m in models)
    optimizer.set_progress(loss_scale=2.0**24)
    before = bits(models[0])
    while bits(models[0]) == before:
        train(models[0], optimizer, range(1))
        overflows = 24 - math.log2(optimizer.progress["loss_scale"])
        assert optimizer.skipped_steps == overflows == optimizer.steps - (bits(models[0]) != before)
    assert overflows >= 2
    train(models[0], optimizer, range(1, 4))
    train(models[1], reference, range(4))
    error = apart(full_parameters(models[0]), full_parameters(models[1]), start)
    print(overflows, error)
    assert error < 1e-2
    optimizer.set_progress(since_overflow=1999)
    train(models[0], optimizer, range(4, 5))
    assert math.log2(optimizer.progress["loss_scale"]) == 25 - overflows


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_bit_for_bit_in_a_new_model(method, dtype, tmp_path):
    """With residuals, AdaLomo's moments, and a step that was skipped."""
    options = {"clip": "tensor"} | ({"rule": "adalomo"} if method == "IPSGD" else {})
    model, resumed = Net(dtype), Net(dtype)
    optimizer, again = build(method, model, **options), build(method, resumed, **options)
    train(model, optimizer, range(2), scale=0.1)
    step_with(method, model, optimizer, fo_loss=math.nan)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file")
    expected = run_on(model, optimizer, range(3, 6), scale=0.1)
    train(resumed, again, range(1))  # what it knew before must go
    saved = torch.load(tmp_path / "file", weights_only=True)
    own = {"IPSGD": {"rule": "sgd"}, "Addax": {"alpha": 0.5}}[method]
    for key, value in {"clip": "none", "max_norm": 0.5, "keep": "fp32", **own}.items():
        other = build(method, Net(dtype), **options | {key: value})
        before = str(other.state_dict())
        message = refusal(other.load_state_dict, saved["optimizer"])
        assert f"needs {method}, {key} {value}. Resume with the method" in message
        assert str(other.state_dict()) == before
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert (again.steps, again.skipped_steps) == (3, 1)
    assert equal(run_on(resumed, again, range(3, 6), scale=0.1), expected)


def test_a_trajectory_tells_the_zeroth_order_half_and_cannot_be_replayed(tmp_path):
    """The first g is that of MeZO. Where no sample was in that half it is 0."""
    model, other = Net(), Net()
    torch.save(model.state_dict(), tmp_path / "start.bin")
    train(other, build("MeZO", other, trajectory=str(tmp_path / "MeZO")), range(1))
    optimizer = build("Addax", model, trajectory=str(tmp_path / "Addax"))
    train(model, optimizer, range(2))
    step_with("Addax", model, optimizer, zo_loss=math.nan)
    optimizer.step(None, halves(model, 3)[1])
    (_, expected), (header, records) = (read_trajectory(tmp_path / name) for name in ("MeZO", "Addax"))
    assert header.method == "Addax" and header.hyper["alpha"] == ALPHA and records["step"].tolist() == [0, 1, 2, 3]
    assert records["g"][0] == expected["g"][0] != 0 and records["g"][3] == 0
    assert [bool(flags & SKIPPED) for flags in records["flags"]] == [0, 0, 1, 0]
    message = refusal(replay, tmp_path / "start.bin", tmp_path / "Addax", tmp_path / "out.bin")
    assert "Addax is of Addax: it tells half of every step, not what gradients did." in message


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


WRONG = {
    ("lr", "IPSGD"): (-1, "a number in [0, 1e6]"), ("weight_decay", "Addax"): ("0.1", "a number in [0, 1e6]"),
    ("rule", "IPSGD"): ("adam", "'sgd' or 'adalomo'"), ("clip", "IPSGD"): ("norm", "'none', 'tensor' or 'two_pass'"),
    ("max_norm", "Addax"): (0, "a number in (0, 1e6]"), ("max_norm", "IPSGD"): (math.inf, "a number in (0, 1e6]"),
    ("keep", "IPSGD"): ("master", "'residual', 'fp32' or 'none'"), ("alpha", "Addax"): (1.1, "a number in [0, 1]"),
    ("length_threshold", "Addax"): (0, "an integer >= 1 or 'auto' or null"),
    ("zo_batch", "Addax"): (1.5, "an integer >= 1 or null"), ("fo_batch", "Addax"): (True, "an integer >= 1 or null"),
    ("memory_gib", "Addax"): (0, "a number in (0, 1e6] or null"), ("epsilon", "Addax"): (0, "a number in (0, 1]"),
    ("noise", "Addax"): ("uniform", "'gaussian' or 'rademacher'"), ("lockstep", "Addax"): (1, "true or false"),
}  # fmt: skip


@pytest.mark.parametrize("name, method", WRONG)
def test_a_hyper_parameter_out_of_range_is_refused(name, method):
    value, limit = WRONG[name, method]
    message = refusal(METHODS[method].from_model, Net(), **{name: value})
    assert f"{name}={value!r} is out of range: it must be {limit}" in message


@pytest.mark.parametrize("method", BOTH)
def test_what_cannot_work_is_refused(method):
    make = METHODS[method].from_model
    message = refusal(make, Net(torch.float16), keep="fp32", clip="tensor")
    assert 'clip="tensor" cannot take back a step whose fp16 gradients overflow. Use bf16, or clip="two' in message
    assert 'keep="residual" needs bf16 or fp32 weights, not fp16' in refusal(make, Net(torch.float16), clip="two_pass")
    assert f"'momentum' is no hyper-parameter of {method}" in refusal(make, Net(), momentum=0.9)
    assert f"{method} needs the model" in refusal(METHODS[method], Net().parameters())


def test_what_comes_before_a_step_or_does_not_is_told():
    """After a second backward, which counts for nothing, zero_grad lets a run go on."""
    model, other = Net(), Net()
    optimizer = build("IPSGD", model, lr=0.1)
    assert "IPSGD.step has no gradient to go by. Call loss.backward() before, or pass a" in refusal(optimizer.step)
    model(*inputs(0)).backward()
    other.load_state_dict(model.state_dict())
    message = refusal(model(*inputs(1)).backward)
    assert " got a second gradient before step(), but the first one has changed it already. Call step()" in message
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert equal(run_on(model, optimizer), run_on(other, build("IPSGD", other)))


@pytest.mark.parametrize(
    "method, clip, backward", [("IPSGD", "two_pass", 1), ("Addax", "none", 1), ("Addax", "none", 0)]
)
def test_a_step_without_a_closure_that_needs_one_is_told_in_time(method, clip, backward):
    """And with one the run goes on."""
    model, other = Net(), Net()
    optimizer, before = build(method, model, lr=0.1, clip=clip), bits(model)

    def unchanged_loop():
        if backward:
            model(*inputs(0)).backward()
        optimizer.step()

    assert "closure" in refusal(unchanged_loop) and bits(model) == before
    assert equal(run_on(model, optimizer), run_on(other, build(method, other, lr=0.1, clip=clip)))


@pytest.mark.parametrize("clip", ["none", "two_pass"])
@pytest.mark.parametrize("method, where, at", [("Addax", "forward", 3), *((m, w, 1) for m in BOTH for w in WHERE)])
def test_a_run_goes_on_after_an_exception(method, where, at, clip):
    """Weights are as before, but for a backward in one pass. No loss of the broken step counts in the next one.

    At the third forward of Addax, that of the first-order half, the zeroth-order half is known."""
    model, other, calls = Net(), Net(), []
    optimizer, before = build(method, model, lr=0.1, clip=clip), bits(model)

    def interrupt(*_):
        calls.append(where)
        if len(calls) == at:
            raise InterruptedError

    handle = getattr(model.body, f"register_{where}_hook")(interrupt)
    with pytest.raises(InterruptedError):
        optimizer.step(*halves(model, 1)[method == "IPSGD" :])
    handle.remove()
    assert (bits(model) == before) == (where == "forward" or clip == "two_pass")
    other.load_state_dict(model.state_dict())
    assert equal(run_on(model, optimizer), run_on(other, build(method, other, clip=clip)))
