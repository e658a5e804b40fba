"""Trained weights and learning rates of each stage, merged LoRA, stages of a run."""

from pathlib import Path

from larp.engine.distributed import Ranks
from larp_mllm.engine.lora import merged_weights, prepare_training
from larp_mllm.engine.stages import AlignConfig, JointConfig, load_adapter, save_adapter, stage_at, stages
from larp_mllm.engine.trained_weights import make_optimizer, write_model
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch


def trained_lora(alpha: int | None = None) -> Mllm:
    """A model whose LoRA updates are not zero."""
    mllm = tiny_mllm()
    prepare_training(mllm.model, "lora", 2, alpha)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in mllm.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return mllm


def logits(mllm: Mllm) -> torch.Tensor:
    with torch.no_grad():
        return mllm.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


def test_each_part_has_its_own_rate_and_tables_do_not_decay(qwen):
    groups = make_optimizer(qwen.model, adapter_lr=2.0, llm_lr=1.0, weight_decay=0.5).param_groups
    named = {id(p): name for name, p in qwen.model.named_parameters()}
    of = {named[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == len(named)
    assert of["adapter.code_input.mlp.0.weight"] == (2.0, 0.5)
    assert of["adapter.code_input.residual.weight"] == (2.0, 0.0)
    assert of["base.model.layers.0.mlp.up_proj.weight"] == (1.0, 0.5)
    assert of["base.model.embed_tokens.weight"] == (1.0, 0.0)


def test_align_trains_only_the_adapter_and_lora_its_updates_as_well():
    aligned, lora, full = tiny_mllm().model, tiny_mllm().model, tiny_mllm().model
    for model, part in ((aligned, "adapter"), (lora, "lora"), (full, "full")):
        prepare_training(model, part, 2)
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (aligned, lora, full)]
    assert all(name.startswith("adapter.") for name in trained[0])
    assert trained[0] < trained[1] and all("lora_" in name for name in trained[1] - trained[0])
    assert trained[2] == {name for name, _ in full.named_parameters()}


def test_a_written_model_has_lora_merged_and_the_model_in_training_is_unchanged(tmp_path):
    mllm = trained_lora()
    before, state = logits(mllm), {name: tensor.clone() for name, tensor in mllm.model.state_dict().items()}
    write_model(mllm.model, mllm.processor, True, tmp_path / "model", 0, Ranks())
    assert all(torch.equal(tensor, state[name]) for name, tensor in mllm.model.state_dict().items())
    written = Mllm.load(tmp_path / "model", "cpu")
    assert not any("lora" in name or "base_layer" in name for name in written.model.state_dict())
    torch.testing.assert_close(logits(written), before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, logits(tiny_mllm()))
    # A written model replaces an older one as a whole.
    write_model(tiny_mllm().model, mllm.processor, False, tmp_path / "model", 0, Ranks())
    assert torch.equal(logits(Mllm.load(tmp_path / "model", "cpu")), logits(tiny_mllm()))


def test_alpha_scales_the_updates_of_lora():
    plain = tiny_mllm().model.state_dict()
    name = "base.model.layers.0.mlp.up_proj.weight"
    by = {alpha: merged_weights(trained_lora(alpha).model)[name] - plain[name] for alpha in (None, 2, 8)}
    torch.testing.assert_close(by[8], 4 * by[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by[None], 2 * by[2], rtol=1e-4, atol=1e-6)


def test_a_base_without_the_layers_of_lora_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    mllm = tiny_mllm()
    mllm.model.base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*--joint\.method full"):
        prepare_training(mllm.model, "lora", 2)


# ----------------------------------------------------------------------------------------------------------------- stages


def test_stages_follow_one_another_and_can_be_left_out():
    both = stages(AlignConfig(10), JointConfig(20))
    assert [(stage.name, stage.first, stage.last, stage.trained) for stage in both] == [
        ("align", 0, 10, "adapter"),
        ("joint", 10, 30, "partial-lora"),
    ]
    assert [stage_at(both, step).name for step in (0, 9, 10, 11, 30)] == ["align"] * 3 + ["joint"] * 2
    assert [stage.name for stage in stages(AlignConfig(0), JointConfig(20))] == ["joint"]
    assert [stage.name for stage in stages(AlignConfig(5), JointConfig(0))] == ["align"]
    with pytest.raises(ValueError, match="nothing to train"):
        stages(AlignConfig(0), JointConfig(0))


def test_default_rates_and_warmups_depend_on_the_stage():
    rates = [stages(AlignConfig(0), JointConfig(100, method))[0].llm_lr for method in ("partial-lora", "lora", "full")]
    assert rates == [1e-3, 1e-4, 2e-5]
    assert [stages(AlignConfig(steps), JointConfig(0))[0].warmup for steps in (1, 100, 5000)] == [0, 10, 50]
    assert stages(AlignConfig(100, warmup=3), JointConfig(0))[0].warmup == 3


def test_the_adapter_passes_between_stages_as_a_file(tmp_path):
    one, other = tiny_mllm().model, tiny_mllm().model
    with torch.no_grad():
        for parameter in one.adapter.parameters():
            parameter.add_(1.0)
    save_adapter(one, tmp_path, 0, True)
    assert [path.name for path in (tmp_path / "align").iterdir()] == ["adapter.safetensors"]
    load_adapter(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.adapter.parameters(), other.adapter.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"adapter\.safetensors.*--out"):
        load_adapter(tiny_mllm(adapter="free").model, tmp_path)
    Path(tmp_path, "align/adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"adapter\.safetensors.*--out"):
        load_adapter(other, tmp_path)
