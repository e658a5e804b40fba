"""The wrapper: the base unharmed, the loss exact, the round trip."""

from larp_mllm.bases import load_base
from larp_mllm.modeling import IGNORE, LarpMllmForCausalLM
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def mixed_ids(mllm, rows=3, length=9):
    return torch.randint(0, mllm.model.vocabulary.size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("base", ["tiny-qwen2", "tiny-llama"])
def test_text_logits_are_bit_identical_to_the_base(base):
    torch.manual_seed(0)
    language_model, text_tokenizer = load_base(base, ["a red circle"], layers=2, width=32, heads=2)
    language_model.eval()
    assert language_model.config.tie_word_embeddings == (base == "tiny-qwen2")
    ids = torch.randint(0, len(text_tokenizer), (2, 7))
    before, weights = language_model(ids).logits, {k: v.clone() for k, v in language_model.state_dict().items()}
    model = LarpMllmForCausalLM.from_base(language_model, len(text_tokenizer), torch.randn(16, 4), 4)
    assert all(torch.equal(v, weights[k]) for k, v in model.base.state_dict().items())
    logits = model(ids).logits
    assert logits.shape[-1] == model.vocabulary.size
    assert torch.equal(logits[..., : language_model.config.vocab_size], before)


def test_a_tokenizer_larger_than_the_base_never_gets_its_extra_ids(mllm):
    base = mllm.model.base
    model = LarpMllmForCausalLM.from_base(base, base.config.vocab_size + 3, torch.randn(16, 4), 4)
    logits = model(torch.tensor([[1, 2]])).logits
    assert logits.shape[-1] == base.config.vocab_size + 3 + 2 + 16
    assert torch.isinf(logits[..., base.config.vocab_size : model.vocabulary.text_size]).all()


def test_loss_equals_the_plain_way(mllm):
    model, v = mllm.model, mllm.model.vocabulary
    ids = mixed_ids(mllm)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, IGNORE)
    out = model(ids, labels=labels)
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    is_code, is_text = v.is_code(targets), (targets != IGNORE) & ~v.is_code(targets)
    video = F.cross_entropy(logits[is_code][:, v.first_code :], targets[is_code] - v.first_code, reduction="sum")
    text = F.cross_entropy(logits[is_text][:, : v.first_code], targets[is_text], reduction="sum")
    torch.testing.assert_close(out.video_nll, video)
    torch.testing.assert_close(out.text_nll, text)
    torch.testing.assert_close(out.loss, (video + text) / (is_code.sum() + is_text.sum()))
    assert (int(out.video_count), int(out.text_count)) == (int(is_code.sum()), int(is_text.sum()))
    weighted = model(ids, labels=labels, num_items_in_batch=10.0, text_weight=0.5)
    torch.testing.assert_close(weighted.loss, (video + 0.5 * text) / 10)


def test_code_targets_never_meet_the_text_head(qwen):
    model, v = qwen.model, qwen.model.vocabulary
    seen = []
    hook = model.base.get_output_embeddings().register_forward_hook(lambda m, inputs, out: seen.append(out.numel()))
    ids = torch.tensor([[1, *v.span([1, 2, 3, 4])]])
    labels = ids.masked_fill(~v.is_code(ids), IGNORE)
    model(ids, labels=labels)
    hook.remove()
    assert seen == [0]


def test_every_parameter_gets_a_gradient_even_without_text_targets(qwen):
    model, v = qwen.model, qwen.model.vocabulary
    ids = torch.tensor([[1, *v.span([1, 2, 3, 4])]])
    model(ids, labels=ids.masked_fill(~v.is_code(ids), IGNORE)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    model.zero_grad()
    assert missing == []


def test_padding_on_the_right_changes_nothing(mllm):
    ids = mixed_ids(mllm, rows=1)
    padded = F.pad(ids, (0, 5))
    torch.testing.assert_close(mllm.model(padded).logits[:, :9], mllm.model(ids).logits)


@pytest.mark.parametrize("adapter", ["codebook", "free"])
def test_adapter_rows_start_at_the_size_of_the_base_rows(adapter):
    model = tiny_mllm(adapter=adapter).model
    base = model.base.get_input_embeddings().weight.norm(dim=-1).mean()
    # Head rows may have a part in common: it moves all code logits alike.
    head = model.adapter.code_rows() - model.adapter.code_rows().mean(0)
    for rows in (model.adapter.input_rows(), head, model.adapter.control_rows()):
        assert 0.7 < rows.norm(dim=-1).mean() / base < 1.3


def test_similar_codes_start_with_similar_rows():
    model = tiny_mllm().model
    codebook, rows = model.adapter.codebook, model.adapter.input_rows()[2:]
    near, far = (
        (codebook @ codebook.T).fill_diagonal_(-9).flatten().argmax(),
        (codebook @ codebook.T).flatten().argmin(),
    )
    distance = torch.cdist(rows, rows).flatten()
    assert distance[near] < 0.7 * distance[far]


def test_unknown_adapter_is_refused():
    with pytest.raises(ValueError, match="codebook, free"):
        tiny_mllm(adapter="codebok")


def test_round_trip_through_the_auto_classes(mllm, tmp_path):
    mllm.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, LarpMllmForCausalLM)
    ids = mixed_ids(mllm)
    assert torch.equal(again(ids).logits, mllm.model(ids).logits)
    assert again.config.vocabulary == mllm.model.vocabulary


def test_missing_and_misshapen_tensors_are_errors(qwen, tmp_path):
    qwen.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["adapter.codebook"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter.codebook"):
        LarpMllmForCausalLM.from_pretrained(tmp_path)
