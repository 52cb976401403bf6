"""Whatever stands in a DeepSpeed config: it is taken, or refused before anything is built, by its place in the file."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_memopt.engines.config_keys import Watched, known_keys, warn_of_typos
from ds_memopt.train.config import load_config
from ds_memopt.train.config_check import check_config
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.ranks import Ranks
from ds_memopt.train.settings import make_settings

ROOT = Path(__file__).resolve().parent.parent
ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def settings_of(content: dict | str, folder: Path):
    path = folder / "c.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return make_settings(PretrainOptions(deepspeed_config=str(path), output_dir=str(folder / "run")), ALONE)


REFUSED = {
    "zero_optimization.stgae is no key that DeepSpeed knows. Did you mean 'stage'?": {
        "zero_optimization": {"stgae": 2}
    },
    "zero_optimization.offload_optimizer.devise is no key that DeepSpeed knows. Did you mean 'device'?": {
        "zero_optimization": {"offload_optimizer": {"devise": "cpu"}}
    },
    "csv_monitor.enabld is no key that DeepSpeed knows. Did you mean 'enabled'?": {"csv_monitor": {"enabld": True}},
    "DeepSpeed does not read gradient_cliping, so it would have no effect. Did you mean 'gradient_clipping'?": {
        "gradient_cliping": 1.0
    },
    "DeepSpeed does not read activation_checkpointing.cpu_chekpointing, so it would have no effect. Did you mean": {
        "activation_checkpointing": {"cpu_chekpointing": True}
    },
    "DeepSpeed does not read optimizer.typ, so": {"optimizer": {"typ": "AdamW"}},
    "DeepSpeed does not read for_the_trainer, so it would have no effect. Remove it.": {"for_the_trainer": 1},
    "zero_optimization.stage is 7: Input should be 0, 1, 2, 3": {"zero_optimization": {"stage": 7}},
    "fp16.loss_scale is 'x': fp16.loss_scale must be a number": {"fp16": {"loss_scale": "x"}},
    "bfloat16 and fp16 modes cannot be simultaneously enabled": {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    "wall_clock_breakdown is 'yes': it must be true or false": {"wall_clock_breakdown": "yes"},
    "communication_data_type is 3, which DeepSpeed cannot read (": {"communication_data_type": 3},
    "steps_per_print is 'ten': it must be a number >= 0": {"steps_per_print": "ten"},
    "train_micro_batch_size_per_gpu is '4': it must be an integer >= 1": {"train_micro_batch_size_per_gpu": "4"},
    "bf16 is True: it must be an object": {"bf16": True},
    "optimizer.params is [1]: it must be an object": {"optimizer": {"type": "AdamW", "params": [1]}},
    "optimizer.params.lr is inf: it must be a finite number": {
        "optimizer": {"type": "Lamb", "params": {"lr": math.inf}}
    },
    "optimizer type 'adam_mini' is unknown; known are": {"optimizer": {"type": "adam_mini"}},
    "Did you mean 'AdamMini'?": {"optimizer": {"type": "AdmMini"}},
    "'wieght_decay' is no hyper-parameter of AdamW. Did you mean 'weight_decay'?": {
        "optimizer": {"type": "AdamW", "params": {"wieght_decay": 0.1}}
    },
    "optimizer SGD cannot be built with {'momentm': 0.9, ": {"optimizer": {"type": "SGD", "params": {"momentm": 0.9}}},
    "'eps' is AdamW's and has no meaning for MeZO": {"optimizer": {"type": "MeZO", "params": {"eps": 1e-8}}},
    "epsilon=1e-05 is out of range: it must be at least 1e-04 for weights in torch.bfloat16": {
        "optimizer": {"type": "Addax", "params": {"epsilon": 1e-5}},
        "bf16": {"enabled": True},
    },
    "include: '(' is not a regular expression": {"optimizer": {"type": "GWT", "params": {"include": ["("]}}},
    "scheduler type 'WarmUpLR' is unknown; known are": {"scheduler": {"type": "WarmUpLR"}},
    "scheduler type 'ReduceLROnPlateau' follows the loss, and DeepSpeed hands it the batch size": {
        "scheduler": {"type": "ReduceLROnPlateau"}
    },
    "scheduler WarmupDecayLR cannot be built with {'total_steps': 9}: ": {
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_steps": 9}}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mistake_is_told_by_its_place(message, tmp_path):
    with pytest.raises(ValueError) as error:
        settings_of({"optimizer": {"type": "AdamW"}} | REFUSED[message], tmp_path)
    assert message in str(error.value)


COMMENTED = """{
  // of the cluster
  "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},  # as before
  "zero_optimization": {"stage": 1},
}"""


def test_a_config_may_hold_what_deepspeed_reads(tmp_path):
    settled = settings_of(COMMENTED, tmp_path)
    assert (settled.config["optimizer"]["params"], settled.facts["zero_stage"]) == ({"lr": 1e-3}, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b" 2}', "c.json is not valid JSON: Expecting ':' delimiter: line 2 column 6"),
        ('{\n // c\n "a": {"b": 1\n', "c.json is not valid JSON: .*line 4"),
        ('{"a": {"b": 1,\n "b": 2}}', "c.json is not valid JSON: 'b' stands twice in one object: remove one"),
        (
            '{"optimizer": {"type": "AdamW", "params": {"lr": 1e400}}}',
            "c.json: optimizer.params.lr is inf: it must be a",
        ),
        (
            '{"optimizer": {"type": "AdamW"}, "bf16": {"enabled": tru\n}}',
            "c.json: bf16.enabled is 'tru': Input should be",
        ),
    ],
)
def test_a_slip_in_the_file_is_told_with_its_line_or_place(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_of(text, tmp_path)


SHIPPED = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
JUNK = st.sampled_from([
    None, True, 0, -1, 3, 2.5, 1e400, math.nan, 10**400, "", "auto", "x", "cpu", [], [1], {}, {"x": 1}, {"enabled": 1},
])  # fmt: skip
EXTRA = st.sampled_from(sorted(known_keys()) + ["my_own"])


def test_any_config_is_taken_or_refused(tmp_path):
    """Shipped configs with one value replaced, one key misspelt or one block added: 3 s."""
    seen = {"taken": 0, "refused": 0}

    def places(node, path=()):
        for key, value in node.items():
            yield (*path, key)
            yield from places(value, (*path, key)) if isinstance(value, dict) else ()

    @settings(derandomize=True, database=None, deadline=None, max_examples=200)
    @given(st.sampled_from(SHIPPED), st.integers(0, 99), st.sampled_from(["replace", "misspell", "add"]), EXTRA, JUNK)
    def check(name, place, change, extra, junk):
        config = load_config(ROOT / "ds_configs" / name)
        if change == "add":
            config[extra] = junk
        else:
            paths = list(places(config))
            *path, key = paths[place % len(paths)]
            holder = config
            for step in path:
                holder = holder[step]
            if change == "replace":
                holder[key] = junk
            else:
                holder[key + "_"] = holder.pop(key)
        try:
            settings_of(config, tmp_path)
        except ValueError:
            seen["refused"] += 1
        else:
            seen["taken"] += 1
            assert change != "misspell", config

    check()
    assert min(seen.values()) > 5, seen


def test_what_deepspeed_reads_is_found_by_watching():
    """Its documented keys among them; and a config that it reads is as it was."""
    assert {"zero_optimization", "fp16", "steps_per_print", "comms_logger", "tensorboard", "aio"} <= {*known_keys()}
    config = load_config(ROOT / "ds_configs" / "zero3_offload_gwt.json")
    before = copy.deepcopy(config)
    check_config(config, "c.json")
    assert config == before and json.loads(json.dumps(Watched(config))) == before


def test_with_deepspeed_alone_a_slip_at_the_top_is_a_warning(caplog):
    """There keys of other programs may stand."""
    config = {"train_batch_size": 4, "gradient_cliping": 1.0, "my_cluster": {"nodes": 2}}
    with caplog.at_level(logging.WARNING, "ds_memopt"):
        warn_of_typos(SimpleNamespace(_config=SimpleNamespace(_param_dict=config)))
    (record,) = caplog.records
    assert "not read 'gradient_cliping' of its config, so it has no effect. Did you mean 'gradient_clipping'?" in (
        record.getMessage()
    )


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [("lr", math.inf, "a number"), ("lr", math.nan, "a number"), ("seed", 2**40, "a number, at most 2147483647"),
     ("gradient_clipping", math.nan, "a number"), ("eps", -1.0, "at least 0")],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(option, value, limit, tmp_path):
    options = PretrainOptions(deepspeed_config=str(ROOT / "ds_configs/zero2_adamw.json"), **{option: value})
    with pytest.raises(ValueError, match=f"^--{option} {value} is out of range: it must be {limit}"):
        make_settings(options, ALONE)
