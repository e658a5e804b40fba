"""Checkpoints: exact resumption, incomplete ones are ignored, mismatches are named."""

import dataclasses
import json
import shutil
import subprocess
import sys

from larp.engine.backend import EngineConfig
from larp.engine.checkpoint import SavedState, check_folder, load_state, newest_state, open_run, save_state
from training import train_generator, train_tokenizer

import pytest
import torch


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.module.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "fp16"), (1, "fp32"), (2, "bf16")])
def test_a_resumed_run_equals_one_that_never_stopped(new_engine, train, tmp_path, stage, precision):
    config = EngineConfig(zero_stage=stage, precision=precision)
    straight = new_engine(config)
    train(straight, 0, 3)
    model = {"num_tokens": 16, "patch_size": (4, 8, 8)}
    extra = {"ema": torch.arange(3.0), "lecam": 0.5}
    save_state({"model": straight}, tmp_path, 3, {"position": 24}, extra, model=model)
    sampled = torch.rand(3)
    losses = train(straight, 3, 6)

    resumed = new_engine(config)
    state = newest_state(tmp_path)
    load_state({"model": resumed}, state, model)
    assert (state.step, state.loader_state, resumed.step_count) == (3, {"position": 24}, 3)
    assert torch.equal(state.extra["ema"], torch.arange(3.0)) and state.extra["lecam"] == 0.5
    assert torch.equal(torch.rand(3), sampled)
    assert train(resumed, 3, 6) == losses
    assert same(weights(straight), weights(resumed))


def test_stage_3_resumes_as_well_and_leaves_torch_as_it_was(new_engine, train, tmp_path):
    own = torch.nn.functional.linear
    engine = new_engine(EngineConfig(zero_stage=3))
    train(engine, 0, 2)
    save_state({"model": engine}, tmp_path, 2, {})
    losses = train(engine, 2, 4)
    resumed = new_engine(EngineConfig(zero_stage=3))
    load_state({"model": resumed}, newest_state(tmp_path))
    assert train(resumed, 2, 4) == losses
    assert torch.nn.functional.linear is not own
    engine.close()
    assert torch.nn.functional.linear is not own, "the other one still needs it"
    resumed.close()
    assert torch.nn.functional.linear is own


def test_the_learning_rate_of_the_new_run_wins(new_engine, train, tmp_path):
    engine = new_engine()
    train(engine, 0, 1)
    save_state({"model": engine}, tmp_path, 1, {})
    resumed = new_engine(factor=lambda step: 0.5)
    load_state({"model": resumed}, newest_state(tmp_path))
    assert resumed.lr == 0.5e-2


def test_only_the_newest_checkpoints_remain_and_incomplete_ones_are_ignored(new_engine, tmp_path):
    engine = new_engine()
    for step in range(1, 5):
        save_state({"critic": engine, "model": engine}, tmp_path, step, {}, keep=2)
    assert [p.name for p in sorted((tmp_path / "state").iterdir())] == ["step-00000003", "step-00000004"]

    shutil.copytree(tmp_path / "state/step-00000004", tmp_path / "state/step-00000005")
    (tmp_path / "state/step-00000005/state.json").unlink()
    assert newest_state(tmp_path).step == 4
    weights_file = next((tmp_path / "state/step-00000004/model").glob("*model_states.pt"))
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    assert newest_state(tmp_path).step == 3
    (tmp_path / "state/step-00000003/state.json").write_text('{"step": 3')
    assert newest_state(tmp_path) is None
    assert newest_state(tmp_path / "nowhere") is None


def test_checkpoints_of_earlier_versions_are_read(new_engine, tmp_path):
    save_state({"model": new_engine()}, tmp_path, 1, {}, model={"keeps_codes": True, "other": 1})
    assert newest_state(tmp_path).model == {"resets_codes": True, "other": 1}


def test_saving_the_same_step_again_replaces_it(new_engine, train, tmp_path):
    engine = new_engine()
    save_state({"model": engine}, tmp_path, 1, {"position": 1})
    train(engine, 0, 1)
    save_state({"model": engine}, tmp_path, 1, {"position": 2})
    assert newest_state(tmp_path).loader_state == {"position": 2}


def test_a_folder_that_holds_a_run_is_not_overwritten(ranks, tmp_path):
    assert open_run(tmp_path / "run", {"steps": 3}, resume=False, steps=9) is None
    with pytest.raises(ValueError, match=r"run holds a run already.*--resume.*--out"):
        open_run(tmp_path / "run", {"steps": 4}, resume=False, steps=9)
    assert json.loads((tmp_path / "run/config.json").read_text()) == {"steps": 3}
    assert open_run(tmp_path / "run", {"steps": 4}, resume=True, steps=9) is None
    assert json.loads((tmp_path / "run/config.json").read_text()) == {"steps": 3}
    assert json.loads((tmp_path / "run/config.resumed.json").read_text()) == {"steps": 4}


