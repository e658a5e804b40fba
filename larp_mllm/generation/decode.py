"""The decoding loop: prefill a batch of prompts into a key-value cache, then sample and append one id after another.

Inside a video span only code logits are computed, outside only those of text and controls.

Shapes: B videos, R rows (2 B with guidance), S prompt length, N codes per video, K codebook size, H hidden width, V ids
of text and controls.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from larp.kernels.threads import threads
from larp.sampling.guidance import apply_guidance
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.processing.token_sequence import check_length

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache

_SMALL_STEP = 3e8  # multiplications per step, below which one thread is fastest


class DecodeState:
    """The key-value cache of R rows of ids; `hidden` (R, H) holds the hidden state of the last id of each row.

    Args:
        model: in eval mode. Its weights must not change, since the adapter's rows are computed once.
        rows: the prompts, of any lengths of at least 1. Left padding changes logits only in the last bits.
        max_new_tokens: number of ids to append, for which the cache is allocated at once; None: it grows.
    """

    def __init__(self, model: LarpMllmForCausalLM, rows: Sequence[Sequence[int]], max_new_tokens: int | None = None):
        self.model, self.vocabulary = model, model.vocabulary
        self._inputs, self._codes = model.adapter.input_rows(), model.adapter.code_rows()
        longest, config = max(len(row) for row in rows), model.config.text_config
        if max_new_tokens is None:
            self._cache = DynamicCache(config=config)
        else:
            self._cache = StaticCache(config=config, max_cache_len=longest + max_new_tokens)
        ids, self._mask = _left_padded(rows, longest, model.device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self.hidden = self._forward(ids)

    def append(self, ids: Tensor) -> None:
        """Run the model on one more id of each row, int64 (R,)."""
        self._mask, self._positions = F.pad(self._mask, (0, 1), value=1), self._positions[:, -1:] + 1
        self.hidden = self._forward(ids[:, None])

    def code_logits(self) -> Tensor:
        """Logits of the next code, float32 (R, K)."""
        return (self.hidden @ self._codes.T).float()

    def text_logits(self) -> Tensor:
        """Logits of the next text id or control, float32 (R, V)."""
        return self.model.text_logits(self.hidden).float()

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model.run_base(
            ids,
            self._embed(ids),
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _embed(self, ids: Tensor) -> Tensor:
        # As larp_mllm.model.parts.Embedding, which computes the adapter's rows at each call.
        is_text = self.vocabulary.is_text(ids)
        text = self.model.base.get_input_embeddings()(ids.masked_fill(~is_text, 0))
        video = F.embedding((ids - self.vocabulary.text_size).clamp_min(0), self._inputs)
        return torch.where(is_text[..., None], text, video.to(text.dtype))


@torch.no_grad()
def decode_codes(
    model: LarpMllmForCausalLM,
    prompts: Sequence[Sequence[int]],
    sample: Callable[[Tensor, int], Tensor],
    unconditional: Sequence[int] = (),
    guidance_scale: float = 1.0,
    progress: Callable[[Tensor, int], None] | None = None,
) -> Tensor:
    """Sample exactly N codes after each of B prompts; returns int64 (B, N). No text logits are computed.

    Args:
        model: in eval mode.
        prompts: ids that end with video_start.
        sample: code logits float32 (B, K) and the index of the code -> codes (B,).
        unconditional: prompt for guidance, decoded in the same batch beside each prompt.
        guidance_scale: 1 is off.
        progress: called after each index with the codes (B, N) and the number sampled.

    Raises ValueError if the ids exceed the positions of the base.
    """
    guided = guidance_scale != 1.0
    rows = [*prompts, *([unconditional] * len(prompts) if guided else [])]
    count = model.vocabulary.tokens_per_video
    longest = max(len(row) for row in rows)
    check_length(longest + count, max_positions(model), "generate: the prompt and the video")
    state = DecodeState(model, rows, max_new_tokens=count)
    codes = torch.empty(len(prompts), count, dtype=torch.int64, device=model.device)
    for index in range(count):
        if index:
            state.append(model.vocabulary.code_to_id(codes[:, index - 1]).repeat(2 if guided else 1))
        logits = state.code_logits()
        codes[:, index] = sample(apply_guidance(logits, guidance_scale) if guided else logits, index)
        if progress is not None:
            progress(codes, index + 1)
    return codes


@torch.no_grad()
def decode_text(
    model: LarpMllmForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: TextSampling,
    stops: Sequence[int],
    progress: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Sample text ids after each of B prompts, at least one each.

    Args:
        model: in eval mode.
        prompts: ids, of any lengths.
        sampling: a text has at most its `max_new_tokens` ids.
        stops: ids that end a text; they are not returned.
        progress: called after each id with the texts so far.

    Raises ValueError if the ids could exceed the positions of the base.
    """
    count = sampling.max_new_tokens
    check_length(max(map(len, prompts)) + count, max_positions(model), "describe: the question and max_new_tokens")
    uniforms = sampling.uniforms(0, len(prompts), count).to(model.device)
    state = DecodeState(model, prompts, max_new_tokens=count)
    texts, unfinished = [[] for _ in prompts], [True] * len(prompts)
    for index in range(count):
        logits = state.text_logits()
        logits[:, model.vocabulary.video_start :] = -torch.inf
        if index == 0:
            logits[:, list(stops)] = -torch.inf
        ids = sampling.sample(logits, uniforms[:, index])
        for row, token_id in enumerate(ids.tolist()):
            unfinished[row] = unfinished[row] and token_id not in stops
            if unfinished[row]:
                texts[row].append(token_id)
        if progress is not None:
            progress(texts)
        if not any(unfinished) or index + 1 == count:
            break
        state.append(ids)
    return texts


