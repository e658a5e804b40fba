"""Models of partial LoRA that are stored without their base: the same model, small, and never on another base."""

import json
import shutil

from larp_mllm.export.checkpoint import export
from larp_mllm.model import without_base
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.weights import BASE, WEIGHTS
from larp_mllm.model.without_base import write_without_base
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.model.test_partial_lora import logits, mixed_ids, with_updates
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@pytest.fixture
def stored(tmp_path):
    """Folders of a base, of a model with its base, and of the same without it; and the model."""
    mllm = tiny_mllm()
    mllm.model.base.save_pretrained(tmp_path / "base")
    mllm.processor.tokenizer.save_pretrained(tmp_path / "base")
    with_updates(mllm)
    for value in mllm.model.parameters():  # what is stored in 16 bits is then equal to the bit
        if value.requires_grad:
            value.data = value.data.to(torch.bfloat16).float()
    mllm.save(tmp_path / "whole")
    write_without_base(mllm.model, tmp_path / "whole", tmp_path / "small", str(tmp_path / "base"))
    return tmp_path, mllm


def test_it_is_the_same_model_and_small(stored):
    folder, mllm = stored
    loaded = Mllm.load(folder / "small", "cpu")
    assert torch.equal(logits(mllm, mixed_ids(mllm)), logits(loaded, mixed_ids(mllm)))
    assert loaded.processor.video_tokenizer.weight_hash() == mllm.processor.video_tokenizer.weight_hash()
    assert loaded.generate(["a red circle"])[0].codes == mllm.generate(["a red circle"])[0].codes
    added = load_file(folder / "small" / WEIGHTS)
    assert not [name for name in added if name.startswith("base.") and "lora" not in name]
    assert {name for name, value in added.items() if value.dtype != torch.bfloat16} == {"adapter.codebook"}
    auto = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.bfloat16)
    assert isinstance(auto, LarpMllmForCausalLM) and auto.dtype == torch.bfloat16 and not auto.training


def test_it_is_saved_and_exported_with_its_base(stored):
    folder, mllm = stored
    Mllm.load(folder / "small", "cpu").save(folder / "again")
    assert not (folder / "again" / BASE).exists()
    shutil.rmtree(folder / "base")
    again = Mllm.load(folder / "again", "cpu")
    assert torch.equal(logits(mllm, mixed_ids(mllm)), logits(again, mixed_ids(mllm)))
    with pytest.raises(ValueError, match="base"):
        Mllm.load(folder / "small", "cpu")


def test_an_export_has_the_base_in_it(stored):
    folder, _ = stored
    export(folder / "small", folder / "stock")
    assert any(name.endswith("q_proj.weight") for name in load_file(folder / "stock" / WEIGHTS))


def test_another_base_is_refused(stored, tmp_path):
    folder, mllm = stored
    weights = load_file(folder / "base" / WEIGHTS)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] += 1
    save_file(weights, folder / "base" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"trained on another .*base than the one that is found here"):
        Mllm.load(folder / "small", "cpu")
    with pytest.raises(ValueError, match=r"the base of .*whole is not .*name the one"):
        write_without_base(mllm.model, folder / "whole", folder / "new", str(folder / "base"))
    assert not (folder / "new").exists()


def test_a_damaged_folder_is_named(stored):
    folder = stored[0] / "small"
    weights = load_file(folder / WEIGHTS)
    whole = dict(weights)
    lost = next(name for name in weights if name.endswith("lora_up"))
    del weights[lost]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"small: the weights do not fit config.json: {lost} is missing"):
        Mllm.load(folder, "cpu")
    save_file(whole | {lost: torch.full_like(whole[lost], float("nan"))}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{lost} holds NaN"):
        Mllm.load(folder, "cpu")
    (folder / BASE).write_text("[]")
    with pytest.raises(ValueError, match=r"base\.json is damaged"):
        Mllm.load(folder, "cpu")


def test_the_fetched_base_is_asked_for_by_name(stored, monkeypatch):
    """A model of the fetched file never takes the hub's weights of the same name."""
    folder = stored[0] / "small"
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["dequantized_from"] = "SmolLM2-135M-Instruct.Q4_1.gguf, SHA-256 0"
    (folder / "config.json").write_text(json.dumps(config))
    saved = json.loads((folder / BASE).read_text())
    (folder / BASE).write_text(json.dumps(saved | {"base": "SmolLM2-135M-Instruct"}))
    monkeypatch.setenv("LARP_CACHE", str(stored[0] / "empty"))
    with pytest.raises(ValueError, match=r"needs SmolLM2-135M-Instruct, .*larp-mllm fetch smollm2"):
        Mllm.load(folder, "cpu")
    asked = []
    monkeypatch.setattr(
        without_base.FETCHED["HuggingFaceTB/SmolLM2-135M-Instruct"].__class__, "find", lambda _: ("FILE",)
    )
    monkeypatch.setattr(without_base, "load_base", lambda name, **_: asked.append(name) or [torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="trained on another"):
        Mllm.load(folder, "cpu")
    assert asked == ["FILE"]


def test_without_partial_lora_there_is_nothing_to_store(tmp_path):
    mllm = tiny_mllm()
    mllm.save(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"has no partial LoRA.*--joint.method partial-lora"):
        write_without_base(mllm.model, tmp_path / "whole", tmp_path / "small", "tiny-qwen2")
