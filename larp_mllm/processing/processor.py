"""LarpMllmProcessor: text and videos -> ids, and ids -> text and videos.

Text is encoded apart from everything else, and control and code ids are inserted as ids, never as strings: whatever a
user types stays plain text, `<|video_start|>` and `<|im_end|>` included.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

from larp.models.tokenizer import LarpTokenizer
from larp_mllm.checks import check_count, check_start, is_whole
from larp_mllm.locate import MODEL_TYPE, PROCESSOR_FILES, fetched, read_config, upload
from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.vocabulary import Vocabulary
from larp_mllm.processing.batching import Batching, batched, check_side, whole_numbers
from larp_mllm.processing.plain_text import PlainText
from larp_mllm.processing.sequence import PLACEHOLDER, Layout, encode
from larp_mllm.processing.tokenizer_checks import check_saved, check_tokenizers, load_text_tokenizer, words_hash
from larp_mllm.processing.video_inputs import Videos, grouped, listed, to_clip, to_frames

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

VIDEO_TOKENIZER = "video_tokenizer"
PROCESSOR_CONFIG = "processor_config.json"
# What AutoProcessor passes on, and what means nothing here: no code of a repository is ever run, whatever is trusted.
_FROM_AUTO = {"_from_auto", "trust_remote_code", "force_download", "config"}
# Of transformers' apply_chat_template, and why not. A template takes other words than the messages' as its own, control
# tokens included, so that these could not be kept plain text.
_NO_CHAT_OPTIONS = {
    "continue_final_message": "an answer is a new message: ask with a user's message last and add_generation_prompt=True",
    "tools": "their words would not stay plain text: describe them in a system message",
    "documents": "their words would not stay plain text: put them into a message",
    "chat_template": "set processor.chat_template instead",
    "return_assistant_tokens_mask": "training reads what is learned from records: larp_mllm.processing.chat.chat_segments",
}


class LarpMllmProcessor(ProcessorMixin):
    """The base model's text tokenizer, the LARP tokenizer and the id layout that joins them.

    `frame_stride`: of a video file every so many-th frame is read. Rows are padded on the text tokenizer's own side, which
    for many a base is the right; to generate from several at once pad them on the left (`padding_side="left"`).
    `chat_template`: for the text tokenizer, in place of its own. Raises ValueError for what is no tokenizer or template,
    and if the LARP tokenizer has another codebook or number of tokens than the layout.
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
        own = (video_tokenizer.codebook_size, video_tokenizer.num_tokens)
        if own != (vocabulary.codebook_size, vocabulary.tokens_per_video):
            raise ValueError(
                f"the video tokenizer has {own[0]} codes and {own[1]} tokens per video, the language model is made for "
                f"{vocabulary.codebook_size} and {vocabulary.tokens_per_video}; use the tokenizer it was trained with"
            )
        # First, since transformers sets the chat template before the tokenizer, which here holds it.
        self.tokenizer = tokenizer
        super().__init__(tokenizer, chat_template=tokenizer.chat_template if chat_template is None else chat_template)
        self.video_tokenizer = video_tokenizer
        self.vocabulary = vocabulary
        self.frame_stride = frame_stride
        self._plain_text: PlainText | None = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What transformers keeps for a processor: the text tokenizer; the LARP tokenizer is none of its classes."""
        return ["tokenizer"]

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """That of the text tokenizer, which is saved with it; None: it has none, and chats are lines of "User: ..."."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        if template is not None and not isinstance(template, (str, dict)):
            raise ValueError(f"chat_template must be a template, several by their names, or None, got {template!r}")
        self.tokenizer.chat_template = template

    @property
    def layout(self) -> Layout:
        """The id layout with the base tokenizer's begin and end ids."""
        return Layout(self.vocabulary, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)

    def encode_text(self, text: str) -> list[int]:
        """Plain text -> text ids, without begin or end ids; nothing in it is read as a special or added token."""
        if self._plain_text is None or self._plain_text.tokenizer is not self.tokenizer:
            self._plain_text = PlainText(self.tokenizer)
        return self._plain_text.encode(text)

    def decode_text(self, ids, skip_special_tokens: bool = True) -> str:
        """Text ids -> text, special tokens and white space around it left out; or with both, as it was written."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text.strip() if skip_special_tokens else text

    def encode_videos(self, videos: Sequence[Videos]) -> list[list[int]]:
        """Videos -> their codes. Each: a file, a Video, uint8 (T, H, W, 3) frames, or a float clip (3, T, H, W) in [0, 1].

        Arrays and tensors alike; frames are resized and of a longer video the middle is read, a clip is taken as it is.
        ValueError for other shapes, dtypes or ranges, and for clips of different shapes in one call.
        """
        count = self.video_tokenizer.config.num_frames
        clips = [to_clip(to_frames(video, count, self.frame_stride), self.video_tokenizer) for video in listed(videos)]
        if len(shapes := {tuple(clip.shape) for clip in clips}) > 1:
            raise ValueError(f"all clips of one call must have one shape, got {sorted(shapes)}: encode them one by one")
        device = next(self.video_tokenizer.parameters()).device
        return self.video_tokenizer.encode(torch.stack(clips).to(device)).tolist() if clips else []

    def video_of(self, part: dict[str, Any]) -> Videos:
        """The video of a part of a message, `{"type": "video", "video" or "path": ...}`; of a file with "start" the frames
        from so many seconds on, as in records. ValueError for another "start", and for one of what is no file.
        """
        video = part["video"] if "video" in part else part["path"]
        start = check_start(part.get("start"), "a video part")
        if start is None:
            return video
        if not isinstance(video, (str, Path)):
            raise ValueError(
                f'a video part: "start" is for files, got a {type(video).__name__}: give the frames that are meant'
            )
        from larp.data.video import ShortVideoError, probe, read_video

        try:
            first = round(start * probe(video).fps)
            return read_video(video, first, self.video_tokenizer.config.num_frames, self.frame_stride)[0]
        except ShortVideoError as error:
            raise ShortVideoError(f'{error}: lower its "start" ({start:g})', error.frames) from error

    def decode_videos(self, codes: Tensor) -> list[np.ndarray]:
        """codes int64 (B, N) -> B videos, uint8 (T, H, W, 3)."""
        from larp.data.clips import clip_to_frames

        device = next(self.video_tokenizer.parameters()).device
        return [clip_to_frames(clip) for clip in self.video_tokenizer.decode(codes.to(device)).cpu()]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Videos] | Sequence[Sequence[Videos]] | None = None,
        *,
        add_special_tokens: bool = True,
        open_video: bool = False,
        **batching: Unpack[Batching],
    ) -> BatchFeature:
        """`"before <video> after"` and one video for each `<video>` -> input_ids and attention_mask, lists or (B, S).

        text: one, with its videos; or several, with a list of videos for each. add_special_tokens: put the base's begin
        id first, where it has one. open_video: end with video_start, after which the model writes a video.
        batching: return_tensors, padding, padding_side and max_length, see `larp_mllm.processing.batching.Batching`; nothing is ever cut.
        ValueError, naming the text, if videos and placeholders differ in number.
        """
        if not isinstance(text, str) and not (
            isinstance(text, Sequence) and all(isinstance(content, str) for content in text)
        ):
            raise ValueError(
                f"text must be a str, or a list of them, with {PLACEHOLDER} where a video stands, got {text!r}"
            )
        texts = [text] if isinstance(text, str) else list(text)
        groups = grouped(videos, text)
        begin = [self.layout.bos] if add_special_tokens and self.layout.bos is not None else []
        rows = []
        for number, (content, group) in enumerate(zip(texts, groups, strict=True)):
            where = "the text" if isinstance(text, str) else f"text {number}"
            ids = self._interleaved(content, group, where)
            rows.append([*begin, *ids, *([self.vocabulary.video_start] if open_video else [])])
        return batched(rows, self.tokenizer, isinstance(text, str), **batching)

    def _interleaved(self, text: str, videos: Sequence[Videos], where: str) -> list[int]:
        pieces = text.split(PLACEHOLDER)
        if len(pieces) != len(videos) + 1:
            raise ValueError(
                f"{where} has {len(pieces) - 1} {PLACEHOLDER} placeholders but {len(videos)} videos were given: "
                f"write one {PLACEHOLDER} where each video stands"
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
        """A chat, or several, in the text tokenizer's own template -> input_ids; with return_dict a BatchFeature.

        messages: `{"role", "content"}`, content a str or parts `{"type": "text", "text"}` and `{"type": "video",
        "video"}` (or "path"; with "start", see `video_of`). Contents are encoded apart from the template, so none can
        speak for another role; it cannot read them, so that `<think>` blocks of earlier answers stay. enable_thinking: what
        the template is told. Training tells it False, after which Qwen3's puts an empty `<think>` block before the answer.
        tokenize=False: the text instead, for the eye, with `<video>` for videos. options: return_tensors, padding,
        padding_side and max_length, see `larp_mllm.processing.batching.Batching`. Raises ValueError, naming the message, and for those
        options of transformers that are not supported, tools and continue_final_message among them.
        """
        batching = {name: options.pop(name) for name in Batching.__annotations__ if name in options}
        for name, value in options.items():
            if value or name not in _NO_CHAT_OPTIONS:
                raise ValueError(
                    f"apply_chat_template does not support {name}: {_NO_CHAT_OPTIONS.get(name, 'leave it out')}"
                )
        single = not messages or isinstance(messages[0], dict)
        chats = [messages] if single else messages
        rows = [
            self._chat(chat, "messages" if single else f"chat {number}", add_generation_prompt, enable_thinking)
            for number, chat in enumerate(chats)
        ]
        if not tokenize:
            texts = [self._shown(row) for row in rows]
            return texts[0] if single else texts
        batch = batched(rows, self.tokenizer, single, **batching)
        return batch if return_dict else batch["input_ids"]

    def _chat(self, messages: Sequence[dict], where: str, answer: bool, thinking: bool) -> list[int]:
        from larp_mllm.processing.chat import chat_segments

        def codes_of(part: dict) -> list[int]:
            return self.encode_videos([self.video_of(part)])[0]

        segments = chat_segments(
            messages, self.tokenizer, self.encode_text, codes_of, where, answer, learned=False, thinking=thinking
        )
        return encode(segments, self.layout, framed=False).ids.tolist()

    def _shown(self, ids: list[int]) -> str:
        read = self.tokenizer.decode
        return "".join(
            read(content, clean_up_tokenization_spaces=False) if kind == "text" else PLACEHOLDER
            for kind, content in self.vocabulary.split(ids)
        )

    def decode(
        self, ids, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> list[str | np.ndarray]:
        """ids -> texts and uint8 videos (T, H, W, 3) in order, empty texts left out. ValueError for a broken span.

        skip_special_tokens: of the texts, see `decode_text`; videos come in either case. Spaces are never cleaned up:
        ValueError for clean_up_tokenization_spaces=True.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces would change what was written: leave it out")
        ids = whole_numbers(ids, self.vocabulary.size)
        contents = [
            self.decode_text(content, skip_special_tokens)
            if kind == "text"
            else self.decode_videos(torch.tensor([content]))[0]
            for kind, content in self.vocabulary.split(ids)
        ]
        return [content for content in contents if not (isinstance(content, str) and not content)]

    def batch_decode(self, rows, **options) -> list[list[str | np.ndarray]]:
        """Rows of ids, a list or (B, S) -> `decode` of each, with its options. ValueError that names the row."""
        decoded = []
        for number, row in enumerate(rows):
            try:
                decoded.append(self.decode(row, **options))
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
        return decoded

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds: the layout, and which tokenizers belong to it."""
        return {
            "processor_class": type(self).__name__,
            "text_size": self.vocabulary.text_size,
            "codebook_size": self.vocabulary.codebook_size,
            "tokens_per_video": self.vocabulary.tokens_per_video,
            "frame_stride": self.frame_stride,
            "text_tokenizer_hash": words_hash(self.tokenizer),
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
        """Write the text tokenizer and processor_config.json into `folder`, the LARP tokenizer into its video_tokenizer/.

        push_to_hub: upload them as well, to `repo_id` (default: the folder's name); the other options are for this alone.
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
        """Upload what `save_pretrained` writes to a hub repository, made if it does not exist; returns its address.

        Raises ValueError if the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, private=private, token=token, revision=revision)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        padding_side: Literal["left", "right"] | None = None,
        **from_auto,
    ) -> "LarpMllmProcessor":
        """Load what `save_pretrained` wrote, from a folder or a hub repository ("owner/name"), and check it.

        If a model's config.json lies beside it, that one's layout counts. padding_side: of the text tokenizer, in place
        of its own. Raises ValueError if the hub cannot be reached, or if the text tokenizer or the LARP tokenizer is not
        the one the model was trained with.
        """
        if unknown := from_auto.keys() - _FROM_AUTO:
            raise ValueError(f"LarpMllmProcessor.from_pretrained knows no {', '.join(sorted(unknown))}: leave them out")
        if padding_side is not None:
            check_side(padding_side)
        where = str(folder)
        folder = fetched(folder, PROCESSOR_FILES, revision, local_files_only, token, cache_dir)
        saved = read_config(folder / PROCESSOR_CONFIG)
        if (read_config(folder / "config.json") or {}).get("model_type") == MODEL_TYPE:
            config = LarpMllmConfig.from_pretrained(folder)
            vocabulary, stride = config.vocabulary, config.frame_stride
        else:
            config = None
            vocabulary, stride = _saved_layout(saved or {}, where)
        tokenizer = load_text_tokenizer(folder)
        video_tokenizer = LarpTokenizer.from_pretrained((folder / VIDEO_TOKENIZER).resolve(), device=device)
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
            f"{where} holds no processor of a language model with video vocabulary ({PROCESSOR_CONFIG} and config.json say "
            "nothing of one): give the folder that training wrote, OUT/model"
        )
    return Vocabulary(*values[:3]), values[3]


AutoProcessor.register(LarpMllmConfig, LarpMllmProcessor)
