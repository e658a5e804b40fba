"""What a base does is measured when it is attached: its logits, packing, the scale of its embedding, its linear layers."""

import copy
import json
from types import SimpleNamespace

from larp_mllm.data.collate import pack
from larp_mllm.engine.lora import prepare_training, updated_layers
from larp_mllm.engine.scoring import metric_sums
from larp_mllm.export.checkpoint import stock_model
from larp_mllm.model.base_models import BaseError, check_positions, load_base, tiny_tokenizer
from larp_mllm.model.configuration import positions_of
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.probe import linear_layers, measure_base
from larp_mllm.processing.token_sequence import TokenSequence
from tests.larp_mllm.families import FAMILIES, OTHERS, POSITIONS, VOCAB_SIZE
from tests.larp_mllm.tiny import every_logit
from training import train_mllm

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

N, K = 4, 16
LEAKING = {"qwen3.5", "qwen3-next", "granite-hybrid", "lfm2", "falcon-h1", "opt", "falcon", "mpt", "xglm"}
SCALED = {"gemma", "gemma2", "gemma3", "xglm"}
REFUSED = {
    "multiplier": (
        transformers.FalconH1Config,
        dict(
            mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_d_ssm=64, lm_head_multiplier=0.5
        ),
        r"FalconH1ForCausalLM\) changes its logits after the head \(by up to .*\): take a Llama",
    ),
    "multiplier of ids": (
        transformers.FalconH1Config,
        dict(
            mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_d_ssm=64, embedding_multiplier=4.0
        ),
        r"FalconH1ForCausalLM\) computes something else from embeddings than from ids",
    ),
    "mamba2": (
        transformers.Mamba2Config,
        dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, expand=2),
        r"Mamba2ForCausalLM\) keeps its state in another way than as past_key_values",
    ),
    "bloom": (
        transformers.BloomConfig,
        dict(n_layer=2, n_head=4),
        r"BloomForCausalLM\) cannot run on embeddings with a cache \(RuntimeError",
    ),
    "bias": (
        transformers.PhiConfig,
        dict(num_attention_heads=4, intermediate_size=64),
        "the head of a phi has a bias, which codes would not have",
    ),
}


def base_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config((FAMILIES | OTHERS)[family]()).eval()
    with torch.no_grad():  # so that layers weigh as much as the residual stream
        for parameter in base.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return base


def model_of(base: PreTrainedModel) -> LarpMllmForCausalLM:
    return LarpMllmForCausalLM.from_base(base, VOCAB_SIZE, torch.randn(K, 4), N).eval()


