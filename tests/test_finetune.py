"""The fine-tuning job: its rows, its accuracy, where its weights come from, and runs on several ranks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file, save_file
from spawn import run_ranks, run_script
from tiny import equal_tensors

from ds_memopt.optimizers import METHODS
from ds_memopt.results import comparison
from ds_memopt.results.record import read_metrics
from ds_memopt.train.data import rows
from ds_memopt.train.data.order import StepBatches
from ds_memopt.train.evaluation import evaluate
from ds_memopt.train.finetune_job import finetune
from ds_memopt.train.loop import build_engine, pretrain
from ds_memopt.train.options import FinetuneOptions, PretrainOptions
from ds_memopt.train.output_folder import LOCK
from ds_memopt.train.presets import build_model, find_trained, trained_folder
from ds_memopt.train.ranks import start_ranks
from ds_memopt.train.settings import make_settings

ROOT = Path(__file__).parent.parent
VALIDATION = ("validation_loss", "validation_accuracy")
BYTES = rows.find_encoder(None, "no folder", 256)


def llama(**changes) -> transformers.LlamaConfig:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=256)
    return transformers.LlamaConfig(**sizes | dict(max_position_embeddings=64, num_key_value_heads=1) | changes)


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def sums(count: int, choices: bool) -> list[dict]:
    """Rows of many lengths, of prompt and of completion."""
    lines = [{"prompt": f"{7**i % 1000} + {3**i} =", "completion": f" {7**i % 1000 + 3**i}"} for i in range(count)]
    if choices:
        for i, line in enumerate(lines):
            line["choices"] = [line["completion"], " 12", " 7 or 8", f" {i}"][: 2 + i % 3]
    return lines


# --- rows ---


def test_labels_are_the_completion_alone():
    row = rows._encode({"prompt": "ab", "completion": "cde"}, BYTES)
    batch = rows.collate([row.pair, ([7], [8])])
    assert batch["input_ids"].tolist() == [[97, 98, 99, 100, 101], [7, 8, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 99, 100, 101], [-100, 8, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def tokenizer(folder: Path, bos: bool) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {"<eos>": 0, "<bos>": 1, "<unk>": 2, "one": 3, "two": 4, "three": 5}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        words.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bos", [False, True])
def test_a_tokenizer_of_the_model_folder_gives_bos_and_eos(tmp_path, bos):
    encoder = rows.find_encoder(None, tokenizer(tmp_path / "t", bos), vocab_size=6)
    line = {"prompt": "one two", "completion": "three", "choices": ["two", "three", "one one"]}
    (row,) = rows.load_rows(write(tmp_path / "a.jsonl", [line]), encoder, 5 + bos, 6)
    assert row.prompt == [1] * bos + [3, 4]
    assert row.candidates == [[5, 0], [4, 0], [3, 3, 0]]
    with pytest.raises(ValueError, match="a.jsonl, line 1: token id 5, but the model embeds 5"):
        rows.load_rows(str(tmp_path / "a.jsonl"), encoder, 8, 5)
    for change, message in (
        ({"choices": ["three", "four", "five"]}, "line 1: some of the choices .* have the same tokens"),
        ({"prompt": " "}, "line 1: ' ' has no tokens in this tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            rows.load_rows(write(tmp_path / "b.jsonl", [line | change]), encoder, 8, 6)


def test_a_model_without_tokenizer_needs_one(tmp_path):
    with pytest.raises(ValueError, match="the model embeds 300 ids and needs the Hugging Face tokenizer"):
        rows.find_encoder(None, str(tmp_path), 300)
    with pytest.raises(ValueError, match="--tokenizer nowhere: no such folder"):
        rows.find_encoder("nowhere", str(tmp_path), 256)


GOOD = b'{"prompt": "a", "completion": "b", "id": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'prompt'", "line 2: no JSON: Expecting property name"),
        (b"", "line 2: no JSON"),
        (b'{"prompt": "\xff", "completion": "b"}', "line 2: no JSON: .*can't decode"),
        (b'["a", "b"]', "line 2: a JSON object is needed, this is a list"),
        (b'{"prompt": "a"}', "line 2: the field 'completion' must be a string that is not empty, it is None"),
        (b'{"prompt": "", "completion": "b"}', "line 2: the field 'prompt' must be .* not empty, it is ''"),
        (b'{"prompt": 3, "completion": "b"}', "line 2: the field 'prompt' must be a string .* it is 3"),
        (b'{"prompt": "a", "completion": "b", "choices": "bc"}', "'choices' must be a list of strings"),
        (b'{"prompt": "a", "completion": "b", "choices": ["b", 3]}', "'choices' must be a list of strings"),
        (b'{"prompt": "a", "completion": "b", "choices": ["b"]}', "the completion 'b' and others, each once"),
        (b'{"prompt": "a", "completion": "b", "choices": ["c", "d"]}', "the completion 'b' and others"),
        (b'{"prompt": "a", "completion": "b", "choices": ["b", "c", "c"]}', "each once"),
        (
            b'{"prompt": "abc", "completion": "b", "choices": ["b", "cd"]}',
            "line 2: prompt and completion have 5 tokens, more than --seq_length 4; 1 of 3 rows .* raise --seq_length",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=f"data.jsonl, {message}" if message.startswith("line") else message):
        rows.load_rows(str(path), BYTES, 4, 256)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*none.jsonl: No such file"):
        rows.load_rows(str(tmp_path / "none.jsonl"), BYTES, 4, 256)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        rows.load_rows(str(tmp_path / "empty.jsonl"), BYTES, 4, 256)


def test_totals_count_what_the_ranks_see():
    data = [rows._encode(line, BYTES) for line in sums(11, choices=False)]
    tokens, targets = rows.totals(data, StepBatches(data, 4, 1, 0, 1, 5, range(7)))
    seen = [0] * 7
    answers = [0] * 7
    for rank in range(2):
        order = StepBatches(data, 1, 2, rank, 2, 5, range(7))
        for index, batch in enumerate(rows.train_batches(data, order, targets, 2)):
            seen[index // 2] += int(batch["attention_mask"].sum())
            answers[index // 2] += int((batch["labels"] != -100).sum())
            assert batch["num_items_in_batch"] == targets[index // 2]
    assert targets == answers
    assert tokens == [sum(seen[:step]) for step in range(8)]


def test_task_is_balanced_and_holds_rows_out(tmp_path):
    words = ["launch/experiments/make_task.py", "--output_dir", tmp_path]
    assert run_script(*words, "--train_rows", 500).returncode == 0
    train, valid = ([json.loads(x) for x in (tmp_path / f"{n}.jsonl").open()] for n in ("train", "valid"))
    assert len(train) == 500 and 200 < len(valid) <= 400
    for part in (train, valid):
        assert sum(row["completion"] == ":" for row in part) * 2 == len(part) == len({row["prompt"] for row in part})
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    rows.load_rows(str(tmp_path / "train.jsonl"), BYTES, 32, 256)

    assert run_script(*words, "--long_tail", 300).returncode == 0
    train, valid = ([json.loads(x) for x in (tmp_path / f"{n}.jsonl").open()] for n in ("train", "valid"))
    lengths = sorted(len(row["prompt"]) for row in train)
    assert lengths[len(lengths) // 2] < 80 and 280 < lengths[-len(lengths) // 20] <= lengths[-1] <= 324
    assert [len(row["prompt"]) for row in valid] == sorted(len(row["prompt"]) for row in valid)
    last = [{row["prompt"].splitlines()[-1] for row in part} for part in (train, valid)]
    assert len(train) == 8000 and len(valid) > 200 and not last[0] & last[1]


# --- where the weights come from ---


def test_wrong_folders_are_refused(tmp_path):
    def refusal(name) -> str:
        with pytest.raises(ValueError) as error:
            trained_folder(str(name))
        return str(error.value)

    llama().save_pretrained(tmp_path / "config")
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    assert "is no folder: give the output folder of a run" in refusal(tmp_path / "nowhere")
    assert "has no config.json" in refusal(tmp_path)
    assert "has no weights (*.safetensors)" in refusal(tmp_path / "config")
    assert "has checkpoints but no model/. Give its command again with --resume" in refusal(tmp_path / "unfinished")
    assert "tiny is a preset, with random weights: pre-train it first" in refusal("tiny")


def test_missing_weights_are_refused(tmp_path):
    transformers.LlamaForCausalLM(llama()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.up_proj"):
        build_model(str(tmp_path), llama(), 0, torch.device("cpu"), partitioned=False)


# --- runs ---


def options(folder: Path, model: Path, data: Path, stage: int = 2, **changes) -> FinetuneOptions:
    settings = dict(
        deepspeed_config=str(ROOT / f"ds_configs/zero{stage}_adam_mini.json"), output_dir=str(folder), model=str(model),
        data=str(data / "train.jsonl"), validation_data=str(data / "valid.jsonl"), lr=1e-2, steps=4, micro_batch=3,
        accumulation=2, logging_interval=1, validation_interval=2,
        checkpoint_format="engine",
    )  # fmt: skip
    return FinetuneOptions(**settings | changes)


def run_all(runs: list[PretrainOptions | FinetuneOptions]) -> list[str | None]:
    """The message of each run that is refused."""
    torch.set_num_threads(1)
    messages = []
    for one in runs:
        try:
            (finetune if isinstance(one, FinetuneOptions) else pretrain)(one)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, and a Hugging Face folder with weights, whose embedding and head are one, and a tokenizer."""
    place = tmp_path_factory.mktemp("finetune")
    write(place / "train.jsonl", sums(25, choices=False))
    write(place / "valid.jsonl", sums(7, choices=True) + sums(4, choices=False))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(llama(tie_word_embeddings=True)).save_pretrained(place / "tied")
    torch.manual_seed(0)
    # Weights large enough that the model is sure of something.
    model = transformers.LlamaForCausalLM(llama(initializer_range=0.4))
    model.save_pretrained(place / "sure")
    return place


