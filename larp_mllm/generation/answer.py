"""Answer: the sampled ids of a chat's answer become texts and Videos, with progress."""

from larp_mllm.generation.progress import Progress, ProgressCallback, TextProgress
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.video import Video

import torch


class Answer:
    """Collects the parts of an answer in order.

    Args:
        processor: decodes ids to texts and frames.
        fps: frames per second of the videos.
        max_new_tokens: the largest number of samples of text, for `Progress.total`.
        progress: called after each id; a video is passed with its last code.
    """

    def __init__(
        self, processor: LarpMllmProcessor, fps: float, max_new_tokens: int, progress: ProgressCallback | None
    ):
        self._processor, self._fps, self._progress = processor, fps, progress
        self._text_progress = TextProgress(max_new_tokens, progress, processor.decode_text)
        self._parts: list[dict] = []
        self._text: list[int] = []
        self._codes: list[int] = []
        self._text_samples = self._videos = 0

    def append(self, token_id: int) -> None:
        """Add the next id, in the order of `larp_mllm.generation.decode.decode_answer`."""
        v = self._processor.vocabulary
        self._text_samples += token_id <= v.video_start
        if v.is_text(token_id):
            self._text.append(token_id)
            self._text_progress(self._text, self._text_samples)
        elif token_id == v.video_start:
            self._end_text()
            self._videos += 1
        elif v.is_code(token_id):
            self._codes.append(v.id_to_code(token_id))
            self._add_code(v.tokens_per_video)

    def message(self) -> dict:
        """End the answer: `{"role": "assistant", "content": [parts]}` with at least one part."""
        self._end_text()
        return {"role": "assistant", "content": self._parts or [{"type": "text", "text": ""}]}

    def _end_text(self) -> None:
        self._text_progress(self._text, self._text_samples, last=True)
        if text := self._processor.decode_text(self._text):
            self._parts.append({"type": "text", "text": text})
        self._text = []

    def _add_code(self, tokens_per_video: int) -> None:
        done, previews = (self._videos - 1) * tokens_per_video + len(self._codes), None
        if len(self._codes) == tokens_per_video:
            (frames,) = self._processor.decode_videos(torch.tensor([self._codes]))
            video = Video(frames, self._fps, codes=tuple(self._codes))
            self._parts.append({"type": "video", "video": video})
            self._codes, previews = [], [video]
        if self._progress is not None:
            self._progress(Progress("codes", done, self._videos * tokens_per_video, previews=previews))
