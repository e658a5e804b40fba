"""LarpMllmProcessor: text and videos -> ids, and ids -> text and videos.

Text is encoded separately, and control and code ids are inserted as ids, never as strings: typed text stays plain text,
`<|video_start|>` and `<|im_end|>` included.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

from larp.config import check_count, is_whole
from larp.data.clips import clip_to_frames
from larp.data.video import ShortVideoError, frame_times, read_clip
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.checks import check_start
from larp_mllm.locate import MODEL_TYPE, PROCESSOR_FILES, fetch_folder, is_shipped, read_config, shipped, upload
from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.vocabulary import Vocabulary
from larp_mllm.processing.batching import BatchOptions, batch_ids, check_side, to_id_list
from larp_mllm.processing.chat import chat_segments
from larp_mllm.processing.text_to_ids import PlainText
from larp_mllm.processing.token_sequence import PLACEHOLDER, Layout, encode
from larp_mllm.processing.tokenizer_checks import (
    check_saved,
    check_tokenizers,
    load_text_tokenizer,
    text_tokenizer_hash,
)
from larp_mllm.processing.video_inputs import VideoInput, as_list, group_videos, read_frames, to_clip

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

VIDEO_TOKENIZER = "video_tokenizer"
PROCESSOR_CONFIG = "processor_config.json"
# Options that AutoProcessor passes and that have no effect: no code of a repository is ever run.
_FROM_AUTO = {"_from_auto", "trust_remote_code", "force_download", "config"}
# Unsupported options of transformers' apply_chat_template -> the remedy. Text other than the messages would become part
# of the template, where control tokens are not plain text.
_NO_CHAT_OPTIONS = {
    "continue_final_message": "an answer is a new message: ask with a user's message last and add_generation_prompt=True",
    "tools": "their text would not stay plain text: describe them in a system message",
    "documents": "their text would not stay plain text: put them into a message",
    "chat_template": "set processor.chat_template instead",
    "return_assistant_tokens_mask": "larp_mllm.processing.chat.chat_segments gives the targets of training",
}


class LarpMllmProcessor(ProcessorMixin):
    """The base model's text tokenizer and the LARP tokenizer, joined by the id layout.

    Args:
        tokenizer: text tokenizer of transformers. Its padding side is often the right: to generate from a batch, give
            `padding_side="left"`.
        video_tokenizer: LARP tokenizer.
        vocabulary: id layout of the model.
        frame_stride: step between the frames that are read from a video file.
        chat_template: replaces that of the text tokenizer.

    Raises ValueError for other types, and if the LARP tokenizer has another codebook size or number of tokens than the
    layout.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        tokenizer,
        video_tokenizer: LarpTokenizer,
        vocabulary: Vocabulary,
        frame_stride: int = 1,
        chat_template: str | dict[str, str] | None = None,
    ):
        for what, given, kind in (
            ("text tokenizer", tokenizer, PreTrainedTokenizerBase),
            ("video tokenizer", video_tokenizer, LarpTokenizer),
            ("vocabulary", vocabulary, Vocabulary),
        ):
            if not isinstance(given, kind):
                raise ValueError(f"the {what} must be a {kind.__name__}, got {type(given).__name__}: load it first")
        check_count("frame_stride", frame_stride)
        sizes = (video_tokenizer.codebook_size, video_tokenizer.num_tokens)
        if sizes != (vocabulary.codebook_size, vocabulary.tokens_per_video):
            raise ValueError(
                f"the video tokenizer has {sizes[0]} codes and {sizes[1]} tokens per video, the language model expects "
                f"{vocabulary.codebook_size} and {vocabulary.tokens_per_video}; use the tokenizer it was trained with"
            )
        # First, since super().__init__() sets the chat template, which the tokenizer stores.
        self.tokenizer = tokenizer
        super().__init__(tokenizer, chat_template=tokenizer.chat_template if chat_template is None else chat_template)
        self.video_tokenizer = video_tokenizer
        self.vocabulary = vocabulary
        self.frame_stride = frame_stride
        self._plain_text: PlainText | None = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The attributes that transformers manages: not the LARP tokenizer, which is none of its classes."""
        return ["tokenizer"]

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template of the text tokenizer, saved with it. None: chats are lines of "User: ..."."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        if template is not None and not isinstance(template, (str, dict)):
            raise ValueError(f"chat_template must be a template, a dict of templates, or None, got {template!r}")
        self.tokenizer.chat_template = template

    @property
    def layout(self) -> Layout:
        """The id layout with the text tokenizer's begin and end ids."""
        return Layout(self.vocabulary, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)

    def encode_text(self, text: str) -> list[int]:
        """Plain text -> text ids without begin and end ids; nothing in it becomes a special or added token."""
        if self._plain_text is None or self._plain_text.tokenizer is not self.tokenizer:
            self._plain_text = PlainText(self.tokenizer)
        return self._plain_text.encode(text)

    def decode_text(self, ids, skip_special_tokens: bool = True) -> str:
        """Text ids -> text, by default without special tokens and without white space at both ends."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text.strip() if skip_special_tokens else text

    def encode_videos(self, videos: Sequence[VideoInput]) -> list[list[int]]:
        """Videos -> their codes, N each.

        A video is a file, a Video, uint8 frames (T, H, W, 3) or (T, 3, H, W) or a float clip (3, T, H, W) in [0, 1] as array
        or tensor, a list or an iterator of frames (PIL images, arrays, PyAV's), or a reader or frames of torchcodec or decord.
        Frames are resized, and of a longer video the middle is taken; a clip is not changed. Raises ValueError for other shapes, dtypes or
        ranges, for frames whose axis of colours is not clear, and for clips of different shapes.
        """
        count = self.video_tokenizer.config.num_frames
        clips = [
            to_clip(read_frames(video, count, self.frame_stride), self.video_tokenizer) for video in as_list(videos)
        ]
        if len(shapes := {tuple(clip.shape) for clip in clips}) > 1:
            raise ValueError(f"all clips of one call must have one shape, got {sorted(shapes)}: encode them one by one")
        device = next(self.video_tokenizer.parameters()).device
        return self.video_tokenizer.encode(torch.stack(clips).to(device)).tolist() if clips else []

    def video_of(self, part: dict[str, Any]) -> VideoInput:
        """The video of a part of a message, `{"type": "video", "video" or "path": ...}`.

        Of a file with "start" (seconds), the frames from there on, uint8 (T, H, W, 3). Raises ValueError for a "start" out
        of range, or of a video that is no file.
        """
        video = part["video"] if "video" in part else part["path"]
        start = check_start(part.get("start"), "a video part")
        if start is None:
            return video
        if not isinstance(video, (str, Path)):
            raise ValueError(
                f'a video part: "start" is for files, got a {type(video).__name__}: give the frames from there on'
            )
        count, stride = self.video_tokenizer.config.num_frames, self.frame_stride
        try:
            return read_clip(video, frame_times(video).at(start), count, stride)
        except ShortVideoError as error:
            enough = start and error.frames >= (count - 1) * stride + 1
            remedy = f'lower its "start" ({start:g})' if enough else "give a longer video"
            raise ShortVideoError(f"{error}: {remedy}", error.frames) from error

    def decode_videos(self, codes: Tensor) -> list[np.ndarray]:
        """Codes int64 (B, N) -> B videos, uint8 (T, H, W, 3)."""
        device = next(self.video_tokenizer.parameters()).device
        return [clip_to_frames(clip) for clip in self.video_tokenizer.decode(codes.to(device)).cpu()]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: Sequence[VideoInput] | Sequence[Sequence[VideoInput]] | None = None,
        *,
        add_special_tokens: bool = True,
        open_video: bool = False,
        **options: Unpack[BatchOptions],
    ) -> BatchFeature:
        """`"before <video> after"` and a video for each `<video>` -> input_ids and attention_mask, B lists or (B, S).

        Args:
            text: a text with its videos (B = 1), or several with a list of videos each.
            videos: see `encode_videos`; for one text with one video, the video itself.
            add_special_tokens: begin with the base's begin id, if it has one; the name of its end id at the very end of a text
                becomes that id, as trainers (TRL) append it, unless `open_video`.
            open_video: end with video_start, after which the model generates a video.
            **options: return_tensors, padding, padding_side, max_length: see `BatchOptions`. Nothing is truncated.

        Raises ValueError, naming the text, if the numbers of videos and placeholders differ.
        """
        if not isinstance(text, str) and not (
            isinstance(text, Sequence) and all(isinstance(content, str) for content in text)
        ):
            raise ValueError(f"text must be a str or a list of them, with {PLACEHOLDER} for each video, got {text!r}")
        texts = [text] if isinstance(text, str) else list(text)
        groups = group_videos(videos, text)
        begin = [self.layout.bos] if add_special_tokens and self.layout.bos is not None else []
        end = self.tokenizer.eos_token if add_special_tokens and not open_video else None
        sequences = []
        for number, (content, group) in enumerate(zip(texts, groups, strict=True)):
            where = "the text" if isinstance(text, str) else f"text {number}"
            last = [self.vocabulary.video_start] if open_video else []
            if end and content.endswith(end):
                content, last = content.removesuffix(end), [self.layout.eos]
            sequences.append([*begin, *self._interleaved(content, group, where), *last])
        return batch_ids(sequences, self.tokenizer, **options)

    def _interleaved(self, text: str, videos: Sequence[VideoInput], where: str) -> list[int]:
        pieces = text.split(PLACEHOLDER)
        if len(pieces) != len(videos) + 1:
            raise ValueError(
                f"{where} has {len(pieces) - 1} {PLACEHOLDER} placeholders but {len(videos)} videos were given: "
                f"write one {PLACEHOLDER} for each video"
            )
        ids = self.encode_text(pieces[0])
        for codes, piece in zip(self.encode_videos(videos), pieces[1:], strict=True):
            ids += self.vocabulary.span(codes) + self.encode_text(piece)
        return ids

    def apply_chat_template(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        *,
        add_generation_prompt: bool = False,
        enable_thinking: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **options,
    ) -> Any:
        """A chat, or several, in the text tokenizer's chat template -> input_ids.

        Contents are encoded separately from the template, so that none can imitate another role. The template does not
        see them: `<think>` blocks of earlier answers stay.

        Args:
            messages: `{"role", "content"}`, content a str or parts `{"type": "text", "text"}` and `{"type": "video",
                "video"}` (or "path"; with "start", see `video_of`).
            add_generation_prompt: end with the template's beginning of an answer.
            enable_thinking: passed to the template. Training passes False, for which Qwen3's puts an empty `<think>`
                block before the answer.
            tokenize: False returns text for display, with `<video>` for videos.
            return_dict: return a BatchFeature, of B = 1 lists for one chat; else the ids, one list for one chat.
            **options: return_tensors, padding, padding_side, max_length: see `BatchOptions`.

        Raises ValueError, naming the message, for other forms, and for unsupported options of transformers (tools,
        continue_final_message, ...).
        """
        batch_options = {name: options.pop(name) for name in BatchOptions.__annotations__ if name in options}
        for name, value in options.items():
            if value or name not in _NO_CHAT_OPTIONS:
                raise ValueError(
                    f"apply_chat_template does not support {name}: {_NO_CHAT_OPTIONS.get(name, 'leave it out')}"
                )
        single = not messages or isinstance(messages[0], dict)
        chats = [messages] if single else messages
        sequences = [
            self._chat(chat, "messages" if single else f"chat {number}", add_generation_prompt, enable_thinking)
            for number, chat in enumerate(chats)
        ]
        if not tokenize:
            texts = [self._displayed(ids) for ids in sequences]
            return texts[0] if single else texts
        batch = batch_ids(sequences, self.tokenizer, **batch_options)
        if return_dict:
            return batch
        return batch["input_ids"][0] if single and batch_options.get("return_tensors") is None else batch["input_ids"]

    def _chat(
        self, messages: Sequence[dict], where: str, add_generation_prompt: bool, enable_thinking: bool
    ) -> list[int]:
        def codes_of(part: dict) -> list[int]:
            return self.encode_videos([self.video_of(part)])[0]

        segments = chat_segments(
            *(messages, self.tokenizer, self.encode_text, codes_of, where, add_generation_prompt),
            assistant_loss=False,
            enable_thinking=enable_thinking,
        )
        return encode(segments, self.layout, add_special_tokens=False).ids.tolist()

    def _displayed(self, ids: list[int]) -> str:
        return "".join(
            self.tokenizer.decode(content, clean_up_tokenization_spaces=False) if kind == "text" else PLACEHOLDER
            for kind, content in self.vocabulary.split(ids)
        )

    def decode(
        self, ids, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> list[str | np.ndarray]:
        """Ids -> texts and videos, uint8 (T, H, W, 3), in order, without empty texts.

        skip_special_tokens applies to texts, see `decode_text`. Raises ValueError for a broken span, ids out of range and
        clean_up_tokenization_spaces=True.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces would change the text: leave it out")
        ids = to_id_list(ids, self.vocabulary.size)
        contents = [
            self.decode_text(content, skip_special_tokens)
            if kind == "text"
            else self.decode_videos(torch.tensor([content]))[0]
            for kind, content in self.vocabulary.split(ids)
        ]
        return [content for content in contents if not (isinstance(content, str) and not content)]

    def batch_decode(self, sequences, **options) -> list[list[str | np.ndarray]]:
        """`decode` each sequence of ids, a list or (B, S), with its options. Raises ValueError that names the sequence."""
        decoded = []
        for number, ids in enumerate(sequences):
            try:
                decoded.append(self.decode(ids, **options))
            except ValueError as error:
                raise ValueError(f"sequence {number}: {error}") from error
        return decoded

    def to_dict(self) -> dict[str, Any]:
        """The contents of processor_config.json: the layout and the hashes of both tokenizers."""
        return {
            "processor_class": type(self).__name__,
            "text_size": self.vocabulary.text_size,
            "codebook_size": self.vocabulary.codebook_size,
            "tokens_per_video": self.vocabulary.tokens_per_video,
            "frame_stride": self.frame_stride,
            "text_tokenizer_hash": text_tokenizer_hash(self.tokenizer),
            "video_tokenizer_hash": self.video_tokenizer.weight_hash(),
        }

    def save_pretrained(
        self,
        folder: str | Path,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Save the text tokenizer and processor_config.json in `folder`, the LARP tokenizer in its video_tokenizer/.

        push_to_hub: also upload them to `repo_id` (default: the folder's name), with the other options.
        """
        self.tokenizer.save_pretrained(folder)
        self.video_tokenizer.save_pretrained(Path(folder) / VIDEO_TOKENIZER)
        (Path(folder) / PROCESSOR_CONFIG).write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        if push_to_hub:
            name = repo_id or Path(folder).resolve().name
            self.push_to_hub(name, private=private, token=token, revision=revision)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> str:
        """Upload the files of `save_pretrained` to a hub repository, created if it does not exist; returns its URL.

        Raises ValueError if the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, private=private, token=token, revision=revision)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        device: str = "cpu",
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        padding_side: Literal["left", "right"] | None = None,
        **from_auto,
    ) -> "LarpMllmProcessor":
        """Load a processor from a folder or a hub repository ("owner/name").

        The layout is read from config.json in a model folder, else from processor_config.json. padding_side replaces that
        of the text tokenizer. Raises ValueError if the hub cannot be reached, and if the text tokenizer or the LARP
        tokenizer is not the one the model was trained with.
        """
        if unknown := from_auto.keys() - _FROM_AUTO:
            raise ValueError(f"LarpMllmProcessor.from_pretrained knows no {', '.join(sorted(unknown))}: leave them out")
        if padding_side is not None:
            check_side(padding_side)
        where = str(pretrained_model_name_or_path)
        folder = fetch_folder(where, PROCESSOR_FILES, revision, local_files_only, token, cache_dir)
        saved = read_config(folder / PROCESSOR_CONFIG)
        if (read_config(folder / "config.json") or {}).get("model_type") == MODEL_TYPE:
            config = LarpMllmConfig.from_pretrained(folder)
            vocabulary, stride = config.vocabulary, config.frame_stride
        else:
            config = None
            vocabulary, stride = _saved_layout(saved or {}, where)
        tokenizer = load_text_tokenizer(folder)
        own = folder / VIDEO_TOKENIZER
        # The models that come with the package share their tokenizer.
        place = shipped("tokenizer") if is_shipped(folder) and not own.is_dir() else own.resolve()
        video_tokenizer = LarpTokenizer.from_pretrained(place, device=device)
        if config is not None:
            check_tokenizers(config, tokenizer, video_tokenizer, where)
        if saved is None:
            raise ValueError(
                f"{where}: {PROCESSOR_CONFIG} is missing, which records the tokenizers that the model was trained with: copy the "
                "model folder again"
            )
        check_saved(saved, tokenizer, video_tokenizer, where)
        if padding_side is not None:
            tokenizer.padding_side = padding_side
        return cls(tokenizer, video_tokenizer, vocabulary, stride)


def _saved_layout(saved: dict, where: str) -> tuple[Vocabulary, int]:
    names = ("text_size", "codebook_size", "tokens_per_video", "frame_stride")
    values = [saved.get(name) for name in names]
    if not all(map(is_whole, values)):
        raise ValueError(
            f"{where} holds no processor of a language model with video vocabulary ({PROCESSOR_CONFIG} and config.json "
            "describe none): give OUT/model of a training run"
        )
    return Vocabulary(*values[:3]), values[3]


AutoProcessor.register(LarpMllmConfig, LarpMllmProcessor)