@pytest.fixture(scope="module")
def pretrained(place) -> dict[int, Path]:
    """Runs of two steps of the main job, in one process pair: at ZeRO-1 weights are kept as at 2."""
    llama(max_position_embeddings=16).save_pretrained(place / "config")
    sizes = dict(model=str(place / "config"), steps=2, seq_length=16, micro_batch=2, lr=1e-2, validation_interval=0)
    sizes |= {"checkpoint_format": "engine"}  # for DeepSpeed's zero_to_fp32
    runs = {
        stage: PretrainOptions(
            deepspeed_config=str(ROOT / f"ds_configs/zero{stage}_adam_mini.json"),
            output_dir=str(place / f"pretrained{stage}"),
            **sizes,
        )
        for stage in (0, 2, 3)
    }
    assert run_ranks(run_all, 2, list(runs.values())) == [[None] * 3] * 2
    return {stage: Path(run.output_dir) for stage, run in runs.items()}


def test_pretraining_leaves_its_weights(pretrained):
    models = {stage: load_file(run / "model" / "model.safetensors") for stage, run in pretrained.items()}
    for stage in (2, 3):
        saved = get_fp32_state_dict_from_zero_checkpoint(str(pretrained[stage] / "checkpoints"), tag="step2")
        assert models[stage].keys() == saved.keys()
        assert all(torch.equal(models[stage][name], saved[name]) for name in saved)
    for stage in (0, 3):  # other sums, other rounding
        assert models[stage].keys() == models[2].keys()
        assert all(torch.allclose(models[stage][name], models[2][name], atol=1e-4) for name in models[2])


