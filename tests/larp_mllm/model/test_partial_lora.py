"""Partial LoRA: text is the base's to the last bit, videos are not, in each way in which a model is run, trained and saved."""

import copy
from concurrent.futures import ThreadPoolExecutor

from larp_mllm.engine.lora import prepare_training
from larp_mllm.engine.trained_weights import load_start, take_weights
from larp_mllm.generation.decode import DecodeState
from larp_mllm.metrics.scores import code_bits
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.parts import EXCLUDED
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.families import FAMILIES
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch
from transformers import AutoModelForCausalLM

RANK = 3


def with_updates(mllm: Mllm) -> Mllm:
    """Add updates that are not zero, and freeze the rest of the base."""
    prepare_training(mllm.model, "partial-lora", RANK)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in mllm.model.named_parameters():
        if name.endswith("lora_up"):
            parameter.data.normal_(std=0.3, generator=generator)
    return mllm


def mixed_ids(mllm: Mllm, codes=(3, 1, 2, 0)) -> torch.Tensor:
    """Text, a video, text: (1, 12)."""
    return torch.tensor([[5, 6, 7, *mllm.model.vocabulary.span(codes), 8, 9, 5]])


@torch.no_grad()
def logits(mllm: Mllm, ids: torch.Tensor) -> torch.Tensor:
    return mllm.model(input_ids=ids).logits


def test_new_updates_change_nothing():
    plain, updated = tiny_mllm(), tiny_mllm()
    updated.model.add_partial_lora(RANK)
    assert torch.equal(logits(plain, mixed_ids(plain)), logits(updated, mixed_ids(plain)))
    updated.model.add_partial_lora(RANK)
    with pytest.raises(ValueError, match=f"rank {RANK}.*--joint.lora-rank {RANK}"):
        updated.model.add_partial_lora(RANK + 1)


@pytest.mark.parametrize("family", ["qwen2-sliding", "qwen3-untied", "llama3-tied", "mistral-sliding"])
def test_text_without_a_video_before_it_is_the_base_to_the_last_bit(family):
    torch.manual_seed(0)
    base, codebook = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval(), torch.randn(16, 4)
    plain = Mllm(LarpMllmForCausalLM.from_base(base, 99, codebook, 4), None)
    updated = Mllm(copy.deepcopy(plain.model), None)
    with_updates(updated)
    ids = mixed_ids(plain)
    before, after = logits(plain, ids), logits(updated, ids)
    assert torch.equal(before[:, :3], after[:, :3])
    # From video_start on, each position differs: later text sees the video through attention.
    assert not (before[:, 3:] == after[:, 3:]).all(-1).any()
    text = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(logits(plain, text), logits(updated, text))


@torch.no_grad()
def test_with_a_cache_and_packed_it_is_the_same():
    mllm = with_updates(tiny_mllm())
    ids = mixed_ids(mllm)
    whole = mllm.model(input_ids=ids).logits[0]
    state = DecodeState(mllm.model, [ids[0, :3].tolist()])
    for place in range(3, ids.shape[1]):
        state.append(ids[:, place])
        found = torch.cat([state.text_logits(), state.code_logits()], dim=-1)[0]
        may_follow = whole[place] > EXCLUDED  # a DecodeState excludes nothing
        torch.testing.assert_close(found[may_follow], whole[place][may_follow], atol=1e-5, rtol=0)
    packed = torch.cat([ids, ids[:, :5]], dim=1)
    positions = torch.cat([torch.arange(ids.shape[1]), torch.arange(5)])[None]
    both = mllm.model(input_ids=packed, position_ids=positions).logits[0]
    torch.testing.assert_close(both[: ids.shape[1]], whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[ids.shape[1] :], whole[:5], atol=1e-5, rtol=0)


def test_scores_and_transformers_generate_use_it():
    plain, updated = tiny_mllm(), with_updates(tiny_mllm())
    prompt, codes = [[5, 6, plain.model.vocabulary.video_start]], torch.tensor([[3, 1, 2, 0]])
    assert not torch.equal(code_bits(plain.model, prompt, codes), code_bits(updated.model, prompt, codes))
    ids = mixed_ids(updated)[:, :6]
    out = updated.model.generate(
        ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    again = logits(updated, out.sequences)[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), again, atol=1e-5, rtol=0)


def test_a_saved_model_keeps_it(tmp_path):
    mllm = with_updates(tiny_mllm())
    mllm.save(tmp_path / "model")
    loaded = Mllm.load(tmp_path / "model", "cpu")
    assert loaded.model.config.partial_lora_rank == RANK
    assert torch.equal(logits(loaded, mixed_ids(mllm)), logits(mllm, mixed_ids(mllm)))


def test_a_training_goes_on_from_it(tmp_path):
    mllm, fresh = with_updates(tiny_mllm()), tiny_mllm()
    mllm.save(tmp_path / "model")
    take_weights(fresh, load_start(str(tmp_path / "model")), "model")
    assert torch.equal(logits(fresh, mixed_ids(mllm)), logits(mllm, mixed_ids(mllm)))
    prepare_training(fresh.model, "partial-lora", RANK)
    trained = {name for name, parameter in fresh.model.base.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    with pytest.raises(ValueError, match="partial LoRA already"):
        prepare_training(fresh.model, "lora", RANK)


def test_several_threads_use_one_model():
    mllm = with_updates(tiny_mllm())
    inputs = [mixed_ids(mllm), mixed_ids(mllm)[:, 2:], torch.tensor([[5, 6, 7]]), mixed_ids(mllm).repeat(2, 1)] * 25
    wanted = [logits(mllm, ids) for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: logits(mllm, ids), inputs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    gradients = []
    for checkpointing in (False, True):
        model = with_updates(tiny_mllm()).model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
        ids = mixed_ids(tiny_mllm())
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("lora_down" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_embeddings_tell_where_videos_are():
    mllm = with_updates(tiny_mllm())
    ids = mixed_ids(mllm)
    inputs = mllm.model.get_input_embeddings()(ids)
    assert torch.equal(
        mllm.model.get_input_embeddings().video_ids(inputs), ids * (ids >= mllm.model.vocabulary.text_size)
    )
    assert torch.equal(mllm.model(inputs_embeds=inputs).logits, logits(mllm, ids))
    options = dict(attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(
        mllm.model.generate(inputs_embeds=inputs, **options), mllm.model.generate(ids, **options)[:, 12:]
    )


@pytest.mark.slow
@torch.no_grad()
def test_it_can_be_compiled():
    mllm = with_updates(tiny_mllm())
    compiled = torch.compile(mllm.model, backend="eager")
    for ids in (mixed_ids(mllm), torch.tensor([[5, 6, 7]]), mixed_ids(mllm).roll(1, 1)):
        torch.testing.assert_close(compiled(input_ids=ids).logits, logits(mllm, ids), atol=1e-5, rtol=0)
