"""The main job resumes on other ranks, at another stage, under another engine: the same batches, the same weights."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints_ranks import make_model
from portable_job_ranks import resume_and_reshard, run_alone, run_jobs, run_odd_jobs
from safetensors.torch import load_file
from spawn import CONTEXT, TIME_LIMIT, run_ranks
from test_portable import flip, whole_of
from tiny import equal

from ds_memopt.checkpoint import Index
from ds_memopt.cli import main
from ds_memopt.results.record import read_metrics
from ds_memopt.train.resumed_batch import keep_global_batch, keep_halves, of_any_place


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("job")
    make_model(place)
    for number, name in enumerate("ab"):  # documents of about 12 ids
        ids = np.random.default_rng(number).integers(0, 256, 9000)
        np.where(ids < 20, 0, ids).astype(np.uint16).tofile(place / f"{name}.bin")
    config = json.loads((place / "zero2_adam_mini.json").read_text())
    for name, stage in (("zero3", 3), ("fsdp2", 1)):
        (place / f"{name}.json").write_text(json.dumps(config | {"zero_optimization": {"stage": stage}}))
    return place


@pytest.fixture(scope="module")
def outcomes(place) -> dict[str, tuple[str | None, str]]:
    """One run on 2 ranks, whole; copies of it that lost what follows step 2 or 4 and are resumed elsewhere."""
    whole = place / "whole"
    first = run_ranks(run_jobs, 2, place, [(whole, "zero2_adam_mini", {"accumulation": 2, "keep_checkpoints": 2})])[0]
    twice = {"accumulation": 2}
    behind = twice | {"async_save": True, "keep_checkpoints": 2}
    odd = run_ranks(run_odd_jobs, 2, place, [
        (place / "stopped", "zero2_adam_mini", twice | {"save_interval": 6}),
        (place / "unsaved", "zero2_adam_mini", twice | {"save_interval": 0}),
    ], [(place / "behind", "zero2_adam_mini", behind)], [
        (place / "failed", "zero2_adam_mini", behind),
        (place / "refused", "zero2_adam_mini", behind | {"checkpoint_format": "engine"}),
    ])  # fmt: skip
    assert [one[0] for one in odd[0]] == [one[0] for one in odd[1]]
    shutil.copytree(place / "stopped", place / "went on")
    shutil.copytree(place / "unsaved", place / "begun")
    for name in ("one", "three", "same", "damaged", "changed"):
        shutil.copytree(whole, place / name)
        (place / name / "checkpoints/latest").write_text("step4")
    flip(place / "damaged/checkpoints/step6/rank00001.safetensors")
    (place / "damaged/checkpoints/latest").write_text("step6")
    resume = {"resume": True}
    one = run_ranks(
        run_jobs, 1, place, [(place / "one", "zero3", resume), (place / "changed", "zero3", resume | {"seed": 1})]
    )[0]
    two = run_ranks(resume_and_reshard, 2, place, [
        (place / "same", "zero2_adam_mini", resume), (place / "went on", "zero2_adam_mini", resume),
        (place / "damaged", "fsdp2", resume | {"micro_batch": 4}),
        (place / "damaged", "fsdp2", resume | {"micro_batch": 3}),
        (place / "begun", "zero2_adam_mini", resume | twice), (place / "misspelt", "zero2_adam_mini", resume),
    ], whole, place / "engine", place / "back")[0]  # fmt: skip
    three = run_ranks(run_jobs, 3, place, [(place / "three", "zero3", resume)])[0]
    names = (
        "whole", "stopped", "unsaved", "behind", "failed", "refused", "one", "changed", "same", "went on", "damaged",
        "micro_batch", "begun", "misspelt", "resharded", "engine", "three",
    )  # fmt: skip
    return dict(zip(names, [*first, *odd[0], *one, *two, *three], strict=True))


def weights(folder: Path):
    return load_file(folder / "model/model.safetensors")


def test_the_same_place_goes_on_bit_for_bit(outcomes, place):
    assert outcomes["whole"][0] is None and outcomes["same"][0] is None
    assert {path.name for path in (place / "whole/checkpoints").iterdir()} == {"latest", "step4", "step6"}
    assert (place / "same/model/model.safetensors").read_bytes() == (
        place / "whole/model/model.safetensors"
    ).read_bytes()


def test_the_learning_rate_follows_its_schedule_wherever_a_run_goes_on(outcomes, place):
    """A step of warm-up, two at the full rate, three towards 0.4 of it."""
    rates = [8e-4, 2e-3, 2e-3, 2e-3, 1.6e-3, 1.2e-3]
    for name in ("whole", "same", "one", "three", "damaged", "engine"):
        assert [row["lr"] for row in read_metrics(place / name)] == pytest.approx(rates), name


def test_a_run_that_gets_sigterm_saves_and_goes_on_bit_for_bit(outcomes, place):
    folder = place / "stopped/checkpoints"
    assert outcomes["stopped"][0] == f"75: SIGTERM: step 3 is saved in {folder}/step3: go on with --resume"
    assert {path.name for path in folder.iterdir()} == {"latest", "step3"}
    assert [row["step"] for row in read_metrics(place / "stopped")] == [1, 2, 3]
    assert not (place / "stopped/model").exists()
    assert outcomes["went on"][0] is None
    ours, whole = ([row["loss"] for row in read_metrics(place / name)] for name in ("went on", "whole"))
    assert ours == whole
    ours, whole = (weights(place / name) for name in ("went on", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_run_that_saves_nothing_says_so_at_sigterm(outcomes, place):
    assert outcomes["unsaved"][0] == "143: SIGTERM: the run ends unsaved after step 3, for --save_interval is 0"
    assert not (place / "unsaved/checkpoints").exists()


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(outcomes, place):
    message, printed = outcomes["begun"]
    assert message is None
    assert f"{place}/begun/checkpoints has no checkpoint yet: the run starts again from step 0\n" in printed
    rows, whole = ([row["loss"] for row in read_metrics(place / name)] for name in ("begun", "whole"))
    assert rows == whole and (place / "begun/model").exists()


def test_a_folder_without_a_run_is_refused_and_not_made(outcomes, place):
    assert f"--resume found no run in {place}/misspelt, which has no resolved_config.json" in outcomes["misspelt"][0]
    assert not (place / "misspelt").exists()


def test_what_is_written_behind_the_steps_is_what_is_saved_between_them(outcomes, place):
    """Bit for bit, though the next steps change what is being written; the run is the same, too."""
    assert outcomes["behind"][0] is None
    for name in ("checkpoints/latest", "model/model.safetensors", *(
        f"checkpoints/step{step}/rank0000{rank}.safetensors" for step in (4, 6) for rank in (0, 1)
    )):  # fmt: skip
        assert (place / "behind" / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    assert {path.name for path in (place / "behind/checkpoints").iterdir()} == {"latest", "step4", "step6"}
    rows, whole = read_metrics(place / "behind"), read_metrics(place / "whole")
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert rows[3]["save_stall_s"] > 0 and whole[3]["save_stall_s"] > 0
    assert whole[0]["save_stall_s"] == whole[2]["save_stall_s"] == 0


def test_kills_at_any_moment_change_no_bit(place):
    """Two in the middle of a save, between the steps and behind them, and two wherever the run is."""
    folder, draw = place / "killed", random.Random(0)
    latest, steps = folder / "checkpoints/latest", {"steps": 12}
    unbroken = CONTEXT.Process(target=run_alone, args=(place, place / "unbroken", steps | {"save_interval": 12}))
    unbroken.start()
    for number, stuck_at in enumerate((2, 5, None, None)):
        options = steps | {"save_interval": 1, "async_save": number % 2 == 1, "resume": number > 0}
        before = latest.read_text() if number else None
        process = CONTEXT.Process(target=run_alone, args=(place, folder, options, stuck_at))
        process.start()
        deadline = time.monotonic() + TIME_LIMIT
        while time.monotonic() < deadline and process.is_alive():
            if (folder / "stuck").exists() if stuck_at else latest.read_text() != before:
                break
            time.sleep(0.001)
        time.sleep(0 if stuck_at else 0.02 * draw.random())
        process.kill()
        process.join()
        if stuck_at:
            assert (folder / f"checkpoints/.step{stuck_at}").is_dir() and latest.read_text() == f"step{stuck_at - 1}"
            (folder / "stuck").unlink()
    last = CONTEXT.Process(target=run_alone, args=(place, folder, options))
    last.start()
    for process in (last, unbroken):
        process.join()
    ours, whole = (weights(place / name) for name in ("killed", "unbroken"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    ours, whole = ([row["loss"] for row in read_metrics(place / name)] for name in ("killed", "unbroken"))
    assert ours == whole and len(whole) == 12


def test_a_thread_that_cannot_write_ends_the_run(outcomes, place):
    said = "the checkpoint of step 4 could not be saved: rank 1: the disk is on fire"
    assert outcomes["failed"][0] == said
    assert {path.name for path in (place / "failed/checkpoints").iterdir()} == {"latest", "step2"}
    assert (place / "failed/checkpoints/latest").read_text() == "step2"
    assert "--async_save writes portable checkpoints: leave out" in outcomes["refused"][0]


def test_a_run_goes_on_from_deepspeeds_own_files_bit_for_bit(outcomes, place):
    """Made from a portable checkpoint, and made portable again."""
    told = "step4: engine, ranks 2; resume with --resume --checkpoint_format engine --micro_batch 2 --accumulation 2"
    assert outcomes["resharded"][1] == f"{place}/engine/checkpoints/{told}"
    assert outcomes["engine"][0] is None and (place / "engine/checkpoints/step4/run.json").exists()
    assert [row["step"] for row in read_metrics(place / "engine")] == [1, 2, 3, 4, 5, 6]
    ours, theirs = weights(place / "engine"), weights(place / "same")
    assert equal(ours, theirs)
    first, back = (whole_of(place / run / "checkpoints/step4") for run in ("whole", "back"))
    assert equal(first, back) and len(first) > 21
    index, again = (Index.read(place / run / "checkpoints/step4") for run in ("whole", "back"))
    assert index.groups == again.groups and index.scheduler == again.scheduler


def test_the_command_reshards_on_ranks_of_its_own(outcomes, place, tmp_path, capsys):
    run, out = str(place / "whole"), str(tmp_path / "out")
    assert main(["checkpoint", "reshard", run, out]) == 2
    assert "is portable: give --ranks and --zero_stage" in capsys.readouterr().err
    assert main(["checkpoint", "reshard", run, out, "--ranks", "1", "--zero_stage", "1"]) == 0
    assert "step6: engine, ranks 1; resume with" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out/checkpoints/step6/run.json").read_text())
    assert (facts["world_size"], facts["zero_stage"], facts["global_batch"]) == (1, 1, 8)
    assert main(["checkpoint", "reshard", str(tmp_path), out + "2"]) == 2
    assert "is no output folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "accumulation"), [("one", 4), ("damaged", 1)])
def test_another_place_sees_the_same_batches(outcomes, place, run, accumulation):
    """One rank at ZeRO-3; two under FSDP2, with larger micro-batches. Losses differed by at most 5e-7; those of other
    batches by more than 5e-4. The data are a mixture, with borders between documents."""
    message, printed = outcomes[run]
    assert message is None and f"{accumulation} passes" in printed
    rows, whole = read_metrics(place / run), read_metrics(place / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    print(run, [abs(a["loss"] - b["loss"]) for a, b in zip(rows, whole, strict=True)], [row["loss"] for row in whole])
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, whole, strict=True)) < 1e-5
    assert len({round(row["loss"], 4) for row in whole}) == 6
    ours, theirs = weights(place / run), weights(place / "whole")
    print(max((ours[name] - theirs[name]).abs().max() for name in theirs))
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5


def test_a_damaged_part_is_told(outcomes, place):
    file = place / "damaged/checkpoints/step6/rank00001.safetensors"
    printed = outcomes["damaged"][1]
    assert f"WARNING: checkpoint file {file} is damaged: its SHA-256 is not the one in index.json" in printed
    assert f"resuming from {place}/damaged/checkpoints/step4\n" in printed


def test_what_cannot_keep_the_batch_is_refused_with_what_would(outcomes):
    assert (
        "keeps the global batch of 8 sequences, which 3 ranks do not divide: run on 1, 2, 4 or 8 ranks"
        in (outcomes["three"][0])
    )
    assert (
        "4 for each of 2 ranks, which micro-batches of 3 do not divide: choose 1, 2 or 4" in outcomes["micro_batch"][0]
    )
    assert "--resume needs the settings that checkpoint" in outcomes["changed"][0]
    assert "seed was 0, is 1" in outcomes["changed"][0]


def test_the_batch_is_divided_anew():
    saved = {"global_batch": 12, "micro_batch": 3}
    assert keep_global_batch(saved, None, 2, True) == (3, 2)
    assert keep_global_batch(saved, None, 3, True) == (2, 2)
    assert keep_global_batch(saved, 1, 4, True) == (1, 3)
    assert keep_global_batch(saved, None, 4, False) == (3, 1)
    with pytest.raises(ValueError, match="without accumulation: a micro-batch of 2 must be 3"):
        keep_global_batch(saved, 2, 4, False)


def test_halves_stay_whole():
    params = {"zo_batch": 4, "fo_batch": 2}
    saved = {"optimizer": {"type": "Addax", "params": dict(params)}, "world_size": 2, "seed": 0}
    keep_halves(saved, params, 4)
    assert params == {"zo_batch": 2, "fo_batch": 1}
    here = {"optimizer": {"type": "Addax", "params": params}, "world_size": 4, "seed": 0}
    assert of_any_place(here) == of_any_place(saved)
    with pytest.raises(ValueError, match="keeps zo_batch at 8 .* which 3 ranks do not divide: run on 1, 2 or 4 ranks"):
        keep_halves(saved, params, 3)


def test_the_command_tells_verifies_and_exports(outcomes, place, tmp_path, capsys):
    """What is exported are the fp32 weights that the run ended with."""
    folder = place / "whole/checkpoints"
    assert main(["checkpoint", "inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"{folder}/step6: AdamMini, step 6, saved by 2 ranks (DeepSpeed, ZeRO-2)" in told
    assert "weight                    32,416" in told and "block_exp_avg_sq" in told

    assert main(["checkpoint", "export", str(folder), str(tmp_path / "out")]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    whole = weights(place / "whole")
    assert all(torch.equal(exported[name], whole[name]) for name in whole)
    assert main(["checkpoint", "export", str(folder), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(folder / "step4"), str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16/model.safetensors").values()} == {torch.bfloat16}

    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert f"{folder}/step4: whole\n{folder}/step6: whole\n" in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "copy")
    flip(tmp_path / "copy/step6/rank00000.safetensors")
    assert main(["checkpoint", "verify", str(tmp_path / "copy")]) == 2
    printed = capsys.readouterr()
    assert "rank00000.safetensors is damaged: its SHA-256" in printed.out
    assert "ds-memopt checkpoint: 1 of 2 checkpoints are damaged" in printed.err
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 2
