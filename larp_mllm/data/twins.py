"""What is held out and trained on all the same: figures from it say less than they seem to, so that a run tells of it."""

from collections.abc import Collection

from larp.data.tokens import TokenCache
from larp_mllm.data.held_out import content_numbers
from larp_mllm.data.records import RecordSet
from larp_mllm.data.text_data import TextSet

_SHOWN = 3
"""Names that a line gives."""


def same_videos(train: TokenCache, held_out: TokenCache) -> list[str]:
    """A line if videos of both caches have the same name."""
    judged = list(dict.fromkeys(held_out.names))
    trained = set(train.names)
    both = [name for name in judged if name in trained]
    return _line(len(both), len(judged), "videos have the name of one that is trained on", both)


def same_videos_of_records(records: RecordSet, held_out: Collection[int]) -> list[str]:
    """A line if some of the held-out records, by number, show a video that one of the others shows as well."""
    apart = set(held_out)
    trained = {video for row in range(len(records)) if row not in apart for video in records.videos[row]}
    both = [records.names[row] for row in held_out if not trained.isdisjoint(records.videos[row])]
    return _line(len(both), len(apart), "records show a video that is trained on in another record", both)


def same_text(train: TextSet, held_out: TextSet) -> list[str]:
    """A line if pieces of text are in both."""
    numbers = content_numbers([*train.pieces, *held_out.pieces])
    trained, judged = set(numbers[: len(train)]), numbers[len(train) :]
    return _line(sum(number in trained for number in judged), len(judged), "pieces of text are trained on as well", [])


def _line(both: int, judged: int, what: str, names: list[str]) -> list[str]:
    if not both:
        return []
    more = ", ..." if len(names) > _SHOWN else ""
    shown = f" ({', '.join(names[:_SHOWN])}{more})" if names else ""
    return [f"{both} of {judged} held-out {what}{shown}: figures from these say little about what is new"]