def test_resuming_an_unstarted_run_starts_it(ranks, tmp_path):
    assert open_run(tmp_path / "run", {}, resume=True, steps=9) is None
    assert (tmp_path / "run/config.json").exists()


def test_a_mismatch_of_a_checkpoint_is_named(new_engine, tmp_path):
    engine = new_engine(EngineConfig(zero_stage=1))
    save_state({"model": engine}, tmp_path, 1, {}, model={"tokens": {"count": 16}, "width": 8})
    state = newest_state(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not fit this run: tokens\.count was 16, is 32; depth was \(absent\), is 2\..*--out"
    ):
        load_state({"model": engine}, state, {"tokens": {"count": 32}, "width": 8, "depth": 2})
    with pytest.raises(ValueError, match="holds model, but this run trains critic, model"):
        load_state({"critic": engine, "model": engine}, state, state.model)
    with pytest.raises(ValueError, match="saved with zero_stage 1, this run has 0"):
        load_state({"model": new_engine()}, state, state.model)
    four: SavedState = dataclasses.replace(state, world_size=4)
    with pytest.raises(
        ValueError, match=r"saved by 4 ranks, this run has 1(.|\n)*ds_to_universal --inject_missing_state"
    ):
        load_state({"model": engine}, four, state.model)


def test_at_stage_0_another_number_of_ranks_resumes(new_engine, train, tmp_path):
    engine = new_engine()
    train(engine, 0, 2)
    save_state({"model": engine}, tmp_path, 2, {})
    resumed = new_engine()
    load_state({"model": resumed}, dataclasses.replace(newest_state(tmp_path), world_size=4))
    assert same(weights(engine), weights(resumed)) and train(resumed, 2, 4) == train(engine, 2, 4)


def test_a_missing_checkpoint_is_named(new_engine, tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint of the critic in {tmp_path}"):
        new_engine(name="critic").load(tmp_path)


def test_a_folder_is_locked_by_one_process(ranks, tmp_path):
    (tmp_path / "run").mkdir()
    hold = "import fcntl, time; f = open('run/.lock', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another process trains in .*--out"):
            open_run(tmp_path / "run", {}, resume=False, steps=9)
        other.kill()
    open_run(tmp_path / "run", {}, resume=False, steps=9)
    open_run(tmp_path / "run", {}, resume=True, steps=9)


def test_a_refused_resume_writes_and_prints_nothing(new_engine, tmp_path, capsys):
    engines = {"model": new_engine()}
    open_run(tmp_path, {"width": 8}, False, 9, engines, {"width": 8})
    save_state(engines, tmp_path, 1, {}, model={"width": 8})
    capsys.readouterr()
    other = {"model": new_engine(EngineConfig(zero_stage=1))}
    for now, width, words in (
        (engines, 16, "width was 8, is 16"),
        (other, 8, "saved with zero_stage 0, this run has 1"),
    ):
        with pytest.raises(ValueError, match=words):
            open_run(tmp_path, {"width": width}, True, 9, now, {"width": width})
    assert not (tmp_path / "config.resumed.json").exists() and capsys.readouterr().out == ""
    assert open_run(tmp_path, {"width": 8}, True, 9, engines, {"width": 8}).step == 1
    assert "resuming from step 1" in capsys.readouterr().out


def test_a_file_is_refused_as_run_folder(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(ValueError, match=r"file is a file: choose another place with --out"):
            check_folder(place, resume=False)


@pytest.mark.parametrize(
    "script, first, options",
    [(train_tokenizer, "open_videos", []), (train_generator, "open_data", ["--task", "class"])],
    ids=["tokenizer", "generator"],
)
def test_the_run_folder_is_checked_before_the_data(script, first, options, ranks, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(script, first, lambda *_: pytest.fail("opened its data first"))
    with pytest.raises(ValueError, match="is a file: choose another place with --out"):
        script.main([*options, "--out", str(tmp_path / "file")])


def test_a_run_is_not_resumed_beyond_its_end(new_engine, tmp_path):
    save_state({"model": new_engine()}, tmp_path, 12, {}, {})
    with pytest.raises(ValueError, match="at step 12, beyond the 10 steps"):
        open_run(tmp_path, {}, resume=True, steps=10)
    assert open_run(tmp_path, {}, resume=True, steps=12).step == 12


def test_a_full_disk_leaves_the_checkpoint_before(new_engine, train, tmp_path, full_disk):
    engine = new_engine()
    train(engine, 0, 2)
    save_state({"model": engine}, tmp_path, 2, {})
    with full_disk(), pytest.raises(ValueError, match=r"step-00000003 cannot be written .* go on with --resume"):
        save_state({"model": engine}, tmp_path, 3, {})
    assert newest_state(tmp_path).step == 2 and len(list((tmp_path / "state").iterdir())) == 1
