"""Records in a data set that the package `datasets` saved: the columns are the keys of a record of JSONL, see records.py.

Null stands for a key that is left out. Videos are those of `videos` or `video`: bytes in the data set (type Video), or names of files;
of a chat they belong, in order, to its parts of type video that name none.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from larp.data.hf_disk import RowVideo, load_saved, save_time, video_field
from larp.data.listing import as_folder

_KNOWN = ("messages", "text", "videos", "video", "loss", "id")
_CHUNK = 1000
"""Rows whose texts are read at a time."""


def open_disk_records(spec: str) -> tuple[Path, Iterator[tuple[str, dict[str, Any], list[Any]]]]:
    """Return the folder of hf-disk:FOLDER that its names of videos are relative to, and the arguments of `with_videos` of each row.

    Of a DatasetDict the split train is read. Raises ValueError for a data set without records, and for columns that no record has.
    """
    base = as_folder(spec.partition(":")[2], spec)
    parts = load_saved(base, spec)
    split = "" if "" in parts else "train"
    if split not in parts:
        raise ValueError(f"{spec}: has no split train, but {', '.join(parts)}: save the one with the records alone")
    rows, folder = parts[split], base / split
    if unknown := sorted(set(rows.column_names) - set(_KNOWN)):
        raise ValueError(
            f"{spec}: unknown column {unknown[0]!r}; known are {', '.join(_KNOWN)}: rename it, or take it away with remove_columns"
        )
    if not {"messages", "text"} & set(rows.column_names) or not len(rows):
        raise ValueError(f"{spec}: holds no record: its columns must be messages or text, and videos")
    return folder, _rows(rows, folder)


def with_videos(name: str, given: dict[str, Any], videos: list[Any]) -> dict[str, Any]:
    """Return a record, of this name in errors, with its videos where JSONL has them. Raises ValueError if a chat has too many or few."""
    if "messages" in given:
        return {**given, "messages": _placed(given["messages"], videos, name)}
    return {**given, **({"videos": videos} if videos else {})}


def _rows(rows: Any, folder: Path) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    columns = [name for name in ("videos", "video") if name in rows.column_names]
    held = {name: _holds_bytes(rows.features[name]) for name in columns}
    videos = {name: rows.select_columns([name]).with_format("arrow") for name in columns}
    time = save_time(folder)
    texts = rows.select_columns([name for name in rows.column_names if not held.get(name)]).with_format("arrow")

    def videos_of(row: int, given: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        for name in columns:
            if held[name]:
                value = videos[name][row].column(0)[0]
                if value.is_valid:
                    places = range(len(value)) if hasattr(value, "values") else [None]
                    found += [_video(videos[name], row, place, folder, time) for place in places]
            elif (value := given.pop(name, None)) is not None:
                found += value if isinstance(value, list) else [value]
        return found

    for begin in range(0, len(rows), _CHUNK):
        for row, given in enumerate(texts[begin : begin + _CHUNK].to_pylist(), begin):
            given = _without_nulls(given)
            yield f"{folder}, row {row}", given, videos_of(row, given)


def _holds_bytes(feature: Any) -> bool:
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return inner.__class__.__name__ == "Video"


def _video(videos: Any, row: int, place: int | None, folder: Path, time: int) -> RowVideo | str:
    if video_field(videos, row, "bytes", place, whole=False) is None and (
        named := video_field(videos, row, "path", place)
    ):
        return named
    where = f"{folder}, row {row}" + ("" if place is None else f", video {place + 1}")
    return RowVideo(where, row, time, videos, place)


def _without_nulls(value: Any) -> Any:
    """Leave out the keys that are null, which a table has where other rows have a value."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _placed(messages: Any, videos: list[Any], name: str) -> Any:
    remaining, wanted = iter(videos), 0

    def part_with_video(part: Any) -> Any:
        nonlocal wanted
        if not isinstance(part, dict) or part.get("type") != "video" or {"video", "path"} & set(part):
            return part
        wanted += 1
        return {**part, "video": next(remaining, None)}

    def message_with_videos(message: Any) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        return (
            {**message, "content": [part_with_video(part) for part in content]}
            if isinstance(content, list)
            else message
        )

    # What is no list is refused later, with all that is wrong in messages.
    found = [message_with_videos(message) for message in messages] if isinstance(messages, list) else messages
    if wanted != len(videos):
        raise ValueError(
            f"{name}: the row holds {len(videos)} videos, and its messages have {wanted} parts of type video that name none"
        )
    return found
