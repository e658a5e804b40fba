"""Progress: what a caller is told while videos and text are written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from larp_mllm.checks import check_count, check_progress

from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from larp_mllm.video import Video


@dataclass(frozen=True)
class Progress:
    """How far a call has come. An exception that the callback raises ends the call."""

    kind: Literal["codes", "text"]
    """What was written last."""
    done: int
    """Codes, or samples of text, so far, in all videos or texts of the call together."""
    total: int
    """How many there will be; of text, how many there may be at most; of the codes of a chat, in the videos begun."""
    text: str = ""
    """The text that was just written, where one text is: the pieces, one after another, are all of it."""
    previews: "list[Video] | None" = None
    """The videos that are being sampled as far as their codes go, where `preview_every` asks for them now and the video
    tokenizer is nested; else None: without nesting only all codes make a video. In a chat: a video that is whole, with
    its last code."""


ProgressCallback = Callable[[Progress], None]


class CodeProgress:
    """Tells of codes that are sampled: the callback, or without one a bar that appears when there is something to wait for.

    Args:
        total: codes of the whole call.
        report: the callback, or None.
        preview: codes (B, n) -> videos of them; None where there are no previews.
        every: previews come after each so many codes of a video; 0: none.
    """

    def __init__(
        self,
        total: int,
        report: ProgressCallback | None,
        preview: Callable[[Tensor], "list[Video]"] | None = None,
        every: int = 0,
    ):
        check_count("preview_every", every, least=0)
        check_progress(report)
        self.total, self.done, self.report, self.preview, self.every = total, 0, report, preview, every
        self.bar = None if report else tqdm(total=total, desc="sampling codes", unit="code", delay=2, leave=False)

    def __enter__(self) -> "CodeProgress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, codes: Tensor, sampled: int) -> None:
        """Of codes (B, N), the first `sampled` of each row are there: one more than at the last call."""
        self.done += len(codes)
        if self.bar is not None:
            self.bar.update(len(codes))
            return
        now = self.preview is not None and self.every and sampled % self.every == 0
        self.report(
            Progress("codes", self.done, self.total, previews=self.preview(codes[:, :sampled]) if now else None)
        )


class TextProgress:
    """Tells of text as it is sampled, piece by piece; half a character waits for its other half.

    decode: text ids -> text, without white space at its ends.
    """

    def __init__(self, total: int, report: ProgressCallback | None, decode: Callable[[list[int]], str]):
        check_progress(report)
        self.total, self.report, self.decode, self.told = total, report, decode, ""

    def __call__(self, ids: list[int], done: int, last: bool = False) -> None:
        """The ids of the present text so far; `last`: no more of them will come."""
        if self.report is None:
            return
        text = self.decode(ids)
        piece = text[len(self.told) :] if text.startswith(self.told) and (last or not text.endswith("�")) else ""
        self.told = "" if last else self.told + piece
        if piece or not last:
            self.report(Progress("text", done, self.total, piece))
