"""Candidates: the one is returned after which the model finds the prompt most probable."""

from larp_mllm.generation.ranking import text_nats
from larp_mllm.generation.sampling import VideoSampling

import pytest
import torch

PROMPTS = ["a red circle moving left", "a person surfing"]


def test_nats_of_a_text_are_those_of_the_whole_row(mllm):
    layout, codes = mllm.processor.layout, torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 9, 1]])
    texts = [mllm.processor.encode_text(text) for text in (*PROMPTS, "a")]
    found = text_nats(mllm.model, layout, codes, texts)
    for row, text in enumerate(texts):
        before = layout.question(codes[row].tolist())
        ids = torch.tensor([[*before, *text, layout.eos]])
        with torch.no_grad():
            logits = mllm.model(input_ids=ids).logits[0, :, : layout.vocabulary.text_size].double()
        places = torch.arange(len(before) - 1, ids.shape[1] - 1)
        wanted = -logits.log_softmax(-1)[places, ids[0, len(before) :]].sum()
        assert found[row].item() == pytest.approx(wanted.item(), abs=1e-4)
    assert torch.allclose(text_nats(mllm.model, layout, codes, texts, batch_size=1), found, atol=1e-5)


def test_the_best_of_the_candidates_is_returned(mllm):
    sampling = VideoSampling(seed=5)
    candidates = mllm.generate(PROMPTS, num_videos=4, sampling=sampling)
    texts = [mllm.processor.encode_text(video.prompt) for video in candidates]
    codes = torch.tensor([video.codes for video in candidates])
    best = text_nats(mllm.model, mllm.processor.layout, codes, texts).view(2, 4).argmin(1).tolist()
    videos = mllm.generate(PROMPTS, sampling=sampling, best_of=4)
    assert [video.codes for video in videos] == [candidates[4 * row + number].codes for row, number in enumerate(best)]
    assert len(mllm.generate(PROMPTS, 2, sampling, best_of=2)) == 4
    with pytest.raises(ValueError, match="best_of"):
        mllm.generate(PROMPTS, best_of=0)
