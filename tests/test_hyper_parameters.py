"""Whatever a hyper-parameter is given, it is refused by its name, or the optimizer makes a step with it."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_memopt.blocks import matching
from ds_memopt.optimizers import METHODS


class Net(nn.Module):
    """Layers to rotate through, and a matrix of each kind that a rule tells apart."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)}) for _ in "ab")
        self.head = nn.Linear(8, 7)
        self.to(dtype)

    def forward(self) -> torch.Tensor:
        x = self.embed(torch.arange(7))
        for layer in self.layers:
            x = x + layer["mlp"](torch.tanh(layer["q_proj"](x)))
        return self.head(x).float().logsumexp(-1).mean()


NUMBERS = [
    0, -1, 1, 2, 3, 0.5, 0.1, 1e-3, 1e-8, 1e-60, 5e-324, 1 - 2**-53, 1.01, 1e6, 1e7, 1e30, 1e39, 1e300, 2**31, 2**63,
    2**64, 10**400, math.inf, -math.inf, math.nan, -0.0, True, False,
]  # fmt: skip
TENSORS = [torch.tensor(1e-3), torch.tensor([1e-3, 1e-3]), torch.tensor([]), torch.tensor(1j), torch.tensor(math.nan)]
ARRAYS = [np.float64(1e-3), np.float32(1e-3), np.int64(1), np.array([1e-3, 1e-3])]
PATTERNS = ["mlp", "(", "*", "(?R)", "(.|.)*[!?]", "((a{999}){999}){999}", "", "x" * 10_000, "\0"]
WORDS = [
    "auto", "fp32", "bf16", "rows", "whole", "random", "fixed", "ascending", "layer", "sublayer", "adamw", "adam_mini",
    "gwt", "adam", "paper", "gaussian", "rademacher", "one_sided", "residual", "fp32", "none", "adalomo", "tensor",
    "two_pass", "1e-3",
]  # fmt: skip
LEAVES = [None, *NUMBERS, *TENSORS, *ARRAYS, *WORDS, *PATTERNS]
leaves = st.sampled_from(LEAVES)
values = leaves | st.lists(leaves, max_size=2) | st.lists(st.lists(leaves, max_size=2), max_size=2)
values |= st.tuples(leaves, leaves) | st.dictionaries(
    st.sampled_from(["level", "lr", "head_dim", "x"]), leaves, max_size=2
)


def step(optimizer: torch.optim.Optimizer, model: Net, method: str) -> None:
    if method == "Addax":
        optimizer.step(model, model)
    elif method in ("MeZO", "IPSGD"):
        optimizer.step(model)
    else:
        model().backward()
        optimizer.step()


def attempt(method: str, values: dict) -> bool:
    """Whether the method takes the values, and makes a step to finite weights; if not, it has named one of them."""
    base = {"compiled": False} if "compiled" in METHODS[method].hyper_parameters.rules() else {}
    if values.get("compiled", False) is None:
        return True  # right, and slow: it compiles at once
    model = Net()
    try:
        optimizer = METHODS[method].from_model(model, **base | values)
    except ValueError as error:
        assert any(re.search(rf"\b{name}\b", str(error)) for name in values), error
        return False
    if values.get("probes", 1) <= 10 and not values.get("compiled"):  # else right, and slow
        step(optimizer, model, method)
        assert all(p.isfinite().all() for p in model.parameters()), values
    return True


