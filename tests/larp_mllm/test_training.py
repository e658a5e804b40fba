"""training/train_mllm.py on a cache of codes that follow from their captions."""

import json
from pathlib import Path

import larp_mllm
from larp.config import from_dict, load_recipe
from larp.data.tokens import TokenCacheError
from larp.engine.backend import Ranks
from larp_mllm.collate import collate
from larp_mllm.finetuning import optimizer
from larp_mllm.home import find_model
from tests.larp_mllm.tiny import tiny_cache, tiny_video_tokenizer
from training import train_mllm
from training.train_mllm import RECIPES, TrainMllmConfig, default_recipe

import pytest
import torch
from transformers import modeling_utils

SMALL = [
    "--tiny.layers=1",
    "--tiny.width=32",
    "--tiny.heads=2",
    "--batch-size=16",
    "--warmup=2",
    "--samples=2",
    "--log-every=5",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("cache"))


def train(cache: Path, out: Path, *options: str) -> dict:
    return train_mllm.main(["--tokens", str(cache), "--out", str(out), *SMALL, *options])


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict:
    return larp_mllm.LarpMllmForCausalLM.from_pretrained(out / "model").state_dict()


def test_a_run_learns_and_leaves_a_model_that_generate_finds(cache, tmp_path):
    report = train(cache, tmp_path / "run", "--steps", "60", "--llm-lr", "3e-3", "--adapter-lr", "3e-3")
    assert report["eval"]["video_accuracy"] > 0.9
    assert report["eval"]["video_bits"] < 2 < lines(tmp_path / "run")[0]["video_bits"]
    assert report == json.loads((tmp_path / "run/report.json").read_text())
    assert all(Path(path).is_file() for path in report["samples"])
    assert find_model() == (tmp_path / "run/model").resolve()
    assert larp_mllm.generate("a red circle moving left", temperature=0).codes == (0, 1, 2, 3)


def test_accumulation_changes_nothing(cache, tmp_path):
    train(cache, tmp_path / "one", "--steps", "5")
    train(cache, tmp_path / "four", "--steps", "5", "--engine.accumulation", "4")
    one, four = lines(tmp_path / "one")[-1], lines(tmp_path / "four")[-1]
    for name in ("video_bits", "text_nll", "grad_norm"):
        assert one[name] == pytest.approx(four[name], rel=1e-4)


def test_checkpointed_activations_change_nothing(cache, tmp_path, monkeypatch):
    recomputed = []
    real = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: recomputed.append(1) or real(*a, **k))
    train(cache, tmp_path / "kept", "--steps", "3")
    assert not recomputed
    train(cache, tmp_path / "again", "--steps", "3", "--engine.activation-checkpointing")
    kept, again = weights(tmp_path / "kept"), weights(tmp_path / "again")
    assert recomputed and all(torch.equal(kept[name], again[name]) for name in kept)


def test_resume_equals_the_uninterrupted_run(cache, tmp_path, monkeypatch):
    train(cache, tmp_path / "whole", "--steps", "10", "--save-every", "5")
    with monkeypatch.context() as patch:
        patch.setattr(train_mllm, "stop_requested", lambda: True)
        assert train(cache, tmp_path / "cut", "--steps", "10", "--save-every", "5") == {"stopped_at": 5}
    train(cache, tmp_path / "cut", "--steps", "10", "--save-every", "5", "--resume")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    with pytest.raises(ValueError, match="--resume"):
        train(cache, tmp_path / "cut", "--steps", "10")


def test_another_model_is_not_resumed_and_the_difference_is_named(cache, tmp_path):
    train(cache, tmp_path / "run", "--steps", "3")
    before = weights(tmp_path / "run")
    other = tiny_cache(tmp_path, seed=7)
    for tokens, options, words in (
        (other, (), "video_tokenizer was .{16}, is .{16}"),
        (cache, ("--tiny.layers", "2"), "tiny.layers was 1, is 2"),
        (tiny_cache(tmp_path / "a", captions=["zebras"]), (), "text_tokenizer was .{16}, is .{16}"),
    ):
        with pytest.raises(ValueError, match=f"does not fit this run: .*{words}"):
            train(tokens, tmp_path / "run", "--steps", "4", "--resume", *options)
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_of_another_rank_is_not_resumed(qwen, cache, tmp_path):
    base = tmp_path / "base"
    qwen.model.base.save_pretrained(base)
    qwen.processor.text_tokenizer.save_pretrained(base)
    options = ("--base", str(base), "--train", "lora", "--steps", "3")
    train(cache, tmp_path / "run", *options, "--lora-rank", "2")
    with pytest.raises(ValueError, match="lora_rank was 2, is 4"):
        train(cache, tmp_path / "run", *options, "--lora-rank", "4", "--resume")
    # The size of tiny bases means nothing here.
    train(cache, tmp_path / "run", *options, "--lora-rank", "2", "--tiny.layers", "3", "--resume")


