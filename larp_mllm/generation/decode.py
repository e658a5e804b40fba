"""The loop that writes: prompts are read side by side into a cache, then one id after another is sampled and read.

Only the logits that are needed are computed: inside a video those of the codes, outside those of text and controls.

Shapes: B videos, R rows (2 B with guidance), S prompt length, N codes per video, K codebook size, H hidden width, V ids
of text and controls.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from larp.kernels.threads import threads
from larp.sampling.sample import apply_guidance
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.processing.sequence import check_length

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache

_SMALL_STEP = 3e8  # multiplications in one step, below which one thread is best


class DecodeState:
    """Reads R rows of ids side by side; `hidden` (R, H) is what the model makes of the newest id of each row.

    Args:
        model: in eval mode, its weights unchanged while the state is used: the adapter's rows are computed once.
        rows: the prompts, of any lengths of at least 1.
        room: ids that will be read after the prompts, for which the cache is allocated at once; None: it grows.

    Rows are padded on the left, which changes no logits but in the last bits.
    """

    def __init__(self, model: LarpMllmForCausalLM, rows: Sequence[Sequence[int]], room: int | None = None):
        self.model, self.vocabulary = model, model.vocabulary
        self._inputs, self._codes = model.adapter.input_rows(), model.adapter.code_rows()
        longest, config = max(len(row) for row in rows), model.config.text_config
        self._cache = (
            DynamicCache(config=config) if room is None else StaticCache(config=config, max_cache_len=longest + room)
        )
        ids, self._mask = _left_padded(rows, longest, model.device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self.hidden = self._pass(ids)

    def append(self, ids: Tensor) -> None:
        """Read one more id of each row, int64 (R,)."""
        self._mask, self._positions = F.pad(self._mask, (0, 1), value=1), self._positions[:, -1:] + 1
        self.hidden = self._pass(ids[:, None])

    def code_logits(self) -> Tensor:
        """float32 (R, K): which code may come next."""
        return (self.hidden @ self._codes.T).float()

    def text_logits(self) -> Tensor:
        """float32 (R, V): which text id or control may come next."""
        return self.model.text_logits(self.hidden).float()

    def _pass(self, ids: Tensor) -> Tensor:
        return self.model.base.base_model(
            inputs_embeds=self._embed(ids),
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _embed(self, ids: Tensor) -> Tensor:
        # LarpMllmForCausalLM.embed would compute the adapter's K rows at each step.
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
    report: Callable[[Tensor, int], None] | None = None,
) -> Tensor:
    """Exactly N codes, int64 (B, N), after each of B prompts (ids that end in video_start), sampled from code logits.

    sample(logits (B, K) float32, index of the code) -> (B,) codes. With guidance_scale != 1 an `unconditional` prompt
    runs beside each prompt in the same batch. report(codes (B, N), number sampled) is called after each index. No text
    logits are computed. ValueError if the ids exceed the positions of the base.
    """
    guided = guidance_scale != 1.0
    rows = [*prompts, *([unconditional] * len(prompts) if guided else [])]
    count = model.vocabulary.tokens_per_video
    longest = max(len(row) for row in rows)
    check_length(longest + count, positions(model), "generate: the prompt and the video")
    state = DecodeState(model, rows, room=count)
    codes = torch.empty(len(prompts), count, dtype=torch.int64, device=model.device)
    for index in range(count):
        if index:
            state.append(model.vocabulary.code_to_id(codes[:, index - 1]).repeat(2 if guided else 1))
        logits = state.code_logits()
        codes[:, index] = sample(apply_guidance(logits, guidance_scale) if guided else logits, index)
        if report is not None:
            report(codes, index + 1)
    return codes


@torch.no_grad()
def decode_text(
    model: LarpMllmForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: TextSampling,
    stops: Sequence[int],
    report: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Text ids after each of B prompts, at least one each, until an id of `stops` (left out) or `max_new_tokens`.

    report(texts so far) is called after each id. ValueError if the ids would exceed the positions of the base.
    """
    most = sampling.max_new_tokens
    check_length(max(map(len, prompts)) + most, positions(model), "describe: the question and max_new_tokens")
    uniforms = sampling.uniforms(0, len(prompts), most).to(model.device)
    state, texts, going = DecodeState(model, prompts, room=most), [[] for _ in prompts], [True] * len(prompts)
    for index in range(most):
        logits = state.text_logits()
        logits[:, model.vocabulary.video_start :] = -torch.inf
        if index == 0:
            logits[:, list(stops)] = -torch.inf
        ids = sampling.sample(logits, uniforms[:, index])
        for row, chosen in enumerate(ids.tolist()):
            going[row] = going[row] and chosen not in stops
            if going[row]:
                texts[row].append(chosen)
        if report is not None:
            report(texts)
        if not any(going) or index + 1 == most:
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
    """Yield the ids of one answer as they are sampled: text and whole video spans in any order, without the stop id.

    It ends at an id of `stops`, after `max_new_tokens` samples of text (a video_start is one), or where the positions of
    the base do. A video begins only while fewer than `max_videos` have, and where there is room for all of it; its
    codes are guided against the `unconditional` prompt. Video number i takes the random numbers of row i.
    """
    v, room = model.vocabulary, positions(model) - len(prompt)
    numbers = text.uniforms(0, 1, text.max_new_tokens).to(model.device)
    state, videos = DecodeState(model, [prompt]), 0
    for index in range(text.max_new_tokens):
        if room < 1:
            return
        logits = state.text_logits()
        logits[:, v.video_end] = -torch.inf
        if videos >= max_videos or room < v.tokens_per_video + 2:
            logits[:, v.video_start] = -torch.inf
        chosen = text.sample(logits, numbers[:, index])
        if (written := int(chosen)) in stops:
            return
        yield written
        room -= 1
        state.append(chosen)
        if written == v.video_start:
            yield from _span(state, unconditional, video, videos)
            videos, room = videos + 1, room - v.tokens_per_video - 1


def _span(state: DecodeState, unconditional: Sequence[int], video: VideoSampling, number: int) -> Iterator[int]:
    """Draw and read the codes and the video_end of a span that was begun."""
    v, device = state.vocabulary, state.hidden.device
    count = v.tokens_per_video
    numbers = video.uniforms(number, 1, count).to(device)
    free = DecodeState(state.model, [unconditional], room=count) if video.guided else None
    for index in range(count):
        logits = state.code_logits()
        if free is not None:
            logits = apply_guidance(torch.cat([logits, free.code_logits()]), video.guidance_scale)
        ids = v.code_to_id(video.sample(logits, numbers[:, index]))
        yield int(ids)
        state.append(ids)
        if free is not None and index + 1 < count:
            free.append(ids)
    yield v.video_end
    state.append(torch.tensor([v.video_end], device=device))


def positions(model: LarpMllmForCausalLM) -> int:
    """How many ids the base model can read."""
    return model.config.text_config.max_position_embeddings


@contextmanager
def num_threads_for(model: LarpMllmForCausalLM, rows: int) -> Iterator[None]:
    """Let `rows` rows be written on the number of threads that suits the work."""
    # Small steps on several threads mostly wait for one another: on a busy two-core machine 300 times as long as on one.
    small = model.device.type == "cpu" and rows * model.num_parameters() < _SMALL_STEP
    with threads(1 if small else torch.get_num_threads()):
        yield


def _left_padded(rows: Sequence[Sequence[int]], longest: int, device) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)
