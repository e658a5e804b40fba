"""Progress of generation: what callbacks get, and the progress bar without one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from larp.config import check_count
from larp_mllm.checks import check_progress

from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from larp_mllm.video import Video


@dataclass(frozen=True)
class Progress:
    """The state of a call, passed to a progress callback. An exception raised by the callback ends the call."""

    kind: Literal["codes", "text"]
    """What was sampled last."""
    done: int
    """Codes, or samples of text, so far, over all videos or texts of the call."""
    total: int
    """Their number at the end. For text, the largest possible number; in a chat, the codes of the videos begun."""
    text: str = ""
    """The new piece of text. With a single text, all pieces joined are the text; with several, it is empty."""
    previews: "list[Video] | None" = None
    """The unfinished videos, every `preview_every` codes with a nested video tokenizer; else None, since without nesting
    only all codes together make a video. In a chat: the finished video, with its last code."""


ProgressCallback = Callable[[Progress], None]


class CodeProgress:
    """Reports sampled codes to a callback, or without one on a progress bar that appears after two seconds.

    Args:
        total: codes of the whole call.
        callback: may be None.
        preview: codes (B, n) -> unfinished videos; None: no previews.
        preview_every: codes per video between previews; 0: none.
    """

    def __init__(
        self,
        total: int,
        callback: ProgressCallback | None,
        preview: Callable[[Tensor], "list[Video]"] | None = None,
        preview_every: int = 0,
    ):
        check_count("preview_every", preview_every, least=0)
        check_progress(callback)
        self.total, self.done, self.callback = total, 0, callback
        self.preview, self.preview_every = preview, preview_every
        self.bar = None if callback else tqdm(total=total, desc="sampling codes", unit="code", delay=2, leave=False)

    def __enter__(self) -> "CodeProgress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, codes: Tensor, sampled: int) -> None:
        """Report codes (B, N), of which the first `sampled` of each row are valid: one more than in the last call."""
        self.done += len(codes)
        if self.bar is not None:
            self.bar.update(len(codes))
            return
        due = self.preview is not None and self.preview_every and sampled % self.preview_every == 0
        previews = self.preview(codes[:, :sampled]) if due else None
        self.callback(Progress("codes", self.done, self.total, previews=previews))


class TextProgress:
    """Reports text piece by piece to a callback; an incomplete character waits for its remaining bytes.

    Args:
        total: the largest number of samples of text.
        callback: may be None.
        decode: text ids -> text without white space at its ends.
    """

    def __init__(self, total: int, callback: ProgressCallback | None, decode: Callable[[list[int]], str]):
        check_progress(callback)
        self.total, self.callback, self.decode, self.reported = total, callback, decode, ""

    def __call__(self, ids: list[int], done: int, last: bool = False) -> None:
        """Report the ids of the current text so far; `last`: the text is complete."""
        if self.callback is None:
            return
        text, reported = self.decode(ids), self.reported
        piece = text[len(reported) :] if text.startswith(reported) and (last or not text.endswith("�")) else ""
        self.reported = "" if last else reported + piece
        if piece or not last:
            self.callback(Progress("text", done, self.total, piece))
