"""Records in the rows of a saved data set."""

import json

from larp.data.video import write_video
from larp_mllm.data.records import open_records

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()
TEXT = datasets.Value("string")
CHAT = {
    "messages": datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
    "videos": datasets.List(datasets.Video()),
}
QUESTION, ANSWER = (
    {"type": "text", "text": "What?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
)


@pytest.fixture
def movies(tmp_path, qwen):
    for number in range(2):
        frames = np.full((qwen.processor.video_tokenizer.config.num_frames + 2, 32, 32, 3), 90 * number, np.uint8)
        write_video(tmp_path / f"{number}.mp4", frames, fps=8)
    return tmp_path


def save(folder, rows, split="", **kinds) -> str:
    table = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    (datasets.DatasetDict({split: table}) if split else table).save_to_disk(folder)
    return f"hf-disk:{folder}"


def chat(folder, *numbers, parts=None):
    """A row of a chat about these movies, with as many parts of type video, or `parts`."""
    content = [{"type": "video"}] * (len(numbers) if parts is None else parts) + [QUESTION]
    held = [{"bytes": (folder / f"{number}.mp4").read_bytes(), "path": None} for number in numbers]
    return {"messages": [{"role": "user", "content": content}, ANSWER], "videos": held}


def test_chats_of_a_data_set_are_those_of_a_jsonl_file(movies, qwen):
    spec = save(movies / "d", [chat(movies, 0), chat(movies, 1, 0), chat(movies) | {"videos": None}], "train", **CHAT)
    found = open_records(spec, qwen.processor, cache=movies / "codes")
    lines = []
    for names in (["0.mp4"], ["1.mp4", "0.mp4"], []):
        content = [{"type": "video", "video": name} for name in names] + [QUESTION]
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, ANSWER]}))
    (movies / "r.jsonl").write_text("\n".join(lines))
    same = open_records(str(movies / "r.jsonl"), qwen.processor, cache=movies / "other")
    assert [found[k].ids.tolist() for k in range(3)] == [same[k].ids.tolist() for k in range(3)]
    assert [found[k].labels.tolist() for k in range(3)] == [same[k].labels.tolist() for k in range(3)]
    assert found.names[1] == f"{movies / 'd' / 'train'}, row 1" and [len(row) for row in found.videos] == [1, 2, 0]


def test_texts_with_names_of_files(movies, qwen):
    video = {"path": TEXT, "start": datasets.Value("float64"), "loss": datasets.Value("bool")}
    rows = [
        {"text": "a <video>", "videos": [{"path": "0.mp4", "start": 0.1, "loss": None}]},
        {"text": "b", "videos": None},
    ]
    spec = save(movies / "d", rows, text=TEXT, videos=datasets.List(video))
    with pytest.raises(ValueError, match=r"row 0, video 1: there is no video file"):
        open_records(spec, qwen.processor, cache=movies / "codes")
    assert len(open_records(spec, qwen.processor, cache=movies / "codes", data_root=movies)) == 2
    spec = save(movies / "e", [{"text": "<video>", "video": "1.mp4"}], text=TEXT, video=TEXT)
    assert len(open_records(spec, qwen.processor, cache=movies / "codes", data_root=movies)) == 1


def test_rows_that_are_no_records_are_named(movies, qwen):
    broken = chat(movies, 0) | {"videos": [{"bytes": b"<html>", "path": None}]}
    rows = [chat(movies, 0, parts=2), chat(movies, parts=1), chat(movies, 0), chat(movies) | {"messages": None}]

    def error(spec: str) -> str:
        with pytest.raises(ValueError) as found:
            open_records(spec, qwen.processor, cache=movies / "codes")
        return str(found.value)

    said = error(save(movies / "d", rows, **CHAT))
    assert said.startswith("3 bad records") and "row 0: the row holds 1 videos, and its messages have 2 parts" in said
    assert "row 1: the row holds 0 videos" in said and "row 3: neither messages nor a text" in said
    said = error(save(movies / "e", [broken, chat(movies, 0) | {"videos": [None]}], **CHAT))
    assert "row 0, video 1: does not begin like a video" in said and "video 1: the row holds no video" in said
    assert "unknown column 'caption'; known are" in error(save(movies / "f", [{"caption": "a"}], caption=TEXT))
    assert "holds no record" in error(save(movies / "g", [{"video": "a"}], video=TEXT))
    assert "has no split train, but test" in error(save(movies / "h", rows[2:3], "test", **CHAT))