def test_fine_tuning_starts_from_exactly_the_saved_weights(place, pretrained):
    """At a learning rate of 0 a run ends with the weights that it began with."""
    sources = {("zero2", 3): pretrained[2], ("zero3", 2): pretrained[3]}
    sources |= {("folder", 2): place / "sure", ("tied", 3): place / "tied"}
    still = dict(lr=0.0, steps=1, weight_decay=0.0, seq_length=64)
    runs = {
        (name, stage): options(place / f"still_{name}{stage}", source, place, stage, **still)
        for (name, stage), source in sources.items()
    }
    assert run_ranks(run_all, 2, list(runs.values())) == [[None] * len(runs)] * 2
    for case, run in runs.items():
        before = load_file(trained_folder(str(sources[case])) / "model.safetensors")
        after = load_file(Path(run.output_dir) / "model" / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def by_hand(model: Path, lines: list[dict]) -> dict[str, float]:
    """Loss and accuracy in fp64, one candidate and one token after the other."""
    network = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    loss = tokens = right = 0
    for line in lines:
        scores = {}
        for text in line.get("choices", [line["completion"]]):
            prompt, answer = line["prompt"].encode(), text.encode()
            with torch.no_grad():
                logits = network(input_ids=torch.tensor([list(prompt + answer)])).logits[0]
            chances = [logits[len(prompt) + i - 1].softmax(0) for i in range(len(answer))]
            scores[text] = math.prod(chance[byte].item() for chance, byte in zip(chances, answer, strict=True))
            exact = all(int(chance.argmax()) == byte for chance, byte in zip(chances, answer, strict=True))
        right += max(scores, key=scores.get) == line["completion"] if "choices" in line else exact
        loss -= math.log(scores[line["completion"]])
        tokens += len(line["completion"].encode())
    return {"validation_loss": loss / tokens, "validation_accuracy": right / len(lines)}


def spoken(model: Path, count: int) -> list[dict]:
    """Rows whose completion the model itself would give, for every other one with a wrong end."""
    network = transformers.LlamaForCausalLM.from_pretrained(model)
    lines = []
    for i in range(count):
        ids = torch.tensor([list(f"{i}?".encode())])
        for _ in range(2):
            best = network(input_ids=ids).logits[0, -1, 32:127].argmax() + 32
            ids = torch.cat([ids, best.view(1, 1)], 1)
        text = bytes(ids[0].tolist()).decode()
        lines.append({"prompt": text[:-2], "completion": text[-2] + ("~" if i % 2 else text[-1])})
    return lines


def measure(model: str, files: list[str], config: str, folder: str) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    ranks = start_ranks()
    run = FinetuneOptions(deepspeed_config=config, output_dir=folder, model=model, data="unused", micro_batch=4)
    engine = build_engine(run, make_settings(run, ranks, find_trained), ranks)
    return [evaluate(engine, rows.load_rows(file, BYTES, 64, 256), 4, ranks) for file in files]


@pytest.mark.parametrize(("stage", "world_size"), [(2, 1), (3, 3)])
def test_accuracy_is_that_of_another_scorer_on_any_number_of_ranks(place, stage, world_size):
    model = place / "sure"
    cases = [sums(17, choices=True), spoken(model, 9), sums(8, choices=True) + spoken(model, 5), sums(1, choices=True)]
    files = [write(place / f"case{i}.jsonl", case) for i, case in enumerate(cases)]
    config = str(ROOT / f"ds_configs/zero{stage}_adam_mini.json")
    expected = [by_hand(model, case) for case in cases]
    assert 0 < expected[0]["validation_accuracy"] < 1 and 0 < expected[1]["validation_accuracy"] < 1
    for measured in run_ranks(measure, world_size, str(model), files, config, str(place / "unused")):
        for ours, theirs in zip(measured, expected, strict=True):
            assert ours["validation_accuracy"] == pytest.approx(theirs["validation_accuracy"], abs=1e-12)
            assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-6)