def rules_and_fitting(method: str) -> tuple[dict, dict[str, list]]:
    """The method's rules, and for each what it accepts of some values."""
    rules = {
        name: rule for name, rule in METHODS[method].hyper_parameters.rules().items() if name != "trajectory"
    }  # it writes files
    some = [*LEAVES, [], ["mlp"], (0.9, 0.95), [0, 0.99]]
    return rules, {name: [value for value in some if rule.accepts(value)] for name, rule in rules.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_extremes_that_a_rule_accepts_make_a_step(method):
    """lr=inf, scale=inf, limiter=1e39, eps=1e-60 and probes=2**31 were accepted once."""
    rules, fitting = rules_and_fitting(method)
    made = 0
    for name in rules:
        numbers = sorted(value for value in fitting[name] if isinstance(value, int | float))
        made += sum(attempt(method, {name: value}) for value in numbers[:1] + numbers[-1:])
    assert made > 4


@pytest.mark.parametrize("method", METHODS)
def test_any_two_values_are_refused_by_name_or_make_a_step(method):
    """head_dim="x" and compiled="yes" were accepted once, and a list for a word was another error."""
    rules, fitting = rules_and_fitting(method)
    either = st.tuples(st.sampled_from(sorted(rules)), st.booleans())
    any_value = either.flatmap(
        lambda one: st.tuples(st.just(one[0]), st.sampled_from(fitting[one[0]]) if one[1] else values)
    )
    seen = {True: 0, False: 0}

    @settings(derandomize=True, database=None, deadline=None, max_examples=50)
    @given(st.lists(any_value, min_size=1, max_size=2).map(dict))
    def check(given_values):
        seen[attempt(method, given_values)] += 1

    check()
    assert min(seen.values()) > 5, seen


@pytest.mark.parametrize("method", METHODS)
def test_every_hyper_parameter_has_a_rule(method):
    taken = set(inspect.signature(METHODS[method]).parameters) - {"params", "model"}
    assert taken == set(METHODS[method].hyper_parameters.rules())


SLOW = "takes more than 1.0 s to search 300 names. Write it without a repetition inside a repetition."


@pytest.mark.parametrize(
    "pattern, message",
    {
        "(": "'(' is not a regular expression (missing ) at position 1). Correct it.",
        "(.|.)*[!?]": SLOW,
        "((a{999}){999}){999}": "multiply to more than 10,000 repetitions. Write + or *.",
        "q_prj": "matches none of 300 parameters, such as 'layers.0.self_attn.q_proj.weight', ",
    }.items(),
)
def test_a_wrong_regular_expression_is_told(pattern, message):
    """The second would take 2^30 steps for each name."""
    with pytest.raises(ValueError) as error:
        matching("include", pattern, [f"layers.{number}.self_attn.q_proj.weight" for number in range(300)])
    assert message in str(error.value) and str(error.value).startswith("include: ")


@pytest.mark.parametrize(
    "method, word", [("MeZO", "betas"), ("IPSGD", "eps"), ("Addax", "eps"), ("AdamMini", "torch_adam")]
)
def test_a_word_of_adamw_is_not_taken_for_another(method, word):
    """Who followed "Did you mean 'epsilon'?" probed with Adam's 1e-8."""
    with pytest.raises(ValueError) as error:
        METHODS[method].from_model(Net(), **{word: 1e-8})
    message = str(error.value)
    assert f"{word!r} is AdamW's and has no meaning for {method}: leave it out." in message and "mean '" not in message
    assert ("1e-8 the loss would differ by rounding" in message) == (method == "Addax")


@pytest.mark.parametrize("dtype, least", [(torch.float64, 1e-8), (torch.float32, 1e-7), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("method", ["MeZO", "Addax"])
def test_an_epsilon_below_rounding_is_refused(method, dtype, least):
    make = METHODS[method].from_model
    make(Net(dtype), epsilon=least, compiled=False)
    with pytest.raises(
        ValueError, match=f"^epsilon=.* must be at least {least:.0e} for weights in {dtype}, or the two"
    ):
        make(Net(dtype), epsilon=0.9 * least, compiled=False)


def test_a_group_of_its_own_hyper_parameters_is_checked():
    model = Net()
    for method, name in (("AdamMini", "betas"), ("IPSGD", "weight_decay"), ("MeZO", "lr")):
        groups = [{"params": list(model.parameters()), name: math.inf}]
        with pytest.raises(ValueError, match=f"^{name}=inf is out of range"):
            METHODS[method].from_model(model, groups)
