"""The text of an answer of an exported model, with video tokens -> its videos."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from larp_mllm.export.checkpoint import read_layout, read_video_ids
from larp_mllm.video import Video


@dataclass
class _Span:
    """What a text holds between video_start and video_end, or a run of codes without them."""

    codes: list[int] = field(default_factory=list)
    foreign: str = ""
    """What stands between its codes."""
    after: str = ""
    """What stands after its codes so far."""


def read_answer(folder: str | Path, text: str) -> tuple[list[Video], list[str]]:
    """Decode the videos in a text, such as an answer of a server that has loaded an export.

    Args:
        folder: the export.
        text: words, and videos as tokens: video_start, exactly N codes, video_end. White space between tokens is ignored.
            video_start may be missing, as it is in a completion whose prompt ends with it, and so may a last video_end.

    Returns the videos that are whole, in order, and for each other one a line that says what was found. Raises ValueError
    if `folder` is not an export, and if the text holds no video at all.
    """
    layout = read_layout(Path(folder))
    spans = _spans(text, layout["words"])
    if not spans:
        shown = repr(text[:60]) + (" ..." if len(text) > 60 else "")
        raise ValueError(
            f"the text has no video, which begins with {layout['words']['video_start']}: it has {len(text)} characters, "
            f"{shown}. Ask for a video; of a server, for special tokens too (skip_special_tokens false)"
        )
    videos, broken = [], []
    for number, span in enumerate(spans, 1):
        if wrong := _wrong(span, layout["codebook_size"], layout["tokens_per_video"]):
            broken.append(f"video {number} of {len(spans)} {wrong}")
        else:
            videos.append(read_video_ids(folder, [layout["first_code"] + code for code in span.codes]))
    return videos, broken


def _spans(text: str, words: dict[str, str]) -> list[_Span]:
    before, after = words["code"].split("{}")
    start, end, code = map(re.escape, (words["video_start"], words["video_end"], before))
    token = re.compile(rf"({start})|({end})|{code}([0-9]{{1,9}}){re.escape(after)}")
    spans: list[_Span] = []
    inside = opened = False
    place = 0
    for found in [*token.finditer(text), None]:
        between = text[place : found.start() if found else len(text)].strip()
        if between and opened:
            spans[-1].after += between
        elif between:
            inside = False  # a run of codes without video_start ends where words begin
        if found is None:
            break
        place = found.end()
        if found[1]:
            spans.append(_Span())
            inside = opened = True
        elif found[2]:
            inside = opened = False
        else:
            if not inside:
                spans.append(_Span())
                inside = True
            spans[-1].foreign += spans[-1].after
            spans[-1].after = ""
            spans[-1].codes.append(int(found[3]))
    return spans


def _wrong(span: _Span, codebook_size: int, count: int) -> str | None:
    """What keeps a span from being a video."""
    if len(span.codes) != count:
        return f"has {len(span.codes)} codes, not {count}"
    if span.foreign:
        return f"has {span.foreign[:40]!r} among its codes"
    if (largest := max(span.codes)) >= codebook_size:
        return f"has code {largest}, the last is {codebook_size - 1}"
    return None
