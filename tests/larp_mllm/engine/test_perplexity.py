"""Perplexity of text: that of the base model, whatever the adapter; the probability of the control ids."""

import math

from larp_mllm.data.text_data import shipped_text
from larp_mllm.engine.perplexity import score_text, text_perplexity
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.token_sequence import TokenSequence
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch
import torch.nn.functional as F

TEXT = ["the kettle was on the stove", "rain fell, and fell, and fell again"]


def test_it_is_the_perplexity_of_the_base_model(mllm):
    found = text_perplexity(mllm.model, mllm.processor, TEXT, 1024)
    plain = text_perplexity(mllm.model.base, mllm.processor, TEXT, 1024)
    assert (found["tokens"], found["nll"]) == (plain["tokens"], plain["nll"]) and "video_start" not in plain
    # Compared with the formula on the whole forward pass.
    nll, count = 0.0, 0
    for text in TEXT:
        ids = torch.tensor([*mllm.processor.encode_text(text), mllm.processor.layout.eos])
        logits = mllm.model.base(input_ids=ids[None]).logits[0, :-1]
        nll, count = nll + F.cross_entropy(logits, ids[1:], reduction="sum").item(), count + len(ids) - 1
    assert found["tokens"] == count
    assert found["nll"] == pytest.approx(nll / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_the_probability_of_video_start_is_that_of_the_whole_softmax(mllm):
    found = text_perplexity(mllm.model, mllm.processor, TEXT[:1], 1024)
    ids = torch.tensor([*mllm.processor.encode_text(TEXT[0]), mllm.processor.layout.eos])
    v = mllm.model.vocabulary
    with torch.no_grad():
        probabilities = mllm.model(ids[None]).logits[0, :-1].softmax(-1).mean(0)
    assert found["video_start"] == pytest.approx(probabilities[v.video_start].item(), rel=1e-4)


def test_likely_control_ids_are_reported_but_do_not_change_the_perplexity():
    mllm = tiny_mllm()
    before = text_perplexity(mllm.model, mllm.processor, TEXT, 1024)
    with torch.no_grad():
        hidden = mllm.model.base.base_model(input_ids=torch.tensor([[5, 6]])).last_hidden_state.mean((0, 1))
        mllm.model.adapter.control_output.weight[0] = 100 * hidden
    after = text_perplexity(mllm.model, mllm.processor, TEXT, 1024)
    assert after["nll"] == before["nll"]
    assert after["video_start"] > 0.3 > before["video_start"]


def test_only_labelled_ids_are_scored_and_the_mode_is_restored(qwen):
    ids = torch.tensor([5, 6, 7, 8])
    masked = torch.tensor([IGNORE, 6, IGNORE, IGNORE])
    qwen.model.train()
    assert score_text(qwen.model, [TokenSequence(ids, masked)])["tokens"] == 1
    assert qwen.model.training
    qwen.model.eval()
    with pytest.raises(ValueError, match=r"no token to score.*--eval-text"):
        score_text(qwen.model, [TokenSequence(ids, torch.full_like(ids, IGNORE))])


def test_long_text_is_scored_whole(qwen):
    long = " ".join(TEXT * 20)
    pieces = text_perplexity(qwen.model, qwen.processor, [long], 64)
    assert pieces["tokens"] == len(qwen.processor.encode_text(long))  # all but the first, and the end


def test_an_evenly_spaced_part_of_much_text_is_scored(qwen, monkeypatch):
    pieces = [TokenSequence(ids := torch.arange(number, number + 4 + number % 3), ids) for number in range(20)]
    passes = []
    model = qwen.model.base.base_model
    monkeypatch.setattr(
        model, "forward", lambda *a, real=model.forward, **k: passes.append(k["input_ids"]) or real(*a, **k)
    )
    every, part = score_text(qwen.model, pieces), score_text(qwen.model, pieces, 3)
    assert (every["pieces"], part["pieces"]) == (20, 3) and len(passes) == 4  # of 8, 8, 4 and 3 pieces
    assert {row[0].item() for row in passes[-1]} == {0, 10, 19}
    # Equal to one after the other, without padding.
    alone = [score_text(qwen.model, [piece]) for piece in pieces]
    nll = sum(one["nll"] * one["tokens"] for one in alone) / sum(one["tokens"] for one in alone)
    assert every["nll"] == pytest.approx(nll, rel=1e-5)


def test_an_id_without_a_row_of_the_base_is_refused(qwen):
    rows = qwen.model.base.get_input_embeddings().num_embeddings
    ids = torch.tensor([5, rows])
    with pytest.raises(ValueError, match=rf"id {rows} of the text tokenizer, but the base model has {rows} rows"):
        score_text(qwen.model, [TokenSequence(ids, ids)])


def test_the_package_holds_a_text():
    (text,) = shipped_text()
    assert 1300 < len(text.split()) < 2000
