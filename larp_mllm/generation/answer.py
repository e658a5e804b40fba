"""An answer of a chat: its ids, as they are sampled, become texts and Videos, and whoever waits is told."""

from larp_mllm.generation.progress import Progress, ProgressCallback, TextProgress
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.video import Video

import torch


class Answer:
    """The parts of a message, in the order in which they are written.

    Args:
        processor: its tokenizers make texts and frames of the ids.
        fps: of the videos.
        most: samples of text that there may be.
        report: is told after each id, of a whole video with its last code; or None.
    """

    def __init__(self, processor: LarpMllmProcessor, fps: float, most: int, report: ProgressCallback | None):
        self._processor, self._fps, self._report = processor, fps, report
        self._told = TextProgress(most, report, processor.decode_text)
        self._parts: list[dict] = []
        self._text: list[int] = []
        self._codes: list[int] = []
        self._draws = self._videos = 0

    def add(self, written: int) -> None:
        """Take the next id; ids come as `larp_mllm.generation.decode.decode_answer` yields them."""
        v = self._processor.vocabulary
        self._draws += written <= v.video_start
        if v.is_text(written):
            self._text.append(written)
            self._told(self._text, self._draws)
        elif written == v.video_start:
            self._end_text()
            self._videos += 1
        elif v.is_code(written):
            self._codes.append(v.id_to_code(written))
            self._add_code(v.tokens_per_video)

    def message(self) -> dict:
        """End the answer: `{"role": "assistant", "content": [parts]}`, of at least one part."""
        self._end_text()
        return {"role": "assistant", "content": self._parts or [{"type": "text", "text": ""}]}

    def _end_text(self) -> None:
        self._told(self._text, self._draws, last=True)
        if text := self._processor.decode_text(self._text):
            self._parts.append({"type": "text", "text": text})
        self._text = []

    def _add_code(self, count: int) -> None:
        done, whole = (self._videos - 1) * count + len(self._codes), None
        if len(self._codes) == count:
            (frames,) = self._processor.decode_videos(torch.tensor([self._codes]))
            whole = Video(frames, self._fps, codes=tuple(self._codes))
            self._parts.append({"type": "video", "video": whole})
            self._codes = []
        if self._report is not None:
            self._report(Progress("codes", done, self._videos * count, previews=None if whole is None else [whole]))
