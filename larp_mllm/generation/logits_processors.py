"""Video spans under transformers' own `generate`: processors of logits that make it write what `larp_mllm` writes.

Shapes: B sequences, R rows (2 B with guidance), S ids so far, V ids.
"""

from larp.sampling.sample import apply_guidance
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
    """What to pass to `model.generate(..., do_sample=False, logits_processor=...)` for the same ids as `larp_mllm` gives.

    Args:
        vocabulary: `model.vocabulary`.
        video, text: how codes and text are sampled; by default `TextSampling()`, the likeliest.
        prompt_length: S of the (left-padded) prompts that generate gets.
        max_videos: spans that may begin after the prompt; 0 for text alone, None for any number.
        first_row: place in the list of the first sequence: a long list can be made in batches.

    With `video.guidance_scale` other than 1 generate must get 2 B rows: the B prompts, then B unconditional ones (of
    the same length, left-padded). The rows B.. then write the same ids as the rows before them, so spans that begin after
    text are guided against that text; `Mllm.chat` guides each against the bare unconditional prompt.

        layout, sampling = mllm.processor.layout, VideoSampling(guidance_scale=2.0, seed=3)
        prompt, free = layout.prompt(mllm.processor.encode_text("a person surfing")), layout.prompt([])
        ids = torch.tensor([prompt, [0] * (len(prompt) - len(free)) + free])
        mask = torch.tensor([[1] * len(prompt), [0] * (len(prompt) - len(free)) + [1] * len(free)])
        written = mllm.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=mllm.model.vocabulary.tokens_per_video,
            do_sample=False,
            logits_processor=logits_processors(mllm.model.vocabulary, sampling, prompt_length=len(prompt)),
            eos_token_id=None,
            pad_token_id=0,
        )
        codes = mllm.model.vocabulary.id_to_code(written[:1, len(prompt) :])
        frames = mllm.processor.decode_videos(codes)  # those of mllm.generate(["a person surfing"], sampling=sampling)
    """
    guidance = [SpanGuidance(vocabulary, video.guidance_scale)] if video.guided else []
    rules = SpanRules(vocabulary, max_videos, prompt_length)
    sample = SeededSampling(vocabulary, video, text or TextSampling(), prompt_length, first_row)
    return LogitsProcessorList([*guidance, rules, sample])


class SpanRules(LogitsProcessor):
    """What may follow what: inside a span exactly N codes, then video_end; outside no code and no video_end.

    Args:
        vocabulary: the id layout.
        max_videos: how many spans may begin after the first `prompt_length` ids; None: any number.
        prompt_length: the spans of these ids do not count.
    """

    def __init__(self, vocabulary: Vocabulary, max_videos: int | None = None, prompt_length: int = 0):
        self.vocabulary, self.max_videos, self.prompt_length = vocabulary, max_videos, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (R, S) so far and next logits (R, V) -> logits with -inf where an id may not follow."""
        v, ids, sampled = (
            self.vocabulary,
            torch.arange(scores.shape[-1], device=scores.device),
            _sampled(self, input_ids),
        )
        begun = (input_ids[:, self.prompt_length :] == v.video_start).sum(-1, keepdim=True)
        may_begin = torch.ones_like(begun, dtype=torch.bool) if self.max_videos is None else begun < self.max_videos
        allowed = torch.where((sampled < v.tokens_per_video)[:, None], v.is_code(ids), v.is_text(ids))
        allowed = torch.where((sampled == v.tokens_per_video)[:, None], ids == v.video_end, allowed)
        allowed |= (sampled > v.tokens_per_video)[:, None] & (ids == v.video_start) & may_begin
        return scores.masked_fill(~allowed, -torch.inf)


class SpanGuidance(LogitsProcessor):
    """Classifier-free guidance inside spans, over 2 B rows: the conditional ones, then their unconditional ones.

    Both halves get the same scores: inside a span the guided ones, outside those of the conditional row, so that the
    unconditional rows go along with what is written.
    """

    def __init__(self, vocabulary: Vocabulary, guidance_scale: float):
        self.vocabulary, self.guidance_scale = vocabulary, guidance_scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (2 B, S) so far and next logits (2 B, V) -> logits (2 B, V). ValueError for an odd number of rows."""
        if len(scores) % 2:
            raise ValueError(
                f"guidance needs an unconditional row for each of the prompts, in the same order behind them; got "
                f"{len(scores)} rows in all"
            )
        first, half = self.vocabulary.first_code, len(scores) // 2
        inside = _sampled(self, input_ids[:half]) < self.vocabulary.tokens_per_video
        mixed = scores[:half].clone()
        mixed[:, first:] = apply_guidance(scores[:, first:], self.guidance_scale)
        chosen = torch.where(inside[:, None], mixed, scores[:half])
        return torch.cat([chosen, chosen])


class SeededSampling(LogitsProcessor):
    """Samples the next id of each row as `larp_mllm` does, and leaves it alone possible: for `do_sample=False`.

    Inside spans `video` samples from the code logits, outside `text` from the others. Rows are those of `first_row` on; with
    guidance (2 B rows) the second half samples as the first. The spans after the first of a row take other numbers.
    """

    def __init__(
        self, vocabulary: Vocabulary, video: VideoSampling, text: TextSampling, prompt_length: int, first_row: int = 0
    ):
        self.vocabulary, self.video, self.text = vocabulary, video, text
        self.prompt_length, self.first_row = prompt_length, first_row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (R, S) so far and next logits (R, V) -> logits that are -inf but at the id that was sampled."""
        v, sampled = self.vocabulary, _sampled(self, input_ids)
        rows = len(scores) // 2 if self.video.guided else len(scores)
        written = input_ids[:, self.prompt_length :]
        words = (written <= v.video_start).sum(-1)  # samples of text, of which the start of a video is one
        # A span that the prompt began is number 0, and the first one that is sampled after a whole prompt is as well.
        opened = input_ids[:, self.prompt_length - 1 :] == v.video_start
        ids = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
        for row in range(len(scores)):
            place, one = row % rows, scores[row : row + 1]
            index = int(sampled[row])
            if index < v.tokens_per_video:
                span = int(opened[row].sum()) - 1
                number = self.video.uniforms(self.first_row + place + span * rows, 1, v.tokens_per_video)[:, index]
                ids[row] = v.code_to_id(self.video.sample(one[:, v.first_code :], number.to(one.device)))
            elif index == v.tokens_per_video:
                ids[row] = v.video_end
            else:
                index = int(words[row])
                number = self.text.uniforms(self.first_row + place, 1, max(self.text.max_new_tokens, index + 1))
                ids[row] = self.text.sample(one[:, : v.first_code], number[:, index].to(one.device))
        return torch.full_like(scores, -torch.inf).scatter(1, ids[:, None], 0.0)


def _sampled(processor: SpanRules | SpanGuidance | SeededSampling, input_ids: Tensor) -> Tensor:
    """How many ids follow the last video_start of each row (R, S), int64 (R,); far more than N if there is none."""
    v, length = processor.vocabulary, input_ids.shape[1]
    place = torch.arange(length, device=input_ids.device)
    started = torch.where(input_ids == v.video_start, place, -length - v.tokens_per_video).amax(-1)
    return length - 1 - started