def records(model: LarpMllmForCausalLM) -> list[torch.Tensor]:
    v = model.vocabulary
    return [
        torch.tensor([*range(5, 5 + words), *v.span([1, 2, 3, words]), 7]) for words in (3, 5, 4)
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", OTHERS)
def test_text_logits_and_the_export_are_those_of_the_base(family, tmp_path):
    base = base_of(family)
    own = base(TEXT := torch.arange(10, 20)[None]).logits
    model = model_of(base)
    assert model.config.packing == (family not in LEAKING)
    assert (model.config.embedding_scale != 1.0) == (family in SCALED)
    assert torch.equal(model(TEXT).logits[..., :VOCAB_SIZE], own)
    ids = records(model)[0][None]
    stock_model(model).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(stock(ids, use_cache=False).logits, every_logit(model, ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_measured_is_saved_with_the_model(tmp_path):
    model = model_of(base_of("gemma3"))
    prepare_training(model, "partial-lora", 2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.embedding_scale == pytest.approx(32**0.5)
    ids = records(model)[0][None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    # A model that was trained before scales were measured has rows of scale 1, which its export keeps.
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["embedding_scale"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    old = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.allclose(old(ids).logits, model(ids).logits, atol=1e-2)
    rows = stock_model(old).get_input_embeddings().weight[VOCAB_SIZE:] * 32**0.5
    torch.testing.assert_close(rows, old.adapter.input_rows())


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_does_something_else_is_refused_in_one_line(kind):
    config, fields, words = REFUSED[kind]
    common = dict(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config(**common, **fields))
    with pytest.raises(ValueError, match=words) as refused:
        model_of(base)
    assert "\n" not in str(refused.value)


def test_an_embedding_that_adds_something_is_refused():
    base = base_of("llama2")
    embedding = base.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, out: out + 1)
    with pytest.raises(ValueError, match="does more than to multiply its rows by a constant"):
        model_of(base)


def test_a_head_that_does_more_than_a_product_is_refused():
    base = base_of("llama2")
    base.get_output_embeddings().register_forward_hook(lambda module, given, out: out.tanh())
    with pytest.raises(ValueError, match="has a head that is more than a matrix"):
        model_of(base)


def test_a_base_that_ignores_padding_is_refused():
    base = base_of("llama2")
    base.base_model.register_forward_pre_hook(
        lambda module, given, options: (given, options | {"attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="other logits with a cache and padding on the left"):
        model_of(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama2", "qwen3.5", "lfm2", "gemma3"])
def test_measuring_leaves_no_trace_and_needs_no_precision(family, dtype):
    base = base_of(family).to(dtype)
    base.config.attention_dropout = 0.5
    base.train()
    base.model.layers[0].eval()
    modes = {name: module.training for name, module in base.named_modules()}
    state, random = copy.deepcopy(base.state_dict()), torch.get_rng_state()
    assert measure_base(base).packing == (family not in LEAKING)
    linear_layers(base)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in base.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in base.parameters())


def test_a_base_without_values_is_taken_for_an_ordinary_one():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(OTHERS["gemma3"]())
    assert measure_base(base) == (True, 1.0)


@pytest.mark.parametrize("family", ["qwen3.5", "lfm2", "llama2"])
def test_a_step_has_the_losses_of_records_apart(family):
    model = model_of(base_of(family))

    class Recorder:
        def __call__(self, **inputs):
            return model(**inputs)

        def backward(self, loss):
            loss.backward()

        def step(self):
            pass

    sequences = [TokenSequence(ids, ids) for ids in records(model)]
    apart = sum(metric_sums(model(one.ids[None], labels=one.ids[None])) for one in sequences)
    config = train_mllm.TrainMllmConfig(batch_size=3)
    sums = train_mllm.train_step(Recorder(), sequences, config, train_mllm.Ranks(), model.config.packing)
    torch.testing.assert_close(sums, apart, rtol=1e-5, atol=1e-5)


def test_records_share_rows_only_where_they_may():
    sequences = [TokenSequence(torch.zeros(size), torch.zeros(size)) for size in (3, 5, 2)]
    assert [len(row) for row in pack(sequences, 10)] == [3]
    assert [[len(one.ids) for one in row] for row in pack(sequences, 10, 4, together=False)] == [[5], [3], [2], []]


# ------------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("part", ["partial-lora", "lora"])
@pytest.mark.parametrize("family", [*OTHERS, "llama2", "qwen2-tied"])
def test_lora_updates_every_linear_layer_but_the_head(family, part):
    base = base_of(family)
    head = base.get_output_embeddings()
    linear = {n for n, layer in base.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head}
    model = model_of(base)
    if part == "lora" and family == "qwen3-next":
        with pytest.raises(ValueError, match=r"--joint\.method partial-lora or full"):
            prepare_training(model, part, 2)
        return
    prepare_training(model, part, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_up" in name or "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.stack([records(model)[0]] * 2)
    model.train()(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if "lora" in name and parameter.grad.any()}
    updated = {name.removeprefix("base.").partition(".lora")[0] for name in trained}
    refused_by_peft = {name for name in linear if part == "lora" and family == "falcon-h1" and "out_proj" in name}
    assert updated == linear - refused_by_peft
    assert set(updated_layers(model)) == {name.rpartition(".")[2] for name in updated}


def test_a_training_goes_on_from_updates_of_fewer_layers():
    model, other = model_of(base_of("starcoder2")), model_of(base_of("starcoder2"))
    model.add_partial_lora(2, ("q_proj", "k_proj", "v_proj", "o_proj"))  # as before layers were measured
    other.add_partial_lora(2, model.config.partial_lora_layers)
    other.load_state_dict(model.state_dict())
    assert updated_layers(other) == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_layers_that_are_read_and_not_called_are_not_updated():
    sizes = dict(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    more = dict(num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1)
    config = transformers.JambaConfig(
        **sizes, **more, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False
    )
    assert "dt_proj" not in linear_layers(base := AutoModelForCausalLM.from_config(config))
    assert {"in_proj", "x_proj", "out_proj", "q_proj", "down_proj"} <= set(linear_layers(base))


# ---------------------------------------------------------------------------------------------------------------- loading


def test_the_language_model_of_a_checkpoint_with_images_is_a_base(tmp_path):
    tokenizer = tiny_tokenizer(["a cat"])
    text = OTHERS["qwen3.5"]().to_dict() | {"vocab_size": len(tokenizer)}
    vision = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    whole = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    base, _ = load_base(str(tmp_path))
    ids = torch.arange(9)[None]
    torch.testing.assert_close(base.eval()(ids).logits, whole(ids).logits)
    assert not measure_base(base).packing


def test_positions_are_those_of_any_config():
    mpt = model_of(base_of("mpt"))
    assert mpt.config.positions == POSITIONS
    with pytest.raises(BaseError, match=f"it has {POSITIONS} positions"):
        check_positions(mpt.base, POSITIONS)
    assert positions_of(SimpleNamespace(seq_length=5)) > 10**9
