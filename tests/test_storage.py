"""States in bf16 and int8, masters as bf16 weights and remainders: formulas, placement, resume, what is refused."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import storage_ranks
import torch
from spawn import run_ranks
from storage_ranks import RULES, STEPS, STORAGES, alone, build, llama_of, plain_steps
from tiny import distance, full_parameters, llama

from ds_memopt.kernels import join
from ds_memopt.kernels.codes import CODES, decode, encode, split, to_bf16
from ds_memopt.kernels.noise_formulas import NoiseSource, elements
from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.badam import BAdam
from ds_memopt.optimizers.block_state.storage import tell_of_remainders

BITS = torch.arange(256, dtype=torch.int32)


def spread(count: int, seed: int = 0) -> torch.Tensor:
    """Over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * torch.rand(count, generator=generator) ** 6


@pytest.mark.parametrize("code", CODES)
def test_codes_are_right_on_average_and_come_back_as_they_were(code):
    """Over all 256 values of the random bits the mean is off by less than a part in 256 of a step between codes, and
    every value lies between two neighbouring codes."""
    dtype = CODES[code]
    values = spread(2000) if code == "signed" else spread(2000).square()
    scales = values.abs().max().expand(len(values))
    codes = torch.stack([encode(values, scales, dtype, bits.expand(len(values))) for bits in BITS])
    decoded = decode(codes, scales)
    low = codes.int().abs().amin(0)
    assert (codes.int().abs().amax(0) - low <= 1).all()
    gap = decode((low + 1).clamp(max=127 if code == "signed" else 255).to(dtype), scales) - decode(
        low.to(dtype), scales
    )
    lifted = (values.abs() < decode(torch.ones_like(codes[0]), scales)) & (code == "unsigned")
    bias = (decoded.double().mean(0) - values).abs()
    assert (bias <= gap / 256 + 1e-6 * values.abs())[~lifted].all() and not lifted.all()
    assert (encode(decoded[7], scales, dtype, None) == codes[7]).all()
    assert decode(encode(scales[:1], scales[:1], dtype, None), scales[:1]) == scales[0]


def test_second_moments_that_are_not_all_zero_have_codes_above_zero():
    values, scales = torch.tensor([1e-20, 0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for bits in BITS:
        assert encode(values, scales, torch.uint8, bits.expand(4)).tolist() == [1, 1, 255, 0]


def test_what_is_no_number_stays_none():
    """The scale of its group is none, and so is all of the group."""
    values = torch.tensor([1.0, float("nan")])
    scales = torch.full((2,), float("nan"))
    assert decode(encode(values, scales, torch.int8, BITS[:2]), scales).isnan().all()
    assert to_bf16(torch.tensor([float("nan"), float("inf")]), BITS[:2]).isfinite().sum() == 0


def test_bf16_is_rounded_at_random_and_right_on_average():
    values = spread(2000)
    rounded = torch.stack([to_bf16(values, bits.expand(len(values))).float() for bits in BITS])
    assert (rounded.amin(0) != rounded.amax(0)).float().mean() > 0.95
    assert ((rounded.double().mean(0) - values).abs() <= 2.0**-7 * values.abs() / 256).all()
    exact = values.bfloat16().float()
    assert (to_bf16(exact, BITS[255].expand(len(exact))).float() == exact).all()


def test_sixteen_bits_lose_nothing():
    """Ties included, of which every second has no remainder that fits where the even number is taken."""
    masters = torch.cat([spread(10_000), torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, 1e-45])])
    masters[:2000] = ((masters[:2000].view(torch.int32) & ~0xFFFF) | 0x8000).view(torch.float32)
    weights, remainders = split(masters, torch.int16, None)
    assert torch.equal(join(weights, remainders).view(torch.int32), masters.view(torch.int32))
    nearest = masters.bfloat16()
    tied = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert (weights == nearest)[~tied].all() and 500 < (weights != nearest).sum() < 1500
    assert ((weights.float() - masters).abs() == (nearest.float() - masters).abs())[: len(masters) - 4].all()


def test_eight_bits_are_right_on_average():
    """To 2^-16 of a number, in any one rounding; the mean to a 256th of that. All but one in 256 of the remainders
    just below half a unit, which stop at 127."""
    masters = spread(4000)
    weights = split(masters, torch.int8, BITS[:1].expand(4000))[0]
    joined = torch.stack([join(*split(masters, torch.int8, bits.expand(4000))) for bits in BITS])
    unit = 2.0**-15 * masters.abs()
    assert ((joined - masters).abs() <= unit).all()
    inside = masters.view(torch.int32) - weights.float().view(torch.int32) <= 127 * 256
    assert inside.float().mean() > 0.99
    assert ((joined.double().mean(0) - masters).abs() <= unit / 200)[inside].all()


