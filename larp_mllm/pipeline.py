"""Mllm: a model with its processor, for text to video, video to text, continuation and chat.

Shapes: B videos, F frames of a video, N codes per video.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from larp.config import check_count
from larp.data.clips import clip_to_frames, pixels_to_clip
from larp.files import obey_umask, write_json
from larp.hub import choose_device, make_folder
from larp.sampling.long_clips import LongClip, continue_windows
from larp_mllm.checks import check_prompt, check_prompts, check_seconds
from larp_mllm.generation.answer import Answer
from larp_mllm.generation.decode import decode_answer, decode_codes, decode_text, max_positions, num_threads_for
from larp_mllm.generation.progress import CodeProgress, ProgressCallback, TextProgress
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.locate import TRAINING, find_model, read_config, upload
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.weights import naming_unwritable, quiet
from larp_mllm.processing.caption_words import are_captions, is_far
from larp_mllm.processing.chat import chat_segments, stop_ids
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.processing.token_sequence import encode
from larp_mllm.processing.video_inputs import read_whole_video
from larp_mllm.video import Video

import numpy as np
import torch
from torch import Tensor

_VIDEO, _CONTINUATION = VideoSampling(), VideoSampling(guidance_scale=1.0)
_CAPTION, _ANSWER = TextSampling(), TextSampling(max_new_tokens=256)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class Mllm:
    """A language model with video vocabulary and its processor."""

    def __init__(
        self, model: LarpMllmForCausalLM, processor: LarpMllmProcessor, training: dict[str, Any] | None = None
    ):
        self.model = model
        self.processor = processor
        # The content of training.json; None if unknown.
        self.training = training

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: str | torch.dtype | None = None) -> "Mllm":
        """Load a model folder, a run folder of train_mllm.py, or a hub repository.

        Args:
            folder: path or "owner/name", see `find_model`.
            device: by default the GPU if there is one.
            dtype: of the language model's weights: "float32", "bfloat16" or "float16"; by default as saved. The video
                tokenizer stays float32.

        Raises ValueError if the folder is no such model or damaged, for an absent device and for another dtype.
        """
        dtype, device, folder = check_dtype(dtype), choose_device(device), find_model(folder)
        with quiet():
            processor = LarpMllmProcessor.from_pretrained(folder, device=device)
            # Not with .to(), which would also round the rotary frequencies.
            model = LarpMllmForCausalLM.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))
        training = read_config(folder / TRAINING)
        if not are_captions((training or {}).get("captions")):
            raise ValueError(
                f"{folder / TRAINING} is damaged: captions holds no words; copy the file again, or delete it"
            )
        return cls(model.to(device).eval(), processor, training)

    def save(self, folder: str | Path) -> None:
        """Save a folder that `load` reads. Raises ValueError, naming the folder, if it cannot be written."""
        self._record_tokenizer()
        with naming_unwritable(folder), quiet():
            make_folder(folder)
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            self._write_training(Path(folder))
            obey_umask(Path(folder))

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> None:
        """Upload model, text tokenizer, video tokenizer and what is known of the training to a hub repository, which `load` then takes.

        Args:
            repo: "owner/name"; created if it does not exist.
            private: whether a new repository is private.
            token: by default that of the hub's login.
            revision: branch.
        """
        self._record_tokenizer()
        with quiet():
            self.model.push_to_hub(repo, private=private, token=token, revision=revision)
        self.processor.push_to_hub(repo, private=private, token=token, revision=revision)
        if self.training is not None:
            with tempfile.TemporaryDirectory() as folder:
                self._write_training(Path(folder))
                upload(folder, repo, private=private, token=token, revision=revision)

    def _write_training(self, folder: Path) -> None:
        if self.training is not None:
            # Without the places of the run's model and samples.
            kept = {name: value for name, value in self.training.items() if name not in ("model", "samples")}
            write_json(folder / TRAINING, kept)

    def _record_tokenizer(self) -> None:
        # `load` compares it with the hash of the video tokenizer in the folder.
        if not self.model.config.video_tokenizer_hash:
            self.model.config.video_tokenizer_hash = self.processor.video_tokenizer.weight_hash()

    def _warn_of_far(self, prompts: Sequence[str]) -> None:
        """Print a line to stderr for each prompt of which no word occurs in the captions of the training."""
        captions = (self.training or {}).get("captions") or {}
        words, examples = (captions.get(name) or () for name in ("words", "examples"))
        for prompt in dict.fromkeys(prompts):
            if is_far(prompt, words):
                shown = ", ".join(f'"{example}"' for example in examples[:6])
                print(
                    f'"{prompt}" has no word of the captions that this model learned from, such as {shown}',
                    file=sys.stderr,
                )

    def generate(
        self,
        prompts: list[str],
        num_videos: int = 1,
        sampling: VideoSampling = _VIDEO,
        progress: ProgressCallback | None = None,
        preview_every: int = 0,
    ) -> list[Video]:
        """Generate videos for texts.

        Args:
            prompts: texts.
            num_videos: number of videos for each prompt.
            sampling: see `VideoSampling`. The same seed and place in the result give the same video for any batch size.
            progress: called after each code.
            preview_every: with a nested video tokenizer, progress gets previews every so many codes; 0: none.

        Returns a list of len(prompts) * num_videos videos, prompt by prompt. Raises ValueError for prompts that are no
        text, counts below 1, and a prompt that exceeds the positions of the base.
        """
        check_prompts(prompts)
        check_count("num_videos", num_videos)
        self._warn_of_far(prompts)
        texts = [text for text in prompts for _ in range(num_videos)]
        codes = self.generate_codes(texts, sampling, progress, preview_every)
        videos = [
            frames for batch in codes.split(sampling.batch_size) for frames in self.processor.decode_videos(batch)
        ]
        return [
            Video(frames, self.model.config.fps, text, tuple(row))
            for frames, text, row in zip(videos, texts, codes.tolist(), strict=True)
        ]

    def generate_codes(
        self,
        prompts: list[str],
        sampling: VideoSampling = _VIDEO,
        progress: ProgressCallback | None = None,
        preview_every: int = 0,
    ) -> Tensor:
        """Sample the codes of a video for each text, int64 (len(prompts), N) on the CPU; arguments and errors as in `generate`."""
        check_prompts(prompts)
        encoded = {text: self.processor.layout.prompt(self._encode_text(text)) for text in dict.fromkeys(prompts)}
        total = len(prompts) * self.model.vocabulary.tokens_per_video
        with self._code_progress(total, progress, preview_every) as code_progress:
            return self._sample_codes([encoded[text] for text in prompts], sampling, code_progress)

    def describe(
        self, videos: list, sampling: TextSampling = _CAPTION, progress: ProgressCallback | None = None
    ) -> list[str]:
        """Generate a caption of at least one token for each video.

        Args:
            videos: as for `LarpMllmProcessor.encode_videos`. Of a longer video the middle frames are read, of a file every
                `frame_stride`-th frame.
            sampling: see `TextSampling`.
            progress: called after each token.

        Raises ValueError for other types, videos with too few frames, and more `max_new_tokens` than the positions of
        the base leave after the video.
        """
        layout, model = self.processor.layout, self.model
        left = max_positions(model) - len(layout.question([0] * layout.vocabulary.tokens_per_video))
        if sampling.max_new_tokens > left:
            raise ValueError(
                f"max_new_tokens is {sampling.max_new_tokens}; of the {max_positions(model)} positions of the base model "
                f"the video leaves {left}: give at most that"
            )
        codes = self.processor.encode_videos(videos)
        if not codes:
            return []
        total = sampling.max_new_tokens * len(codes)
        text_progress = TextProgress(total, progress, self.processor.decode_text if len(codes) == 1 else lambda _: "")
        with num_threads_for(model, len(codes)):
            texts = decode_text(
                model,
                [layout.question(row) for row in codes],
                sampling,
                [] if layout.eos is None else [layout.eos],
                lambda ids: text_progress(ids[0], sum(map(len, ids))),
            )
        text_progress(texts[0], sum(map(len, texts)), last=True)
        return [self.processor.decode_text(text) for text in texts]

    def continue_clips(
        self,
        clips: Tensor,
        total_frames: int,
        prompts: Sequence[str] | None = None,
        sampling: VideoSampling = _CONTINUATION,
        progress: ProgressCallback | None = None,
    ) -> LongClip:
        """Continue clips to `total_frames` frames, window by window, each from the last `given_frames` of the one before.

        Args:
            clips: float (B, 3, F, H, W) in [0, 1], of the video tokenizer's height and width. They are returned unchanged
                as the first F frames.
            total_frames: frames of the result, at least F.
            prompts: a text for each clip, or None.
            sampling: see `VideoSampling`. Guidance is against a prompt with neither text nor frames.
            progress: called after each code.

        Raises ValueError for a model that is not trained for continuation, and for clips, prompts and counts that do
        not fit.
        """
        tokenizer, given = self.processor.video_tokenizer, self.given_frames()
        if clips.ndim != 5 or clips.shape[2] < given:
            raise ValueError(
                f"clips are {tuple(clips.shape)}: give (B, 3, F, H, W) with at least the {given} given frames"
            )
        check_count("total_frames", total_frames, least=clips.shape[2])
        texts = [""] * len(clips) if prompts is None else prompts
        check_prompts(texts)
        if len(texts) != len(clips):
            raise ValueError(f"{len(texts)} prompts for {len(clips)} clips: give one for each, or none")
        encoded = [self._encode_text(text) for text in texts]
        new = tokenizer.config.num_frames - given
        windows = math.ceil((total_frames - clips.shape[2]) / new)

        codes_per_window = len(clips) * self.model.vocabulary.tokens_per_video
        with self._code_progress(windows * codes_per_window, progress) as code_progress:

            def sample_window(codes: Tensor, seed: int) -> Tensor:
                return self._sample_codes(
                    self._continuations(encoded, codes), replace(sampling, seed=seed), code_progress
                )

            return continue_windows(tokenizer, clips, total_frames, given, int(sampling.seed), sample_window)

    def continue_codes(self, given: Tensor, sampling: VideoSampling = _CONTINUATION, first_row: int = 0) -> Tensor:
        """Sample the codes of the clip after the codes of given frames, (B, N) each, without a text; int64 on the CPU.

        Args:
            given: codes of `given_frames` frames that are padded to a clip with copies of the last one.
            first_row: place of the first clip among all clips of this seed, which determines their random numbers.
        """
        with self._code_progress(given.numel(), None) as code_progress:
            return self._sample_codes(self._continuations([[]] * len(given), given), sampling, code_progress, first_row)

    def _continuations(self, texts: Sequence[list[int]], codes: Tensor) -> list[list[int]]:
        """The ids up to where new codes begin: of each clip the ids of its text and the codes of its given frames (B, N)."""
        layout = self.processor.layout
        return [layout.continuation(text, row) for text, row in zip(texts, codes.tolist(), strict=True)]

    def continue_video(
        self,
        video: Any,
        seconds: float,
        prompt: str = "",
        num_videos: int = 1,
        sampling: VideoSampling = _CONTINUATION,
        progress: ProgressCallback | None = None,
    ) -> list[Video]:
        """Continue a video by new frames.

        Args:
            video: one of those of `LarpMllmProcessor.encode_videos`. Frames are resized
                and cropped to the video tokenizer's size as in training. Of a file every `frame_stride`-th frame is
                read, the last one included, at the file's rate / stride. Arrays have the model's rate.
            seconds: duration of the new frames.
            prompt: what the video shows; may be empty.
            num_videos: number of continuations.
            sampling: see `VideoSampling`.
            progress: called after each code.

        Returns `num_videos` Videos: the given frames, then new ones. Raises ValueError as `continue_clips`, and for
        another type of video.
        """
        check_prompt(prompt)
        check_count("num_videos", num_videos)
        check_seconds(seconds)
        given, config = self.given_frames(), self.processor.video_tokenizer.config
        frames, fps = read_whole_video(
            video, config.height, config.width, self.model.config.frame_stride, self.model.config.fps
        )
        if len(frames) < given:
            stride = self.model.config.frame_stride if isinstance(video, (str, Path)) else 1
            raise ValueError(
                f"{video if isinstance(video, (str, Path)) else 'the video'} has {len(frames)} frames"
                f"{f' at stride {stride}' if stride > 1 else ''}, fewer than the {given} that the model continues from: "
                "give a longer one"
            )
        known = pixels_to_clip(frames[-given:])[None].expand(num_videos, -1, -1, -1, -1)
        total = given + max(1, round(seconds * fps))
        long = self.continue_clips(known, total, [prompt] * num_videos, sampling, progress)
        continuations = [clip_to_frames(clip[:, given:]) for clip in long.frames]
        return [Video(np.concatenate([frames, new]), fps, prompt, given=len(frames)) for new in continuations]

    def chat(
        self,
        messages: list[dict],
        video_sampling: VideoSampling = _VIDEO,
        text_sampling: TextSampling = _ANSWER,
        max_videos: int = 4,
        progress: ProgressCallback | None = None,
    ) -> dict:
        """Answer a conversation with text and videos in any order.

        Args:
            messages: `{"role": "user", "content": "..."}`; or as content a list of `{"type": "text", "text": "..."}` and
                `{"type": "video", "video": ...}` with a file, a Video or an array. A file's "start" is where to begin
                reading, in seconds; by default its middle frames are read.
            video_sampling, text_sampling: see `VideoSampling` and `TextSampling`.
            max_videos: the largest number of videos.
            progress: called after each id.

        Returns a message of the role assistant, whose videos are Videos; append it to `messages` to continue. Its text
        is empty if the model answers nothing. The answer ends where the model ends it, after `max_new_tokens`, or at the
        last position of the base; a video begins only if all of it fits. Raises ValueError, before sampling, for
        messages of another form, and for those that exceed the positions of the base.
        """
        check_count("max_videos", max_videos, least=0)
        processor, model, v = self.processor, self.model, self.model.vocabulary
        prompt = self.chat_prompt(messages)
        if len(prompt) >= max_positions(model):
            raise ValueError(
                f"messages: {len(prompt)} ids, and the answer needs at least one more, but the base model has "
                f"{max_positions(model)} positions: leave out old messages or videos ({v.tokens_per_video + 2} ids each)"
            )
        answer = Answer(processor, model.config.fps, text_sampling.max_new_tokens, progress)
        with num_threads_for(model, 2 if video_sampling.guided else 1):
            for token_id in decode_answer(
                *(model, prompt, processor.layout.prompt([]), video_sampling, text_sampling),
                *(stop_ids(processor.tokenizer), max_videos),
            ):
                answer.append(token_id)
        return answer.message()

    def chat_prompt(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation up to where the answer begins; messages as in `chat`. Raises ValueError for another form."""
        processor = self.processor
        segments = chat_segments(
            messages, processor.tokenizer, processor.encode_text, self._codes_of, add_generation_prompt=True
        )
        return encode(segments, processor.layout, add_special_tokens=False).ids.tolist()

    def given_frames(self) -> int:
        """The number of frames a continuation starts from. Raises ValueError if the model is not trained for continuation."""
        given = self.model.config.given_frames
        if given < 1:
            raise ValueError(
                "this model is not trained for continuation (given_frames is 0 in its config): extract tokens with "
                "training/extract_tokens.py --condition-frames 5, and train on them with the task continuation"
            )
        return given

    def _encode_text(self, text: str) -> list[int]:
        return self.processor.encode_text(text.strip())

    def _sample_codes(
        self, rows: list[list[int]], sampling: VideoSampling, progress: CodeProgress, first_row: int = 0
    ) -> Tensor:
        """Sample the codes after each prompt in batches; int64 (B, N) on the CPU."""
        count, size = self.model.vocabulary.tokens_per_video, sampling.batch_size
        batches, unconditional = [torch.empty(0, count, dtype=torch.int64)], self.processor.layout.prompt([])
        with num_threads_for(self.model, min(len(rows), size) * (2 if sampling.guided else 1)):
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]
                uniforms = sampling.uniforms(first_row + first, len(batch), count).to(self.model.device)

                def sample(logits: Tensor, index: int, uniforms: Tensor = uniforms) -> Tensor:
                    return sampling.sample(logits, uniforms[:, index])

                codes = decode_codes(self.model, batch, sample, unconditional, sampling.guidance_scale, progress)
                batches.append(codes.cpu())
        return torch.cat(batches)

    def _code_progress(self, total: int, callback: ProgressCallback | None, preview_every: int = 0) -> CodeProgress:
        nested = self.processor.video_tokenizer.config.nested

        def preview(codes: Tensor) -> list[Video]:
            return [Video(frames, self.model.config.fps) for frames in self.processor.decode_videos(codes)]

        return CodeProgress(total, callback, preview if nested else None, preview_every)

    def _codes_of(self, part: dict) -> list[int]:
        """The codes of a video in a message; a Video's own codes, if they are of this video tokenizer."""
        video = self.processor.video_of(part)
        if isinstance(video, Video) and self._decodes_to(video):
            return list(video.codes)
        return self.processor.encode_videos([video])[0]

    def _decodes_to(self, video: Video) -> bool:
        """Whether this video tokenizer decodes the codes of a Video to its frames."""
        v, codes = self.model.vocabulary, video.codes
        if len(codes) != v.tokens_per_video or min(codes) < 0 or max(codes) >= v.codebook_size:
            return False
        frames = self.processor.decode_videos(torch.tensor([codes]))[0]
        # Rounding differs between batches; the codes of another tokenizer give another video.
        return frames.shape == video.frames.shape and int(np.abs(frames.astype(int) - video.frames).max()) <= 1


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name. Raises ValueError for a dtype that weights cannot have."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}, or leave it out")
    return DTYPES[dtype]
