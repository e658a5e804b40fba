"""Mllm: a model and its processor together, and what they do: videos for texts, texts for videos, and both at once.

Shapes: B videos, F frames of a video, N codes per video.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from larp.data.clips import clip_to_frames, pixels_to_clip
from larp.hub import choose_device, make_folder
from larp.sampling.long_clips import LongClip, continue_windows
from larp_mllm.checks import check_count, check_prompt, check_prompts, check_seconds
from larp_mllm.generation.answer import Answer
from larp_mllm.generation.decode import decode_answer, decode_codes, decode_text, num_threads_for, positions
from larp_mllm.generation.progress import CodeProgress, ProgressCallback, TextProgress
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.locate import find_model
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.weights import naming_unwritable, quiet
from larp_mllm.processing.chat import chat_segments, stop_ids
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.processing.sequence import encode
from larp_mllm.processing.video_inputs import all_frames
from larp_mllm.video import Video

import numpy as np
import torch
from torch import Tensor

_VIDEO, _CONTINUATION = VideoSampling(), VideoSampling(guidance_scale=1.0)
_CAPTION, _ANSWER = TextSampling(), TextSampling(max_new_tokens=256)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class Mllm:
    """A model and its processor, loaded together and checked against each other."""

    def __init__(self, model: LarpMllmForCausalLM, processor: LarpMllmProcessor):
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: str | torch.dtype | None = None) -> "Mllm":
        """Load a folder written by training (the run folder will do), see `find_model`.

        Args:
            folder: the folder.
            device: by default the GPU if there is one.
            dtype: of the language model's weights, "float32", "bfloat16" or "float16"; by default as they were saved.
                The video tokenizer stays float32.

        ValueError if one of them is unfit.
        """
        dtype, device, folder = check_dtype(dtype), choose_device(device), find_model(folder)
        with quiet():
            processor = LarpMllmProcessor.from_pretrained(folder, device=device)
            # Here, not by .to(): that would round the frequencies of the rotary positions as well.
            model = LarpMllmForCausalLM.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))
        return cls(model.to(device).eval(), processor)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads. ValueError, naming it, if it cannot be written."""
        self._record_tokenizer()
        with naming_unwritable(folder), quiet():
            make_folder(folder)
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> None:
        """Upload model, text tokenizer and video tokenizer to a hub repository, "owner/name", which `load` then takes.

        private: of a new repository. token: by default that of the hub's login. revision: a branch.
        """
        self._record_tokenizer()
        with quiet():
            self.model.push_to_hub(repo, private=private, token=token, revision=revision)
        self.processor.push_to_hub(repo, private=private, token=token, revision=revision)

    def _record_tokenizer(self) -> None:
        # Without it `load` could not tell that the codes mean what they should.
        if not self.model.config.video_tokenizer_hash:
            self.model.config.video_tokenizer_hash = self.processor.video_tokenizer.weight_hash()

    def generate(
        self,
        prompts: list[str],
        num_videos: int = 1,
        sampling: VideoSampling = _VIDEO,
        progress: ProgressCallback | None = None,
        preview_every: int = 0,
    ) -> list[Video]:
        """num_videos videos for each prompt, prompt by prompt.

        The same seed and place in the list give the same video whatever `batch_size`. `progress` is called after each
        code; with a nested video tokenizer it gets previews after each `preview_every` codes (0: none). ValueError for
        prompts that are no text, for numbers below 1, and if a prompt exceeds the positions of the base.
        """
        check_prompts(prompts)
        check_count("num_videos", num_videos)
        texts = [text for text in prompts for _ in range(num_videos)]
        encoded = {text: self.processor.layout.prompt(self._encode_text(text)) for text in prompts}
        rows = [encoded[text] for text in texts]
        count = self.model.vocabulary.tokens_per_video
        with self._progress(len(rows) * count, progress, preview_every) as told:
            codes = self._draw(rows, sampling, told)
        frames = [frames for part in codes.split(sampling.batch_size) for frames in self.processor.decode_videos(part)]
        return [
            Video(pixels, self.model.config.fps, text, tuple(row))
            for pixels, text, row in zip(frames, texts, codes.tolist(), strict=True)
        ]

    def describe(
        self, videos: list, sampling: TextSampling = _CAPTION, progress: ProgressCallback | None = None
    ) -> list[str]:
        """Captions of videos: files, Videos, uint8 frames (T, H, W, 3), or clips (3, T, H, W) in [0, 1].

        Of a longer video the frames around its middle are read; of a file every `frame_stride`-th. A caption has at
        least one word piece. ValueError for what is no video, or has too few frames, and for more `max_new_tokens` than
        the base has room for beside the video.
        """
        layout, model = self.processor.layout, self.model
        room = positions(model) - len(layout.question([0] * layout.vocabulary.tokens_per_video))
        if sampling.max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens is {sampling.max_new_tokens}; of the {positions(model)} positions of the base model the "
                f"video leaves {room}: give at most that"
            )
        if not videos:
            return []
        codes = self.processor.encode_videos(videos)
        total = sampling.max_new_tokens * len(videos)
        told = TextProgress(total, progress, self.processor.decode_text if len(videos) == 1 else lambda _: "")
        with num_threads_for(model, len(codes)):
            texts = decode_text(
                model,
                [layout.question(row) for row in codes],
                sampling,
                [] if layout.eos is None else [layout.eos],
                lambda written: told(written[0], sum(map(len, written))),
            )
        told(texts[0], sum(map(len, texts)), last=True)
        return [self.processor.decode_text(text) for text in texts]

    def continue_clips(
        self,
        clips: Tensor,
        total_frames: int,
        prompts: Sequence[str] | None = None,
        sampling: VideoSampling = _CONTINUATION,
        progress: ProgressCallback | None = None,
    ) -> LongClip:
        """Let clips, float (B, 3, F, H, W) in [0, 1], go on until they have `total_frames` frames.

        The frames at hand stay as they are, bit for bit; each window goes on from the last `given_frames` that the
        model was trained on. `prompts`: a text for each clip, or none. Guidance acts against the unconditional prompt,
        which knows neither text nor frames. ValueError for a model that was not trained on continuation, and for clips,
        prompts and numbers that do not fit.
        """
        tokenizer, layout, given = self.processor.video_tokenizer, self.processor.layout, self.given_frames()
        if clips.ndim != 5 or clips.shape[2] < given:
            raise ValueError(f"clips are {tuple(clips.shape)}: (B, 3, F, H, W) with at least the {given} given frames")
        check_count("total_frames", total_frames, least=clips.shape[2])
        texts = [""] * len(clips) if prompts is None else prompts
        check_prompts(texts)
        if len(texts) != len(clips):
            raise ValueError(f"{len(texts)} prompts for {len(clips)} clips: give one for each, or none")
        encoded = [self._encode_text(text) for text in texts]
        new = tokenizer.config.num_frames - given
        windows = math.ceil((total_frames - clips.shape[2]) / new)

        with self._progress(windows * len(clips) * self.model.vocabulary.tokens_per_video, progress) as told:

            def write(codes: Tensor, seed: int) -> Tensor:
                rows = [layout.continuation(text, row) for text, row in zip(encoded, codes.tolist(), strict=True)]
                return self._draw(rows, replace(sampling, seed=seed), told)

            return continue_windows(tokenizer, clips, total_frames, given, int(sampling.seed), write)

    def continue_video(
        self,
        video: Any,
        seconds: float,
        prompt: str = "",
        num_videos: int = 1,
        sampling: VideoSampling = _CONTINUATION,
        progress: ProgressCallback | None = None,
    ) -> list[Video]:
        """num_videos ways in which a video (a file, a Video, frames or a clip) goes on for so many more `seconds`.

        Each is the whole video: the frames at hand, in the video tokenizer's size (resized and cropped as in training),
        then the new ones. Of a file every `frame_stride`-th frame counts, the last one among them, and its rate is the
        file's / stride; a Video keeps its rate, arrays have the model's. ValueError as in `continue_clips`.
        """
        check_prompt(prompt)
        check_count("num_videos", num_videos)
        check_seconds(seconds)
        given, config = self.given_frames(), self.processor.video_tokenizer.config
        frames, fps = all_frames(
            video, config.height, config.width, self.model.config.frame_stride, self.model.config.fps
        )
        if len(frames) < given:
            stride = self.model.config.frame_stride if isinstance(video, (str, Path)) else 1
            raise ValueError(
                f"{video if isinstance(video, (str, Path)) else 'the video'} has {len(frames)} frames"
                f"{f' at stride {stride}' if stride > 1 else ''}, fewer than the {given} that the model goes on from: "
                "give a longer one"
            )
        known = pixels_to_clip(frames[-given:])[None].expand(num_videos, -1, -1, -1, -1)
        total = given + max(1, round(seconds * fps))
        long = self.continue_clips(known, total, [prompt] * num_videos, sampling, progress)
        new = [clip_to_frames(clip[:, given:]) for clip in long.frames]
        return [Video(np.concatenate([frames, sampled]), fps, prompt, given=len(frames)) for sampled in new]

    def chat(
        self,
        messages: list[dict],
        video_sampling: VideoSampling = _VIDEO,
        text_sampling: TextSampling = _ANSWER,
        max_videos: int = 4,
        progress: ProgressCallback | None = None,
    ) -> dict:
        """The answer to a conversation, which may hold text and videos in any order.

        messages: `{"role": "user", "content": "..."}`, or as content a list of `{"type": "text", "text": "..."}` and
        `{"type": "video", "video": ...}` with a file (and "start", the seconds to begin at, else its middle is shown), a
        Video or an array. Returned is such a message, of the role assistant, its videos as Videos, its text empty if the
        model says nothing: append it to `messages` to go on. It ends where the model ends it, after
        `max_new_tokens`, or where the positions of the base do; a video is begun only where all of it has room, and at
        most `max_videos` times. ValueError for messages that do not fit, before anything is sampled.
        """
        check_count("max_videos", max_videos, least=0)
        processor, model, v = self.processor, self.model, self.model.vocabulary
        segments = chat_segments(messages, processor.tokenizer, processor.encode_text, self._codes_of, answer=True)
        prompt = encode(segments, processor.layout, framed=False).ids.tolist()
        if len(prompt) >= positions(model):
            raise ValueError(
                f"messages: {len(prompt)} ids, and the answer needs at least one more, but the base model has "
                f"{positions(model)} positions: leave out old messages or videos ({v.tokens_per_video + 2} ids each)"
            )
        answer = Answer(processor, model.config.fps, text_sampling.max_new_tokens, progress)
        with num_threads_for(model, 2 if video_sampling.guided else 1):
            written = decode_answer(
                *(model, prompt, processor.layout.prompt([]), video_sampling, text_sampling),
                *(stop_ids(processor.tokenizer), max_videos),
            )
            for written_id in written:
                answer.add(written_id)
        return answer.message()

    def given_frames(self) -> int:
        """How many frames a video goes on from; ValueError if the model was not trained on continuation."""
        given = self.model.config.given_frames
        if given < 1:
            raise ValueError(
                "this model was not trained to let videos go on (given_frames is 0 in its config): extract tokens with "
                "training/extract_tokens.py --condition-frames 5, and train on them with the task continuation"
            )
        return given

    def _encode_text(self, text: str) -> list[int]:
        return self.processor.encode_text(text.strip())

    def _draw(self, rows: list[list[int]], sampling: VideoSampling, told: CodeProgress) -> Tensor:
        """The codes after each prompt, int64 (B, N) on the CPU, sampled in batches."""
        count, size = self.model.vocabulary.tokens_per_video, sampling.batch_size
        batches, free = [torch.empty(0, count, dtype=torch.int64)], self.processor.layout.prompt([])
        with num_threads_for(self.model, min(len(rows), size) * (2 if sampling.guided else 1)):
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]
                numbers = sampling.uniforms(first, len(batch), count).to(self.model.device)

                def sample(logits: Tensor, index: int, numbers: Tensor = numbers) -> Tensor:
                    return sampling.sample(logits, numbers[:, index])

                batches.append(decode_codes(self.model, batch, sample, free, sampling.guidance_scale, told).cpu())
        return torch.cat(batches)

    def _progress(self, total: int, report: ProgressCallback | None, every: int = 0) -> CodeProgress:
        nested = self.processor.video_tokenizer.config.nested

        def preview(codes: Tensor) -> list[Video]:
            return [Video(frames, self.model.config.fps) for frames in self.processor.decode_videos(codes)]

        return CodeProgress(total, report, preview if nested else None, every)

    def _codes_of(self, part: dict) -> list[int]:
        """The codes of a video in a message; those that a Video was made from, if they are of this tokenizer."""
        video = self.processor.video_of(part)
        if isinstance(video, Video) and self._made(video):
            return list(video.codes)
        return self.processor.encode_videos([video])[0]

    def _made(self, video: Video) -> bool:
        """Whether the frames of a Video are what this video tokenizer makes of its codes."""
        v, codes = self.model.vocabulary, video.codes
        if len(codes) != v.tokens_per_video or min(codes) < 0 or max(codes) >= v.codebook_size:
            return False
        again = self.processor.decode_videos(torch.tensor([codes]))[0]
        # Rounding may differ between batches; another tokenizer's codes would make quite another video.
        return again.shape == video.frames.shape and int(np.abs(again.astype(int) - video.frames).max()) <= 1


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name; ValueError unless weights can have it."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}, or leave it out")
    return DTYPES[dtype]
