"""The decoding loop: batches, padding, guidance, options, and the limits of the base model."""

import larp_mllm
from larp_mllm.generation.decode import decode_codes
from larp_mllm.generation.sampling import TextSampling, VideoSampling

import numpy as np
import pytest
import torch

PROMPTS = ["a red circle", "surfing", "a person that is surfing slowly with a <|video_start|> in the text", ""]


def test_the_batch_size_does_not_change_the_videos(mllm):
    for scale in (1.0, 3.0):
        batch = mllm.generate(PROMPTS, sampling=VideoSampling(guidance_scale=scale, seed=3))
        single = mllm.generate(PROMPTS, sampling=VideoSampling(guidance_scale=scale, seed=3, batch_size=1))
        assert [v.codes for v in batch] == [v.codes for v in single]
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(batch, single, strict=True))


def test_left_padding_does_not_change_the_logits(mllm):
    layout, model = mllm.processor.layout, mllm.model
    prompts = [layout.prompt(mllm.processor.encode_text(text)) for text in PROMPTS]
    seen = []

    def sample(logits, index):
        seen.append(logits)
        return torch.full((len(logits),), index)

    decode_codes(model, prompts, sample)
    batch, seen[:] = list(seen), []
    for row, prompt in enumerate(prompts):
        decode_codes(model, [prompt], sample)
        for step in range(4):
            torch.testing.assert_close(seen[step][0], batch[step][row], rtol=1e-4, atol=1e-5)
        seen.clear()


@torch.no_grad()
def test_guided_logits_are_those_of_two_forward_passes(mllm):
    layout, model, v = mllm.processor.layout, mllm.model, mllm.model.vocabulary
    prompt, unconditional = layout.prompt([5, 6, 7]), layout.prompt([])
    codes, seen = [3, 0, 15, 2], []

    def sample(logits, index):
        seen.append(logits[0])
        return torch.tensor([codes[index]])

    assert decode_codes(model, [prompt], sample, unconditional, guidance_scale=2.5).tolist() == [codes]
    ids = [v.code_to_id(code) for code in codes[:3]]
    conditional, other = (
        model(torch.tensor([start + ids])).logits[0, -4:, v.first_code :] for start in (prompt, unconditional)
    )
    torch.testing.assert_close(torch.stack(seen), other + 2.5 * (conditional - other), rtol=1e-4, atol=1e-5)


def test_no_text_logits_are_computed(qwen):
    hook = qwen.model.base.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the text head ran"))
    qwen.generate(["surfing"])
    hook.remove()


def test_options_change_the_result(qwen):
    def codes(**options):
        return qwen.generate(["surfing"], sampling=VideoSampling(**options))[0].codes

    base = codes()
    changed = [
        codes(seed=1),
        codes(temperature=0),
        codes(guidance_scale=30.0),
        codes(top_k=1),
        codes(top_p=0.01),
        codes(min_p=1.0),
    ]
    assert all(other != base for other in changed)
    assert changed[1] == codes(top_k=1)
    first, second = qwen.generate(["surfing"], num_videos=2)
    assert first.codes == base and second.codes != base


def test_seeds_of_numpy_are_seeds(qwen):
    seeds = (np.int64(2**40), 2**40)
    one, other = (qwen.generate(["surfing"], sampling=VideoSampling(seed=seed))[0].codes for seed in seeds)
    assert one == other


def test_captions_longer_than_the_positions_of_the_base_are_refused(qwen):
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"max_new_tokens is 2000; of the 1024 positions .* leaves 1018"):
        qwen.describe([frames], TextSampling(max_new_tokens=2000))
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1, got 0"):
        larp_mllm.describe(frames, max_new_tokens=0)


def test_a_prompt_longer_than_the_positions_of_the_base_is_refused(qwen):
    with pytest.raises(ValueError, match="1024 positions"):
        qwen.generate(["surf " * 2000])


def test_the_batch_does_not_change_a_caption(mllm):
    frames = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    short = TextSampling(max_new_tokens=6)
    assert mllm.describe([frames, frames[::-1].copy()], short)[0] == mllm.describe([frames], short)[0]
