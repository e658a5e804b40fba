"""Generation: a prompt is read, then exactly N codes are drawn, from code logits alone, and the tokenizer paints them.

Shapes: B videos, R rows (2 B with guidance), S prompt length, N codes per video, K codebook size, H hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Integral
from pathlib import Path

from larp.sampling import check_sampling, guide, row_uniforms, sample_logits
from larp_mllm.device import check_device, choose_device
from larp_mllm.home import find_model
from larp_mllm.modeling import LarpMllmForCausalLM
from larp_mllm.processing import LarpMllmProcessor
from larp_mllm.sequence import check_length
from larp_mllm.video import Video
from larp_mllm.vocabulary import Vocabulary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.utils import logging

_SMALL_STEP = 3e8  # multiplications in one step, below which one thread is best


def generate(
    prompt: str | list[str],
    num_videos: int = 1,
    *,
    model: "str | Path | Mllm | None" = None,
    device: str | None = None,
    **options,
) -> Video | list[Video]:
    """Videos for a sentence: `larp_mllm.generate("a person surfing").save("surfing.mp4")`.

    Returns a Video; a list of them, prompt by prompt, if `prompt` is a list or num_videos > 1. `options` are those of
    Mllm.generate: guidance_scale, temperature, top_k, top_p, seed, batch_size. model: a folder or a loaded Mllm; by
    default LARP_MLLM_MODEL, else the newest model trained here. Raises ValueError, which names these ways, if there is
    none, and before the model is loaded for a bad prompt, option or device. Nothing is written or printed: save what
    is returned.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    check_request(prompts, num_videos, **options)
    videos = _opened(model, device).generate(prompts, num_videos, **options)
    return videos if prompts is prompt or num_videos != 1 else videos[0]


def describe(
    video: "str | Path | np.ndarray | Tensor | Video",
    *,
    model: "str | Path | Mllm | None" = None,
    device: str | None = None,
    max_new_tokens: int = 48,
) -> str:
    """The caption that the model gives to a video: a file, a Video, uint8 frames (T, H, W, 3), or a float clip
    (3, T, H, W) in [0, 1] of the size that the model was trained on; other arrays are a ValueError.

    Of a longer video the frames around its middle are read. Chooses the model as `generate` does.
    """
    check_count("max_new_tokens", max_new_tokens)
    return _opened(model, device).describe([video], max_new_tokens)[0]


class Mllm:
    """A model and its processor, loaded together and checked against each other."""

    def __init__(self, model: LarpMllmForCausalLM, processor: LarpMllmProcessor):
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None) -> "Mllm":
        """Load a folder written by training (the run folder will do), see `find_model`; device: by default the GPU if
        there is one. ValueError if folder or device are unfit.
        """
        device = choose_device(device)
        folder = find_model(folder)
        with _quiet():
            processor = LarpMllmProcessor.from_pretrained(folder, device=device)
            model = LarpMllmForCausalLM.from_pretrained(folder).to(device).eval()
        return cls(model, processor)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads."""
        with _quiet():
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def generate(
        self,
        prompts: list[str],
        num_videos: int = 1,
        *,
        guidance_scale: float = 2.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[Video]:
        """num_videos videos for each prompt, prompt by prompt.

        guidance_scale: 1 is off, more follows the prompt more closely; temperature 0 takes the likeliest code; top_k
        and top_p cut the draw (0 and 1: off). The same seed and place in the list give the same video whatever
        `batch_size`. ValueError for what `check_request` refuses.
        """
        check_request(
            prompts,
            num_videos,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
        )
        seed = int(seed)  # numpy's integers overflow where Python's do not
        layout, processor, count = self.processor.layout, self.processor, self.processor.vocabulary.tokens_per_video
        texts = [text for text in prompts for _ in range(num_videos)]
        encoded = {text: layout.prompt(processor.encode_text(text.strip())) for text in prompts}
        videos: list[Video] = []
        rows = min(len(texts), batch_size) * (1 if guidance_scale == 1.0 else 2)
        # The bar appears only when there is something to wait for.
        bar = tqdm(total=len(texts) * count, desc="drawing codes", unit="code", delay=2, leave=False)
        with bar, _sensible_threads(self.model, rows):
            for first in range(0, len(texts), batch_size):
                batch = texts[first : first + batch_size]
                uniforms = row_uniforms(seed, first, len(batch), count).to(self.model.device)

                def draw(logits: Tensor, index: int, uniforms: Tensor = uniforms) -> Tensor:
                    bar.update(len(logits))
                    return sample_logits(logits, temperature, top_k, top_p, uniforms[:, index])

                codes = draw_codes(
                    self.model, [encoded[text] for text in batch], draw, layout.prompt([]), guidance_scale
                )
                fps = self.model.config.fps
                painted = zip(processor.decode_videos(codes), batch, codes.tolist(), strict=True)
                videos += [Video(frames, fps, text, tuple(row)) for frames, text, row in painted]
        return videos

    def describe(self, videos: list, max_new_tokens: int = 48) -> list[str]:
        """Captions of videos (files, uint8 frames, clips or Videos), the likeliest word at each step.

        max_new_tokens: at least 1, and what the base model has room for beside the video; else a ValueError.
        """
        check_count("max_new_tokens", max_new_tokens)
        layout, positions = self.processor.layout, _positions(self.model)
        room = positions - len(layout.question([0] * layout.vocabulary.tokens_per_video))
        if max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; of the {positions} positions of the base model the video leaves "
                f"{room}: give at most that"
            )
        codes = self.processor.encode_videos([self._frames(video) for video in videos])
        ids = torch.tensor([layout.question(row) for row in codes], device=self.model.device)
        rules = SpanRules(layout.vocabulary, video_allowed=False)
        with _sensible_threads(self.model, len(ids)):
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=layout.eos,
                pad_token_id=layout.eos if layout.eos is not None else 0,
                logits_processor=LogitsProcessorList([rules]),
            )
        return [self.processor.decode_text(row[ids.shape[1] :].tolist()) for row in written]

    def _frames(self, video) -> np.ndarray | Tensor:
        if isinstance(video, Video):
            return video.frames
        if not isinstance(video, (str, Path)):
            return video
        from larp.data.video import read_video

        frames, _ = read_video(video)
        count, stride = self.processor.video_tokenizer.config.num_frames, self.model.config.frame_stride
        start = max(0, (len(frames) - (count - 1) * stride - 1) // 2)
        return frames[start::stride]


def check_request(
    prompts: Sequence[str],
    num_videos: int = 1,
    *,
    guidance_scale: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> None:
    """ValueError that names what Mllm.generate cannot work with; needs no model, so nothing is loaded in vain."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"a prompt must be a str, several a list of them, got {prompts!r}")
    for prompt in prompts:
        _check_prompt(prompt)
    check_sampling(temperature, top_k, top_p, guidance_scale)
    check_count("num_videos", num_videos)
    check_count("batch_size", batch_size)
    if not isinstance(seed, Integral):
        raise ValueError(f"seed must be a whole number, got {seed!r}")


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a str, several a list of them, got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt {prompt!r} holds half a character (a lone surrogate) at position {error.start}: remove it, or "
            "decode the text in its own encoding"
        ) from error


