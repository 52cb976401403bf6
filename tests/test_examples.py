"""The examples for other people's programs train as loops of our own do."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex

import pytest
import torch
import yaml
from examples_ranks import EXAMPLES, in_torchtitan, trained_by_trainer
from spawn import run_ranks
from test_roles import by_channel, by_head, zeroed_by_blocks
from torch import nn

from ds_memopt.blocks import assign_blocks
from ds_memopt.optimizers import METHODS
from ds_memopt.support import SUPPORT

needs_torchtitan = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan is not installed: pip install --no-deps -r tests/torchtitan.txt",
)


def largest(one: dict, other: dict) -> float:
    """The largest distance between weights of the same names."""
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_trainer_under_fsdp2(tmp_path):
    """Trainer's FSDP2 beside its DistributedDataParallel, three steps of each method: FSDP2 cuts the norms' blocks.
    Measured 1.2e-7 (AdamMini), 5.6e-7 (GWT) and 9.4e-7 (CAME); an AdamMini whose halves of a norm took their second
    moments apart would be off by 3e-4."""
    for rank in run_ranks(trained_by_trainer, 2, str(tmp_path)):
        assert list(rank) == ["AdamMini", "GWT", "CAME"]
        for method, trained in rank.items():
            assert largest(trained["before"], trained["DDP"]) > 1e-3, method
            assert largest(trained["DDP"], trained["FSDP2"]) < 3e-6, method


@pytest.mark.parametrize(
    ("file", "module", "auto"),
    [
        (
            "llama_factory.yaml",
            "llamafactory.launcher",
            "learning_rate weight_decay per_device_train_batch_size gradient_accumulation_steps bf16",
        ),
        (
            "axolotl.yaml",
            "axolotl.cli.train",
            "learning_rate weight_decay micro_batch_size gradient_accumulation_steps bf16",
        ),
    ],
)
def test_a_yaml_names_a_ds_config_and_fills_it(file, module, auto):
    """These programs are too large for the suite. They ran by hand, as launch/README.md tells."""
    text = (EXAMPLES / file).read_text()
    settings = yaml.safe_load(text)
    config = json.loads((EXAMPLES.parent.parent / settings["deepspeed"]).read_text())
    assert config["optimizer"]["type"] in METHODS and set(config["optimizer"]["params"].values()) == {"auto"}
    assert all(settings[key] for key in auto.split())
    (command,) = re.findall(r"^# +(torchrun .*)$", text, re.MULTILINE)
    words = shlex.split(command)
    assert words[3:] == ["-m", "ds_memopt.run", "-m", module, f"launch/examples/{file}"]
    assert command in (EXAMPLES.parent / "README.md").read_text()


@needs_torchtitan
def test_torchtitan(tmp_path):
    """In torchtitan's container under FSDP2 beside an optimizer of the whole model. Measured 7.5e-9 (AdamMini), 0 (GWT)
    and 3.6e-7 (CAME, whose weights move by 0.1); a halved norm would be off as above, and so would each step be that
    torchtitan's making of the state counted. A pipeline is refused."""
    for by_method, message in run_ranks(in_torchtitan, 2, str(tmp_path)):
        assert list(by_method) == ["AdamMini", "GWT", "CAME"]
        for method, trained in by_method.items():
            assert largest(trained["before"], trained["alone"]) > 1e-3, method
            assert largest(trained["alone"], trained["sharded"]) < 1e-6, method
        assert "as in a pipeline" in message and "set parallelism.pipeline_parallel_degree to 1" in message


@needs_torchtitan
def test_torchtitan_refuses_what_its_loop_cannot_run():
    from torchtitan.components.optimizer import ParamGroupConfig

    from ds_memopt.torchtitan_optimizers import NamedOptimizersContainer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(4, 6, bias=False), nn.RMSNorm(6)

    def build(*groups: tuple[str, str, dict]) -> NamedOptimizersContainer:
        config = NamedOptimizersContainer.Config(
            param_groups=[ParamGroupConfig(pattern=p, optimizer_name=n, optimizer_kwargs=k) for p, n, k in groups]
        )
        return config.build(model_parts=[Net()])

    def raises(message: str):
        return pytest.raises(ValueError, match=re.escape(message))

    mixed = build(("norm", "AdamW", {"lr": 1e-3}), (".*", "AdamMini", {"lr": 1e-3}))
    state = mixed.state_dict()
    assert {"state.norm.weight.exp_avg", "method.1.up.weight:block_exp_avg_sq"} <= set(state)
    mixed.load_state_dict(state)
    with raises(f"MeZO does not support torchtitan: {SUPPORT['MeZO']['torchtitan'].note}"):
        build((".*", "MeZO", {"lr": 1e-3}))
    with raises("GWT has level=2 in one param group and 3 in another, but it holds for the whole optimizer"):
        build(("norm", "GWT", {"lr": 1e-3, "level": 2}), (".*", "GWT", {"lr": 1e-3, "level": 3}))
    with raises("leave release_gradients out"):
        build((".*", "AdamMini", {"lr": 1e-3, "release_gradients": True}))
    with raises("levle"):
        build((".*", "GWT", {"lr": 1e-3, "levle": 2}))


@needs_torchtitan
def test_blocks_of_torchtitans_fused_matrix_are_heads_and_value_rows():
    """Zeroing one block makes one query head, one key head or one channel of the values vanish, with 2 query heads for
    each key head."""
    from torchtitan.models.common.attention import FusedQKVLinear
    from torchtitan.models.common.linear import Linear

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = Linear.Config(in_features=16, out_features=(4 + 2 * 2) * 4, bias=False)
            self.n_heads = 4
            self.qkv_linear = FusedQKVLinear.Config(head_dim=4, n_heads=4, n_kv_heads=2, wqkv=linear).build()

        def parts(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            queries, keys, values = (part.flatten(-2) for part in self.qkv_linear(x))
            return by_head(queries, 4, "q") | by_head(keys, 2, "k") | by_channel(values)

    module, x = Attention(), torch.randn(2, 3, 16)
    weight = module.qkv_linear.wqkv.weight
    weight.data.normal_()
    blocks = assign_blocks(module)["qkv_linear.wqkv.weight"]
    zeroed = zeroed_by_blocks(lambda: module.parts(x), weight, blocks)
    assert all(len(vanished) == 1 for vanished in zeroed) and sorted(v for (v,) in zeroed) == sorted(module.parts(x))