def addax(place: Path, stage: int = 2, **params) -> str:
    """A config with a file of its own. On a model as small as this, compiling the noise takes longer than it saves."""
    config = json.loads((ROOT / f"ds_configs/zero{stage}_addax.json").read_text())
    config["optimizer"]["params"] |= {"length_threshold": 20, "zo_batch": 2, "fo_batch": 1, "compiled": False} | params
    return write(place / f"addax{stage}_{'_'.join(map(str, params.values()))}.json", [config])


@pytest.fixture(scope="module")
def whole(place) -> dict[str, Path]:
    """Runs on two ranks, in one process pair."""
    one_pass = dict(micro_batch=None, accumulation=None)
    of_method = {"IPSGD": one_pass, "Addax": one_pass | dict(deepspeed_config=addax(place))}
    runs = {
        "whole": options(place / "whole", place / "sure", place, save_interval=2),
        "whole_addax": options(place / "whole_addax", place / "sure", place, dtype="bf16", save_interval=2,
                               **of_method["Addax"]),
        **{
            name: options(place / name, place / "sure", place, **dict(optimizer=name, steps=2, lr=1e-3,
                          deepspeed_config=str(ROOT / "ds_configs/zero2_adamw.json")) | of_method.get(name, {}))
            for name in METHODS
        },
    }  # fmt: skip
    assert run_ranks(run_all, 2, list(runs.values())) == [[None] * len(runs)] * 2
    return {name: Path(run.output_dir) for name, run in runs.items()}


def test_every_method_fine_tunes(whole, place):
    before = load_file(place / "sure" / "model.safetensors")
    for name in METHODS:
        after = load_file(whole[name] / "model" / "model.safetensors")
        assert any(not torch.equal(before[key], after[key]) for key in before), name
        assert all(weight.isfinite().all() for weight in after.values()), name


def test_records_hold_validation_before_between_and_after(whole, place):
    metrics = read_metrics(whole["whole"])
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert [row["validation_accuracy"] is None for row in metrics] == [False, True, False, True, False]
    expected = by_hand(place / "sure", sums(7, choices=True) + sums(4, choices=False))
    assert [metrics[0][key] for key in VALIDATION] == pytest.approx([expected[key] for key in VALIDATION], rel=1e-6)
    after = by_hand(whole["whole"] / "model", sums(7, choices=True) + sums(4, choices=False))
    assert [metrics[-1][key] for key in VALIDATION] == pytest.approx([after[key] for key in VALIDATION], rel=1e-5)
    cells = [
        [c.strip() for c in line.strip("| ").split("|")] for line in comparison.table([whole["whole"]]).splitlines()
    ]
    table = {row[0]: row[-1] for row in cells}
    assert table["validation accuracy before"] == f"{metrics[0]['validation_accuracy']:.4f}"
    assert table["final validation accuracy"] == f"{metrics[-1]['validation_accuracy']:.4f}"


