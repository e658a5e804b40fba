"""Logits processors with which transformers' own `generate` samples video spans, with the same result as `larp_mllm`.

Shapes: B sequences, R rows (2 B with guidance), S ids so far, V ids.
"""

from larp.sampling.guidance import apply_guidance
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.model.vocabulary import Vocabulary

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


def logits_processors(
    vocabulary: Vocabulary,
    video: VideoSampling,
    text: TextSampling | None = None,
    *,
    prompt_length: int,
    max_videos: int | None = None,
    first_row: int = 0,
) -> LogitsProcessorList:
    """The processors for `model.generate(..., do_sample=False, logits_processor=...)` that give the ids of `larp_mllm`.

    Args:
        vocabulary: `model.vocabulary`.
        video: how codes are sampled.
        text: how text is sampled; by default `TextSampling()`.
        prompt_length: S of the left-padded prompts.
        max_videos: number of spans that may begin after the prompt; 0: text only, None: any number.
        first_row: index of the first sequence in a list that is generated in batches.

    With guidance, `generate` must get 2 B rows: B prompts, then B unconditional prompts, left-padded to the same length.
    Both halves generate the same ids. A span after generated text is therefore guided against a row that holds that
    text, whereas `Mllm.chat` guides it against the unconditional prompt alone.

        layout, sampling = mllm.processor.layout, VideoSampling(guidance_scale=2.0, seed=3)
        prompt, unconditional = layout.prompt(mllm.processor.encode_text("a person surfing")), layout.prompt([])
        padding = len(prompt) - len(unconditional)
        ids = torch.tensor([prompt, [0] * padding + unconditional])
        mask = torch.tensor([[1] * len(prompt), [0] * padding + [1] * len(unconditional)])
        generated = mllm.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=mllm.model.vocabulary.tokens_per_video,
            do_sample=False,
            logits_processor=logits_processors(mllm.model.vocabulary, sampling, prompt_length=len(prompt)),
            eos_token_id=None,
            pad_token_id=0,
        )
        codes = mllm.model.vocabulary.id_to_code(generated[:1, len(prompt) :])
        frames = mllm.processor.decode_videos(codes)  # as mllm.generate(["a person surfing"], sampling=sampling)
    """
    guidance = [SpanGuidance(vocabulary, video.guidance_scale)] if video.guided else []
    rules = SpanRules(vocabulary, max_videos, prompt_length)
    sample = SeededSampling(vocabulary, video, text or TextSampling(), prompt_length, first_row)
    return LogitsProcessorList([*guidance, rules, sample])


class SpanRules(LogitsProcessor):
    """Masks ids that may not follow: inside a span exactly N codes, then video_end; outside no code and no video_end.

    Args:
        vocabulary: the id layout.
        max_videos: number of spans that may begin after the prompt; None: any number.
        prompt_length: number of ids of the prompt, whose spans do not count.
    """

    def __init__(self, vocabulary: Vocabulary, max_videos: int | None = None, prompt_length: int = 0):
        self.vocabulary, self.max_videos, self.prompt_length = vocabulary, max_videos, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids so far (R, S) and next logits (R, V) -> logits with -inf for ids that may not follow."""
        v, sampled = self.vocabulary, _ids_since_start(self, input_ids)
        ids = torch.arange(scores.shape[-1], device=scores.device)
        begun = (input_ids[:, self.prompt_length :] == v.video_start).sum(-1, keepdim=True)
        may_begin = torch.ones_like(begun, dtype=torch.bool) if self.max_videos is None else begun < self.max_videos
        allowed = torch.where((sampled < v.tokens_per_video)[:, None], v.is_code(ids), v.is_text(ids))
        allowed = torch.where((sampled == v.tokens_per_video)[:, None], ids == v.video_end, allowed)
        allowed |= (sampled > v.tokens_per_video)[:, None] & (ids == v.video_start) & may_begin
        return scores.masked_fill(~allowed, -torch.inf)


class SpanGuidance(LogitsProcessor):
    """Classifier-free guidance inside spans, over 2 B rows: B conditional, then B unconditional.

    Both halves get the same scores, so that they generate the same ids: inside a span the guided scores, outside those
    of the conditional row.
    """

    def __init__(self, vocabulary: Vocabulary, guidance_scale: float):
        self.vocabulary, self.guidance_scale = vocabulary, guidance_scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids so far (2 B, S) and next logits (2 B, V) -> logits (2 B, V). Raises ValueError for an odd number of rows."""
        if len(scores) % 2:
            raise ValueError(
                f"guidance needs an even number of rows, got {len(scores)}: add an unconditional row for each prompt after "
                "all prompts, in the same order"
            )
        first, half = self.vocabulary.first_code, len(scores) // 2
        inside = _ids_since_start(self, input_ids[:half]) < self.vocabulary.tokens_per_video
        guided = scores[:half].clone()
        guided[:, first:] = apply_guidance(scores[:, first:], self.guidance_scale)
        mixed = torch.where(inside[:, None], guided, scores[:half])
        return torch.cat([mixed, mixed])


class SeededSampling(LogitsProcessor):
    """Samples the next id of each row as `larp_mllm` does, and masks all others: for `do_sample=False`.

    Inside spans `video` samples from the code logits, outside `text` from the others. Row i uses the random numbers of
    row `first_row` + i, and further ones for each span after its first. With guidance (2 B rows) both halves sample alike.
    """

    def __init__(
        self, vocabulary: Vocabulary, video: VideoSampling, text: TextSampling, prompt_length: int, first_row: int = 0
    ):
        self.vocabulary, self.video, self.text = vocabulary, video, text
        self.prompt_length, self.first_row = prompt_length, first_row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids so far (R, S) and next logits (R, V) -> logits that are 0 at the sampled id and -inf elsewhere."""
        v, sampled = self.vocabulary, _ids_since_start(self, input_ids)
        rows = len(scores) // 2 if self.video.guided else len(scores)
        text_samples = (input_ids[:, self.prompt_length :] <= v.video_start).sum(-1)  # a video_start counts as text
        # From the last id of the prompt on: a span that the prompt begins is number 0, as is the first one after it.
        starts = input_ids[:, self.prompt_length - 1 :] == v.video_start
        ids = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
        for row in range(len(scores)):
            number, logits = row % rows, scores[row : row + 1]
            index = int(sampled[row])
            if index < v.tokens_per_video:
                span = int(starts[row].sum()) - 1
                uniforms = self.video.uniforms(self.first_row + number + span * rows, 1, v.tokens_per_video)
                uniform = uniforms[:, index].to(logits.device)
                ids[row] = v.code_to_id(self.video.sample(logits[:, v.first_code :], uniform))
            elif index == v.tokens_per_video:
                ids[row] = v.video_end
            else:
                index = int(text_samples[row])
                uniforms = self.text.uniforms(self.first_row + number, 1, max(self.text.max_new_tokens, index + 1))
                ids[row] = self.text.sample(logits[:, : v.first_code], uniforms[:, index].to(logits.device))
        return torch.full_like(scores, -torch.inf).scatter(1, ids[:, None], 0.0)


def _ids_since_start(processor: SpanRules | SpanGuidance | SeededSampling, input_ids: Tensor) -> Tensor:
    """The number of ids after the last video_start of each row (R, S), int64 (R,); more than N if there is none."""
    v, length = processor.vocabulary, input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)
    start = torch.where(input_ids == v.video_start, positions, -length - v.tokens_per_video).amax(-1)
    return length - 1 - start
