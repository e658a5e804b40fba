"""LarpMllmProcessor: text and videos -> ids, and ids -> text and videos.

Text is encoded apart from everything else, and control and code ids are inserted as ids, never as strings: whatever a
user types stays plain text, `<|video_start|>` and `<|im_end|>` included.
"""

import re
from pathlib import Path
from typing import Any

from larp.tokenizer import LarpTokenizer
from larp_mllm.sequence import PLACEHOLDER, Layout
from larp_mllm.vocabulary import Vocabulary

import numpy as np
import torch
from torch import Tensor

VIDEO_TOKENIZER = "video_tokenizer"


class LarpMllmProcessor:
    """The base model's text tokenizer, the LARP tokenizer and the id layout that joins them.

    Raises ValueError if the LARP tokenizer has another codebook or number of tokens than the layout.
    """

    def __init__(self, text_tokenizer, video_tokenizer: LarpTokenizer, vocabulary: Vocabulary):
        own = (video_tokenizer.codebook_size, video_tokenizer.num_tokens)
        if own != (vocabulary.codebook_size, vocabulary.tokens_per_video):
            raise ValueError(
                f"the video tokenizer has {own[0]} codes and {own[1]} tokens per video, the language model is made for "
                f"{vocabulary.codebook_size} and {vocabulary.tokens_per_video}; use the tokenizer it was trained with"
            )
        self.text_tokenizer = text_tokenizer
        self.video_tokenizer = video_tokenizer
        self.vocabulary = vocabulary
        self._typed_tokens = _pattern_of_added_tokens(text_tokenizer)

    @property
    def layout(self) -> Layout:
        """The id layout with the base tokenizer's begin and end ids."""
        return Layout(self.vocabulary, self.text_tokenizer.bos_token_id, self.text_tokenizer.eos_token_id)

    def encode_text(self, text: str) -> list[int]:
        """Plain text -> text ids, without begin or end ids; nothing in it is read as a special or added token."""
        ids: list[int] = []
        for piece in self._harmless_pieces(text):
            ids += self.text_tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _harmless_pieces(self, text: str) -> list[str]:
        # split_special_tokens does not protect from tokens added as non-special: a typed one is cut after a letter.
        pieces = []
        while self._typed_tokens and (found := self._typed_tokens.search(text)):
            pieces.append(text[: found.start() + 1])
            text = text[found.start() + 1 :]
        return [*pieces, text] if text else pieces

    def decode_text(self, ids) -> str:
        """Text ids -> text, special tokens left out."""
        return self.text_tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def encode_videos(self, videos: list[np.ndarray | Tensor]) -> list[list[int]]:
        """Videos -> their codes. Each: uint8 (T, H, W, 3) frames, or a float clip (3, T, H, W) in [0, 1].

        Arrays and tensors alike; frames are resized and of a longer video the middle is read, a clip is taken as it is.
        ValueError for other shapes, dtypes or ranges, and for clips of different shapes in one call.
        """
        config = self.video_tokenizer.config
        clips = [self._clip(video, config) for video in videos]
        if len(shapes := {tuple(clip.shape) for clip in clips}) > 1:
            raise ValueError(f"all clips of one call must have one shape, got {sorted(shapes)}: encode them one by one")
        device = next(self.video_tokenizer.parameters()).device
        return self.video_tokenizer.encode(torch.stack(clips).to(device)).tolist() if clips else []

    def _clip(self, video: np.ndarray | Tensor, config: Any) -> Tensor:
        from larp.data.clips import frames_to_clip

        pixels = video.detach().cpu() if isinstance(video, Tensor) else torch.from_numpy(_array(video))
        if pixels.is_floating_point() and pixels.ndim == 4 and pixels.shape[0] == 3:
            self.video_tokenizer.check_clip(pixels[None])
            return pixels.float()
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(_not_a_video(f"{str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}"))
        frames = pixels.numpy()
        if len(frames) < config.num_frames:
            raise ValueError(
                f"the video has {len(frames)} frames, the video tokenizer reads {config.num_frames}: give a longer one"
            )
        start = (len(frames) - config.num_frames) // 2
        return frames_to_clip(frames[start : start + config.num_frames], config.height, config.width)

    def decode_videos(self, codes: Tensor) -> list[np.ndarray]:
        """codes int64 (B, N) -> B videos, uint8 (T, H, W, 3)."""
        from larp.data.clips import clip_to_frames

        device = next(self.video_tokenizer.parameters()).device
        return [clip_to_frames(clip) for clip in self.video_tokenizer.decode(codes.to(device)).cpu()]

    def __call__(self, text: str, videos: list[np.ndarray | Tensor] = ()) -> list[int]:
        """`"before <video> after"` and one video for each `<video>` -> ids. ValueError if their numbers differ."""
        pieces = text.split(PLACEHOLDER)
        if len(pieces) != len(videos) + 1:
            raise ValueError(
                f"the text has {len(pieces) - 1} {PLACEHOLDER} placeholders but {len(videos)} videos were given"
            )
        ids = self.encode_text(pieces[0])
        for codes, piece in zip(self.encode_videos(list(videos)), pieces[1:], strict=True):
            ids += self.vocabulary.span(codes) + self.encode_text(piece)
        return ids

    def decode(self, ids) -> list[str | np.ndarray]:
        """ids -> texts and uint8 videos (T, H, W, 3) in order. ValueError for a broken video span."""
        return [
            self.decode_text(content) if kind == "text" else self.decode_videos(torch.tensor([content]))[0]
            for kind, content in self.vocabulary.split(ids)
        ]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the text tokenizer into `folder` and the LARP tokenizer into `folder/video_tokenizer`."""
        self.text_tokenizer.save_pretrained(folder)
        self.video_tokenizer.save_pretrained(Path(folder) / VIDEO_TOKENIZER)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "LarpMllmProcessor":
        """Load what `save_pretrained` wrote beside a LarpMllmForCausalLM, and check it against the model's config.

        Raises ValueError if the text tokenizer or the LARP tokenizer is not the one the model was trained with.
        """
        from larp_mllm.modeling import LarpMllmConfig

        from transformers import AutoTokenizer

        config = LarpMllmConfig.from_pretrained(folder)
        try:
            text_tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers and tokenizers raise families of their own
            state = "is damaged" if (Path(folder) / "tokenizer.json").is_file() else "is missing"
            raise ValueError(
                f"{folder}: the text tokenizer cannot be loaded, tokenizer.json {state}: copy the model folder again, "
                f"or take the file from the base model ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            ) from error
        video_tokenizer = LarpTokenizer.from_pretrained((Path(folder) / VIDEO_TOKENIZER).resolve(), device=device)
        check_tokenizers(config, text_tokenizer, video_tokenizer, str(folder))
        return cls(text_tokenizer, video_tokenizer, config.vocabulary)


def check_tokenizers(config, text_tokenizer, video_tokenizer: LarpTokenizer, where: str) -> None:
    """ValueError unless both tokenizers are those that the config of a LarpMllmForCausalLM records."""
    expected = max(config.text_config.vocab_size, len(text_tokenizer))
    if config.text_size != expected:
        raise ValueError(
            f"{where}: the model's text ids end at {config.text_size}, but its base and tokenizer make {expected}; "
            "the tokenizer files are not those the model was trained with: restore them"
        )
    found = video_tokenizer.weight_hash()
    if config.video_tokenizer_hash and found != config.video_tokenizer_hash:
        raise ValueError(
            f"{where}: the video tokenizer has weight hash {found[:12]}, the model was trained with "
            f"{config.video_tokenizer_hash[:12]}: its codes would mean something else. Restore that one"
        )


def _array(video: Any) -> np.ndarray:
    try:
        array = np.asarray(video)
        known = array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)
    except ValueError as error:  # frames of different sizes
        raise ValueError(_not_a_video(str(error))) from error
    if not known:
        raise ValueError(_not_a_video(f"{array.dtype} {array.shape}" if array.ndim else repr(video)))
    return np.require(array, requirements=("C", "W"))  # as torch shares it


def _not_a_video(found: str) -> str:
    return (
        "a video must be uint8 frames (T, H, W, 3) of 0..255, or a float clip (3, T, H, W) in [0, 1], "
        f"got {found}: convert it"
    )


def _pattern_of_added_tokens(text_tokenizer) -> re.Pattern | None:
    # Runs of white space are added tokens of some bases and mean nothing but themselves.
    contents = {token.content for token in text_tokenizer.added_tokens_decoder.values()}
    dangerous = sorted((c for c in contents if len(c) > 1 and re.search(r"\w", c)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, dangerous))) if dangerous else None