def test_rounding_bits_are_the_bytes_of_philox():
    """Any slice is the slice of the whole, and 0 to 255 come equally often: 1 % of 40,000 / 256 is 2 sigma of 5."""
    source = NoiseSource("rounding", 0x243F6A8885A308D3, 5, 2)
    whole = elements(source, 0, 40_000, torch.device("cpu"))
    assert torch.equal(elements(source, 1237, 500, torch.device("cpu")), whole[1237:1737])
    counts = torch.bincount(whole, minlength=256)
    assert len(counts) == 256 and ((counts - 156.25).abs() < 5 * 12.5).all()


@pytest.mark.parametrize("rule", RULES)
def test_remainders_of_16_bits_are_fp32_masters_bit_for_bit(rule):
    """200 steps beside fp32 weights with the same gradients."""
    narrow, wide = llama_of("bf16"), llama()
    wide.load_state_dict({name: p.float() for name, p in narrow.state_dict().items()})
    ours, reference = build(rule, "bf16, remainder16", narrow), build(rule, "fp32", wide)
    plain_steps(ours, narrow, range(200))
    for step in range(200):
        found = storage_ranks.gradients(step)
        for name, p in wide.named_parameters():
            p.grad = found[name].float()
        reference.step()
    lost = 0
    for p, master in zip(narrow.parameters(), wide.parameters(), strict=True):
        remainder = ours.state[p]["master_remainder"]
        assert remainder.dtype == torch.int16
        assert torch.equal(join(p.detach(), remainder), master)
        lost += (p.detach().float() != master).sum().item()
        for key, value in reference.state[master].items():
            assert torch.equal(ours.state[p][key], value), key
    assert lost > 40_000  # nearly all masters are more than their weights


@functools.cache
def reference(rule: str, storage: str):
    model, optimizer = alone(rule, storage)
    return {(part.name, part.key): part.values for part in optimizer.named_state()}, full_parameters(model)


def masters_of(weights: torch.Tensor, remainders: torch.Tensor) -> torch.Tensor:
    return join(weights.bfloat16(), remainders.view(weights.shape))