def check_count(name: str, value: int) -> None:
    """ValueError that names the option unless `value` is a whole number of at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


@torch.no_grad()
def draw_codes(
    model: LarpMllmForCausalLM,
    prompts: list[list[int]],
    draw: Callable[[Tensor, int], Tensor],
    unconditional: list[int] | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Exactly N codes, int64 (B, N), after each of B prompts (ids that end in video_start), drawn from code logits.

    draw(logits (B, K) float32, index of the code) -> (B,) codes. With guidance_scale != 1 an `unconditional` prompt
    runs beside each prompt in the same batch. No text logits are computed. ValueError if the ids exceed the positions
    of the base.
    """
    guided = guidance_scale != 1.0
    rows = prompts + [unconditional] * len(prompts) if guided else prompts
    count = model.vocabulary.tokens_per_video
    longest = max(len(row) for row in rows)
    check_length(longest + count, _positions(model), "generate: the prompt and the video")
    # The adapter is a function of the codebook: its rows are computed once, not for each code.
    input_rows, code_rows = model.adapter.input_rows(), model.adapter.code_rows()
    codes = torch.empty(len(prompts), count, dtype=torch.int64, device=model.device)
    cache = StaticCache(config=model.config.text_config, max_cache_len=longest + count)
    ids, mask = _left_padded(rows, longest, model.device)
    embeddings, positions = model.embed(ids), (mask.cumsum(-1) - 1).clamp_min(0)
    for index in range(count):
        hidden = model.base.base_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = (hidden @ code_rows.T).float()
        codes[:, index] = draw(guide(logits, guidance_scale) if guided else logits, index)
        embeddings = F.embedding(codes[:, index] + 2, input_rows)[:, None].repeat(2 if guided else 1, 1, 1)
        mask, positions = F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
    return codes


class SpanRules(LogitsProcessor):
    """What may follow what, for transformers' own `generate`: inside a span exactly N codes, then video_end; else none.

    With video_allowed=False no span can begin: the answer is text.
    """

    def __init__(self, vocabulary: Vocabulary, video_allowed: bool = True):
        self.vocabulary = vocabulary
        self.video_allowed = video_allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B, S) so far and next logits (B, V) -> logits with -inf where an id may not follow."""
        v, ids = self.vocabulary, torch.arange(scores.shape[-1], device=scores.device)
        length = input_ids.shape[1]
        place = torch.arange(length, device=input_ids.device)
        started = torch.where(input_ids == v.video_start, place, -length - v.tokens_per_video).amax(-1)
        drawn = length - 1 - started  # codes since the last video_start; far more than N if there was none
        text = v.is_text(ids) | (ids == v.video_start) & self.video_allowed
        allowed = torch.where((drawn < v.tokens_per_video)[:, None], v.is_code(ids), text)
        allowed = torch.where((drawn == v.tokens_per_video)[:, None], ids == v.video_end, allowed)
        return scores.masked_fill(~allowed, float("-inf"))


def _left_padded(rows: list[list[int]], longest: int, device) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _positions(model: LarpMllmForCausalLM) -> int:
    return model.config.text_config.max_position_embeddings


def _opened(model: "str | Path | Mllm | None", device: str | None) -> Mllm:
    if isinstance(model, Mllm):
        return model
    if device is not None:
        check_device(device)
    folder = find_model(model).resolve()
    return _load_once(folder, (folder / "config.json").stat().st_mtime_ns, device)


@lru_cache(maxsize=2)
def _load_once(folder: Path, written: int, device: str | None) -> Mllm:
    return Mllm.load(folder, device)


@contextmanager
def _sensible_threads(model: LarpMllmForCausalLM, rows: int) -> Iterator[None]:
    # Small steps on several threads mostly wait for one another: on a busy two-core machine 300 times as long as on one.
    before = torch.get_num_threads()
    small = model.device.type == "cpu" and rows * model.num_parameters() < _SMALL_STEP
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers shows bars over reading and writing weights; `generate` in a script should print nothing.
    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()