def test_ranks_and_micro_batches_change_nothing(place, whole):
    """The same 12 rows a step, and every completion token weighs the same, whoever has it."""
    runs = {
        1: options(place / "alone", place / "sure", place, micro_batch=6),
        3: options(place / "three", place / "sure", place, micro_batch=4, accumulation=1),
    }
    for world_size, run in runs.items():
        assert run_ranks(run_all, world_size, [run]) == [[None]] * world_size
        for ours, theirs in zip(read_metrics(Path(run.output_dir)), read_metrics(whole["whole"]), strict=True):
            assert ours["tokens"] == theirs["tokens"]
            measured = [key for key in ("loss", "grad_norm", *VALIDATION) if theirs.get(key) is not None]
            assert [ours[key] for key in measured] == pytest.approx([theirs[key] for key in measured], rel=2e-5)


@pytest.mark.parametrize("name", ["whole", "whole_addax"])
def test_resumed_equals_uninterrupted(place, whole, name):
    again = place / f"again_{name}"
    shutil.copytree(whole[name], again)
    shutil.rmtree(again / "checkpoints/step4")
    shutil.rmtree(again / "model")
    (again / "checkpoints/latest").write_text("step2")
    same = dict(save_interval=2, resume=True)
    if name == "whole_addax":
        same |= dict(deepspeed_config=addax(place), dtype="bf16", micro_batch=None, accumulation=None)
    resumed = options(again, place / "sure", place, **same)
    refused = options(again, place / "tied", place, **same, seed=3)
    messages = run_ranks(run_all, 2, [refused, resumed])
    assert messages[0] == messages[1] and messages[0][1] is None
    assert "seed was 0, is 3" in messages[0][0] and "sure was" not in messages[0][0]
    compared = ("step", "tokens", "loss", *VALIDATION, "lr", "grad_norm", "update_kept")
    ours, theirs = ([[row.get(key) for key in compared] for row in read_metrics(f)] for f in (again, whole[name]))
    assert ours == theirs
    assert equal_tensors(*(load_file(f / "model/model.safetensors") for f in (again, whole[name]))) > 0
    for file in sorted(path.name for path in (again / "checkpoints/step4").glob("*.pt")):
        files = (folder / "checkpoints/step4" / file for folder in (again, whole[name]))
        assert equal_tensors(*(torch.load(file, weights_only=False) for file in files)) > 0


def test_ranks_and_stages_change_nothing_of_addax(place, whole):
    """The same 4 long and 2 short rows a step."""
    same = dict(steps=2, lr=1e-3, micro_batch=None, accumulation=None)
    cases = {(1, 2): addax(place, zo_batch=4, fo_batch=2), (2, 0): addax(place, 0), (2, 3): addax(place, 3)}
    runs = {
        case: options(place / "addax{}_{}".format(*case), place / "sure", place, deepspeed_config=config, **same)
        for case, config in cases.items()
    }
    for world_size in (1, 2):
        tried = [run for (ranks, _), run in runs.items() if ranks == world_size]
        assert run_ranks(run_all, world_size, tried) == [[None] * len(tried)] * world_size
    for run in runs.values():
        for ours, theirs in zip(read_metrics(Path(run.output_dir)), read_metrics(whole["Addax"]), strict=True):
            assert ours["tokens"] == theirs["tokens"]
            measured = [key for key in VALIDATION if theirs[key] is not None]
            assert [ours[key] for key in measured] == pytest.approx([theirs[key] for key in measured], rel=1e-4)


def test_the_script_says_what_is_wrong_and_fails(place):
    """`python launch/finetune.py` alone, without a launcher."""
    write(place / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    words = ["--model", place / "sure", "--data", place / "bad.jsonl", "--output_dir", place / "bad", "--steps", "1"]
    done = run_script("launch/finetune.py", *words)
    assert done.returncode == 1 and [path.name for path in (place / "bad").iterdir()] == [LOCK]
    assert f"ValueError: {place}/bad.jsonl, line 2: the field 'completion' must be a string" in done.stderr
    assert "Traceback" not in done.stderr
