"""What other libraries take a model apart into: embedding, decoder and head of all ids."""

import copy
import pickle

from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.parts import EXCLUDED
from tests.larp_mllm.families import FAMILIES, OTHERS

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture(scope="module", params=["qwen2-tied", "llama2"])
def model(request):
    """Ids 0 to 98 are text of the base, 99 an entry of its tokenizer alone, 100 and 101 controls, 102 to 117 codes."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES[request.param]())
    return LarpMllmForCausalLM.from_base(base, 100, torch.randn(16, 4), 4).eval()


@pytest.fixture
def ids(model):
    """Two rows of text and videos, the last one cut off."""
    v = model.vocabulary
    rows = [[5, *v.span([1, 2, 3, 0]), 7, 8], [9, 8, 7, *v.span([0, 1, 0, 4])]]
    return torch.tensor([row[:8] for row in rows])


@torch.no_grad()
def test_the_parts_together_are_the_model(model, ids):
    embedding, decoder, head = model.get_input_embeddings(), model.get_decoder(), model.get_output_embeddings()
    logits = model(ids).logits
    hidden = decoder(input_ids=ids).last_hidden_state
    assert torch.equal(head(hidden), logits)
    by_rows, may_follow = F.linear(hidden, head.weight, head.bias), logits > EXCLUDED
    torch.testing.assert_close(by_rows[may_follow], logits[may_follow], rtol=1e-5, atol=1e-5)
    assert (by_rows[~may_follow] < EXCLUDED / 2).all()
    assert torch.equal(embedding(ids), F.embedding(ids, embedding.weight))
    assert embedding.weight.shape == (embedding.num_embeddings, embedding.embedding_dim) == (118, 32)
    plain = decoder(inputs_embeds=embedding(ids)).last_hidden_state
    torch.testing.assert_close(plain[..., :32], hidden[..., :32])
    assert model.config.get_text_config().vocab_size == logits.shape[-1] == len(head.weight) == 118


@torch.no_grad()
def test_only_what_may_follow_has_probability(model, ids):
    v, found = model.vocabulary, model(ids).logits.softmax(-1)
    inside = v.is_inside(ids)
    assert (found[inside][:, : v.video_end] == 0).all() and (found[~inside][:, v.video_end :] == 0).all()
    assert (found[..., 99] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(ids.shape))
    assert model(ids).logits[inside].min() == EXCLUDED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_half_precision_too(model, ids, dtype):
    half = copy.deepcopy(model).to(dtype)
    head, hidden = half.get_output_embeddings(), half.get_decoder()(input_ids=ids).last_hidden_state
    for found in (head(hidden), F.linear(hidden, head.weight, head.bias)):
        found = found.float().softmax(-1)
        assert torch.isfinite(found).all() and found[0, 1, : model.vocabulary.video_end].max() == 0


@torch.no_grad()
def test_the_likelihood_of_text_is_that_of_the_base(model):
    # As lm-evaluation-harness scores a continuation: log-softmax over all logits. Only video_start takes from it.
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    logits = model(ids).logits[:, :-1].double()
    ours = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    base = model.base(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    start = logits.softmax(-1)[..., model.vocabulary.video_start]
    torch.testing.assert_close(ours, base + (-start).log1p(), rtol=0, atol=1e-6)


def test_a_part_is_frozen_as_usual(model, ids):
    own = copy.deepcopy(model)
    whole = own.get_decoder(), own.get_output_embeddings()
    assert {*whole[0].parameters(), *whole[1].parameters()} == {*own.parameters()}
    assert len(list(own.parameters())) == len(list(model.parameters()))
    own.get_input_embeddings().requires_grad_(False)
    own(ids, labels=ids).loss.backward()
    unchanged = {parameter for parameter in own.parameters() if parameter.grad is None}
    assert unchanged == {*own.get_input_embeddings().parameters()} and own.adapter.control_input.weight in unchanged
    assert not list(whole[0].parameters(recurse=False))


def test_copies_and_pickles_have_parts_of_their_own(model, ids):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            before = model(ids).logits
            other.adapter.control_output.weight.add_(1.0)
            assert torch.equal(model(ids).logits, before)
            assert torch.equal(
                other.get_output_embeddings()(other.get_decoder()(ids).last_hidden_state), other(ids).logits
            )
            assert not torch.equal(other(ids).logits, before)
        assert other.state_dict().keys() == model.state_dict().keys()
    assert not any(name.startswith(("embeddings", "decoder", "head")) for name in model.state_dict())


def test_the_decoder_refuses_what_the_model_refuses(model, ids):
    with pytest.raises(ValueError, match="input_ids holds 118, but the ids of this model are 0 to 117"):
        model.get_decoder()(input_ids=ids.clone().fill_(118))
    with pytest.raises(ValueError, match="give either input_ids"):
        model.get_decoder()()


def test_a_model_made_without_values_is_filled(model):
    with torch.device("meta"):
        empty = LarpMllmForCausalLM(copy.deepcopy(model.config))
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(torch.nan)
    empty.init_weights()
    assert all(torch.isfinite(tensor).all() for tensor in (*empty.parameters(), *empty.buffers()))
    assert (empty.adapter.codebook == 0).all()


def test_generate_computes_the_rows_of_codes_once_and_anew_after_training(model, ids):
    own, calls = copy.deepcopy(model), []
    for rows in (own.adapter.code_input, own.adapter.code_output):
        rows.register_forward_hook(lambda *_: calls.append(1))
    asked = ids[1:, :-1]
    settings = dict(attention_mask=asked * 0 + 1, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings |= dict(output_logits=True, return_dict_in_generate=True)
    for _ in range(2):
        calls.clear()
        found = own.generate(asked, **settings)
        assert len(calls) == 2
        expected = own(found.sequences).logits[:, asked.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 4
        for parameter in own.adapter.parameters():
            parameter.data.mul_(1.5)  # which changes no version that could be compared


def test_from_pretrained_takes_the_name_of_its_argument_in_transformers(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again = LarpMllmForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert LarpMllmForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"LarpMllmForCausalLM\.from_pretrained knows no foo: leave it out"):
        LarpMllmForCausalLM.from_pretrained(tmp_path, foo=3)


@pytest.mark.parametrize("family", ["qwen2-tied", "falcon", "opt"])
def test_accelerate_places_a_model_with_a_tied_head(family, tmp_path):
    """It looks for the names of modules within those of tied weights."""
    base = AutoModelForCausalLM.from_config((FAMILIES | OTHERS)[family]())
    saved = LarpMllmForCausalLM.from_base(base, 0, torch.randn(16, 4), 4).eval()
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(torch.tensor([[5, 6]])).logits, saved(torch.tensor([[5, 6]])).logits)
    assert not AutoConfig.from_pretrained(tmp_path).auto_map  # asked by TRL, which is given a folder