@pytest.mark.parametrize("log_every", ["3", "10"])
def test_killed_after_the_last_step_a_run_repeats_nothing(cache, tmp_path, monkeypatch, log_every):
    options = ("--steps", "3", "--save-every", "2", "--log-every", log_every)
    train(cache, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(train_mllm, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(cache, tmp_path / "cut", *options)
    monkeypatch.setattr(train_mllm, "train_step", lambda *_: pytest.fail("trained again"))
    for _ in range(2):  # a run that ended in full is no different
        assert train(cache, tmp_path / "cut", *options, "--resume")["steps"] == 3
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert lines(tmp_path / "cut")[-1]["step"] == 3


def test_asked_to_stop_at_the_last_step_a_run_ends_in_full(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(train_mllm, "stop_requested", lambda: True)
    assert train(cache, tmp_path / "run", "--steps", "5")["steps"] == 5
    assert (tmp_path / "run" / "report.json").is_file()


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_zero_stages_train_to_the_same_losses(cache, tmp_path, stage):
    train(cache, tmp_path / "0", "--steps", "5")
    train(cache, tmp_path / stage, "--steps", "5", "--engine.zero-stage", stage)
    plain, sharded = lines(tmp_path / "0")[-1], lines(tmp_path / stage)[-1]
    assert plain["video_bits"] == pytest.approx(sharded["video_bits"], rel=1e-4)
    whole, gathered = weights(tmp_path / "0"), weights(tmp_path / stage)
    # The loss does not depend on key biases (softmax), so their gradients are rounding noise, which Adam blows up.
    for name in (name for name in whole if not name.endswith("k_proj.bias")):
        torch.testing.assert_close(gathered[name], whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["adapter", "lora"])
def test_a_pretrained_base_is_kept_or_changed_by_lora_alone(qwen, cache, tmp_path, mode):
    base = tmp_path / "base"
    qwen.model.base.save_pretrained(base)
    qwen.processor.text_tokenizer.save_pretrained(base)
    report = train(cache, tmp_path / "run", "--base", str(base), "--train", mode, "--steps", "5", "--lora-rank", "2")
    before, after = qwen.model.base.state_dict(), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[f"base.{name}"])}
    assert bool(changed) == (mode == "lora")
    assert all("proj" in name for name in changed)
    assert {name for name in after if "lora" in name} == set()
    assert report["trained_parameters"] < sum(p.numel() for p in qwen.model.parameters())


def test_each_part_has_its_own_rate_and_tables_do_not_decay(qwen):
    groups = optimizer(qwen.model, adapter_lr=2.0, llm_lr=1.0, weight_decay=0.5).param_groups
    named = {id(p): name for name, p in qwen.model.named_parameters()}
    of = {named[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == len(named)
    assert of["adapter.code_input.mlp.0.weight"] == (2.0, 0.5)
    assert of["adapter.code_input.residual.weight"] == (2.0, 0.0)
    assert of["base.model.layers.0.mlp.up_proj.weight"] == (1.0, 0.5)
    assert of["base.model.embed_tokens.weight"] == (1.0, 0.0)


def test_two_ranks_see_the_rows_of_one(qwen, cache, monkeypatch):
    """Gradients and sums of two ranks' shares add up to those of the whole batch."""
    from larp.data.tokens import TokenCache

    config = TrainMllmConfig(train="full", batch_size=8)
    data = train_mllm.dataset(TokenCache.open(cache), qwen)
    sequences = data.batch(0, 8, 0, config.tasks)

    class Recorder:
        def __init__(self):
            self.losses = []

        def __call__(self, **inputs):
            return qwen.model(**inputs)

        def backward(self, loss):
            self.losses.append(loss.item())

        def step(self):
            pass

    tallies, losses = [], []
    for ranks in (Ranks(0, 1, 0), Ranks(0, 2, 0), Ranks(1, 2, 1)):
        engine = Recorder()
        tallies.append(train_mllm.train_step(engine, sequences, config, ranks))
        losses.append(engine.losses[0])
    torch.testing.assert_close(tallies[1] + tallies[2], tallies[0])
    assert (losses[1] + losses[2]) / 2 == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] == pytest.approx(qwen.model(**collate(sequences)).loss.item(), rel=1e-5)


def test_a_cache_of_another_tokenizer_is_refused(cache, tmp_path):
    other = tiny_video_tokenizer(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(TokenCacheError, match="tokenizer is"):
        train(cache, tmp_path / "run", "--tokenizer", str(other))
    with pytest.raises(TokenCacheError, match="extract_tokens"):
        train(tmp_path / "nothing", tmp_path / "run")


def test_a_random_base_cannot_be_kept_frozen(cache, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(cache, tmp_path / "run", "--train", "adapter")
    assert "--train full" in capsys.readouterr().err


def test_every_recipe_is_a_config():
    for name in ("mllm-shapes32", "mllm-ucf64"):
        assert from_dict(TrainMllmConfig, load_recipe(name, RECIPES), name).train == "full"


def test_pretrained_bases_do_not_get_the_rates_of_the_tiny_recipe():
    assert default_recipe([]) == default_recipe(["--base", "tiny-llama"]) == "mllm-shapes32"
    assert default_recipe(["--base", "Qwen2-0.5B"]) is default_recipe(["--base=Qwen2-0.5B"]) is None