@functools.cache
def runs(world_size: int) -> list[dict]:
    return run_ranks(storage_ranks.everywhere, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_placement_changes_neither_codes_nor_masters(world_size):
    """Where gradients are equal to the bit so are codes and scales, and what else has no sum over ranks; the weights
    differ as those with fp32 states do, by 1e-6 of the movement, and where rounded by a unit here and there. Groups
    whose ranks take what they hold for the whole are off, which the last lines assert. Under ZeRO with bf16 weights
    alone masters are those of one process, which are those of fp32 bit for bit: `lost` is what the weights lack."""
    ranks, start = runs(world_size), full_parameters(llama())
    for rule, storage, placement in ranks[0]:
        if placement == "open maxima":
            continue
        state, weights = reference(rule, storage)
        found = [rank[rule, storage, placement] for rank in ranks]
        if "int8" in storage:
            cut = found[0]["cut"]
            groups = sum(count for key, count in cut.items() if key.endswith("_scale"))
            assert groups > 0, (rule, storage, placement, "no group is cut")
            assert placement == "fsdp2" or cut.get("block", 1) > 0, (rule, storage, placement, "no block is cut")
        seen = set()
        for part in (part for rank in found for part in rank["parts"]):
            whole = state[part.name, part.key][part.start : part.stop]
            seen.add((part.name, part.key))
            if part.key == "step" or part.key.startswith("exp_avg"):
                assert torch.equal(part.values, whole), (rule, storage, placement, part.name, part.key)
        assert seen == state.keys()
        apart = distance(found[0]["weights"], weights) / distance(weights, start)
        print(f"N={world_size} {rule:15} {storage:25} {placement:6} {apart:.1e}")
        assert apart < (1e-3 if storage.startswith("bf16") else 1e-5), (rule, storage, placement)
        if storage.startswith("bf16") and placement != "fsdp2":
            assert found[0]["masters"] == 0
            remainders = {name: torch.zeros(whole.numel(), dtype=torch.int16) for name, whole in weights.items()}
            for part in (part for rank in found for part in rank["parts"] if part.key == "master_remainder"):
                remainders[part.name][part.start : part.stop] = part.values
            expected = {name: masters_of(weights[name], state[name, "master_remainder"]) for name in weights}
            ours = {name: masters_of(found[0]["weights"][name], rest) for name, rest in remainders.items()}
            apart = distance(ours, expected) / distance(expected, start)
            lost = distance(found[0]["weights"], expected) / distance(expected, start)
            print(f"masters: {apart:.1e}, weights: {lost:.1e}")
            assert apart < (1e-3 if "remainder8" in storage else 1e-5) < lost, (rule, storage, placement)
    wrong = [rank["AdamMini", "fp32, int8", "open maxima"] for rank in ranks]
    state, _ = reference("AdamMini", "fp32, int8")
    parts = [part for rank in wrong for part in rank["parts"] if part.key == "exp_avg_scale"]
    assert any(not torch.equal(part.values, state[part.name, part.key][part.start : part.stop]) for part in parts)


@pytest.mark.parametrize("rule", RULES)
def test_state_by_name_goes_on_bit_for_bit_and_may_change_its_storage(rule):
    """From 2 ranks of FSDP2 to one process; then between storages: to fp32 what was kept is what is loaded, and from
    fp32 each entry to its nearest code, whose square root is half a step of 127, of a fourth root of 255, away."""
    for storage in STORAGES:
        model, optimizer = alone(rule, storage)
        fresh = build(rule, storage, model)
        parts = [part._replace(values=part.values.clone()) for part in optimizer.named_state()]
        if storage == "fp32, int8":
            parts = [part for rank in runs(2) for part in rank[rule, storage, "fsdp2"]["parts"]]
            state, _ = reference(rule, storage)
        fresh.load_named_state(parts, optimizer.progress)
        if storage != "fp32, int8":
            for p in model.parameters():
                for key, value in optimizer.state[p].items():
                    assert torch.equal(fresh.state[p][key], value), (storage, key)
    _, narrow = alone(rule, "fp32, int8")
    wide = build(rule, "fp32", llama())
    wide.load_named_state(narrow.named_state(), narrow.progress)
    held = {(part.name, part.key): part.values for part in narrow.named_state()}
    for part in wide.named_state():
        assert torch.equal(part.values, held[part.name, part.key])
    again = build(rule, "fp32, int8", llama())
    again.load_named_state(wide.named_state(), wide.progress)
    for part in again.named_state():
        assert torch.equal(part.values, held[part.name, part.key]), part.key


def test_a_remainder_goes_to_fewer_bits_and_back():
    model, optimizer = alone("AdamMini", "bf16, remainder16")
    eight = build("AdamMini", "bf16, int8, remainder8", model)
    eight.load_named_state(optimizer.named_state(), optimizer.progress)
    none = [part for part in optimizer.named_state() if part.key != "master_remainder"]
    for p in model.parameters():
        exact = join(p.detach(), optimizer.state[p]["master_remainder"])
        near = join(p.detach(), eight.state[p]["master_remainder"])
        assert ((near - exact).abs() <= 2.0**-15 * exact.abs()).all() and not torch.equal(near, p.float())
    eight.load_named_state(none, optimizer.progress)
    assert not any(eight.state[p]["master_remainder"].any() for p in model.parameters())


def test_a_state_dict_resumes_bit_for_bit_or_says_what_it_lacks():
    for storage in ("fp32, int8", "bf16, int8, remainder8"):
        model, optimizer = alone("GWT", storage)
        twin = llama_of(storage)
        twin.load_state_dict(model.state_dict())
        resumed = build("GWT", storage, twin)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, other in ((optimizer, model), (resumed, twin)):
            plain_steps(one, other, range(STEPS, STEPS + 3))
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    message = "keeps approximation_code. Set state_dtype and masters as in the run that saved it, or take its state"
    with pytest.raises(ValueError, match=re.escape(message)):
        build("GWT", "fp32, int8", llama()).load_state_dict(alone("GWT", "fp32", 1)[1].state_dict())


def test_bad_values_are_refused():
    for values, message in (
        ({"state_dtype": "int4"}, "state_dtype='int4' is out of range: it must be 'fp32', 'bf16' or 'int8'."),
        ({"masters": "none"}, "masters='none' is out of range: it must be 'fp32', 'remainder16' or 'remainder8'."),
        ({"masters": "remainder8"}, "masters='remainder8' is for bf16 weights that the optimizer updates itself, but "),
    ):
        for method in ("AdamMini", "GWT"):
            with pytest.raises(ValueError, match=re.escape(message)):
                METHODS[method].from_model(llama(), **values)
    with pytest.raises(ValueError, match="base_options: masters='remainder16' is not for BAdam"):
        BAdam.from_model(llama(), base="adam_mini", base_options={"masters": "remainder16"})


def test_the_first_step_tells_of_remainders(caplog):
    tell_of_remainders.cache_clear()
    with caplog.at_level("INFO", logger="ds_memopt"):
        model = llama().bfloat16()
        optimizer = METHODS["AdamMini"].from_model(model)
        plain_steps(optimizer, model, range(1))
    assert "No fp32 masters of bf16 weights: what they lack is kept in 16 bits, masters='fp32'." in caplog.text