@torch.no_grad()
def decode_answer(
    model: LarpMllmForCausalLM,
    prompt: Sequence[int],
    unconditional: Sequence[int],
    video: VideoSampling,
    text: TextSampling,
    stops: Sequence[int],
    max_videos: int,
) -> Iterator[int]:
    """Yield the ids of one answer as they are sampled: text and whole video spans in any order.

    The answer ends before an id of `stops`, after `max_new_tokens` samples of text (a video_start counts as one), or at
    the last position of the base. A video begins only if fewer than `max_videos` have begun and all of it fits. Its
    codes are guided against the `unconditional` prompt. The i-th video uses the random numbers of row i.
    """
    v, left = model.vocabulary, max_positions(model) - len(prompt)
    uniforms = text.uniforms(0, 1, text.max_new_tokens).to(model.device)
    state, videos = DecodeState(model, [prompt]), 0
    for index in range(text.max_new_tokens):
        if left < 1:
            return
        logits = state.text_logits()
        logits[:, v.video_end] = -torch.inf
        if videos >= max_videos or left < v.tokens_per_video + 2:
            logits[:, v.video_start] = -torch.inf
        ids = text.sample(logits, uniforms[:, index])
        if (token_id := int(ids)) in stops:
            return
        yield token_id
        left -= 1
        state.append(ids)
        if token_id == v.video_start:
            yield from _decode_span(state, unconditional, video, videos)
            videos, left = videos + 1, left - v.tokens_per_video - 1


def max_positions(model: LarpMllmForCausalLM) -> int:
    """The number of positions of the base model."""
    return model.config.positions


@contextmanager
def num_threads_for(model: LarpMllmForCausalLM, rows: int) -> Iterator[None]:
    """In the block, torch uses the number of threads that suits decoding `rows` rows."""
    # In small steps, threads mostly wait for each other: on a busy two-core machine 300 times as long as one thread.
    small = model.device.type == "cpu" and rows * model.num_parameters() < _SMALL_STEP
    with threads(1 if small else torch.get_num_threads()):
        yield


def _decode_span(state: DecodeState, unconditional: Sequence[int], video: VideoSampling, row: int) -> Iterator[int]:
    """Sample and append the codes and the video_end of a span after its video_start, with the random numbers of `row`."""
    v, device = state.vocabulary, state.hidden.device
    count = v.tokens_per_video
    uniforms = video.uniforms(row, 1, count).to(device)
    other = DecodeState(state.model, [unconditional], max_new_tokens=count) if video.guided else None
    for index in range(count):
        logits = state.code_logits()
        if other is not None:
            logits = apply_guidance(torch.cat([logits, other.code_logits()]), video.guidance_scale)
        ids = v.code_to_id(video.sample(logits, uniforms[:, index]))
        yield int(ids)
        state.append(ids)
        if other is not None and index + 1 < count:
            other.append(ids)
    yield v.video_end
    state.append(torch.tensor([v.video_end], device=device))


def _left_padded(rows: Sequence[Sequence[int]], longest: int, device) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)
