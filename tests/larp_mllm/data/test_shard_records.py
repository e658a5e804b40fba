"""Records whose videos are members of WebDataset shards, and shards of records."""

import io
import json
import tarfile

from larp.data.video import write_video
from larp_mllm.data.records import open_records

import numpy as np
import pytest

CHAT = [
    {"role": "user", "content": [{"type": "video", "video": "001.mp4"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "Red."},
]


@pytest.fixture
def shard(tmp_path, qwen, monkeypatch):
    """Writes a shard of three samples with these .json, and returns its path."""
    monkeypatch.setenv("LARP_DATA", str(tmp_path / "home"))
    config = qwen.processor.video_tokenizer.config

    def write(*rows):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for number, row in enumerate(rows):
                frames = np.full((config.num_frames + 2, 32, 32, 3), 40 * number, np.uint8)
                write_video(tmp_path / "home.mp4", frames, fps=8)
                members = {"mp4": (tmp_path / "home.mp4").read_bytes()}
                if row is not None:
                    members["json"] = row if isinstance(row, bytes) else json.dumps(row).encode()
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{number:03d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (tmp_path / "home.mp4").unlink()
        return tmp_path / "a.tar"

    return write


def video_codes(processor, sequence) -> list[list[int]]:
    return [list(codes) for kind, codes in processor.vocabulary.split(sequence.ids) if kind == "video"]


def test_shards_of_records_give_those_of_a_jsonl_file(shard, qwen, tmp_path):
    rows = [
        {"text": "first <video>", "videos": ["000.mp4"]},
        {"messages": CHAT},
        {"text": "last <video>", "videos": ["001.mp4"]},
    ]
    path = shard(*rows)
    found = open_records(f"wds:{tmp_path}/*.tar", qwen.processor, cache=tmp_path / "codes")
    named = json.loads(json.dumps(rows).replace('"00', '"a.tar/00'))
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, named)))
    same = open_records(tmp_path / "r.jsonl", qwen.processor, cache=tmp_path / "other")
    assert len(found) == len(same) == 3 and found.names[1] == f"{path}/001.mp4: .json"
    for number in range(3):
        assert found[number].ids.tolist() == same[number].ids.tolist()
        assert found[number].labels.tolist() == same[number].labels.tolist()
    assert video_codes(qwen.processor, found[1]) == video_codes(qwen.processor, found[2])
    assert not list(tmp_path.rglob("*.mp4")), "nothing is unpacked"
    assert found.digest == same.digest, "by which a resumed run notices other records"
    shard(*rows[:2], rows[0])
    assert open_records(f"wds:{tmp_path}/*.tar", qwen.processor, cache=tmp_path / "codes").digest != found.digest


def test_bad_records_of_a_shard_are_named(shard, qwen, tmp_path):
    path = shard({"text": "<video>", "videos": ["000.mp4"]}, {"text": "<video>", "videos": ["../b.tar/000.mp4"]}, None)
    with pytest.raises(ValueError, match=r"2 bad records") as error:
        open_records(f"wds:{path}", qwen.processor, cache=tmp_path / "codes")
    assert "001.mp4: .json" in str(error.value) and "outside of the data root" in str(error.value)
    assert "002.mp4: .json is missing" in str(error.value)
    path = shard({"text": "<video>", "videos": ["009.mp4"]}, b"{", {"caption": "c"})
    with pytest.raises(ValueError, match="3 bad records") as error:
        open_records(f"wds:{path}", qwen.processor, cache=tmp_path / "codes")
    for words in ("there is no video file", "broken JSON", "unknown key 'caption'"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="no shard matches"):
        open_records(f"wds:{tmp_path}/b*.tar", qwen.processor, cache=tmp_path / "codes")
    with pytest.raises(ValueError, match="2 bad records"):
        open_records(f"wds:{shard({'text': 't'}, None, None)}", qwen.processor, cache=tmp_path / "codes")


def test_remote_shards_of_records_name_their_own_members(shard, qwen, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    rows = {"text": "<video>", "videos": ["000.mp4"]}, {"messages": CHAT}
    memory.pipe("/records-of-a-test/a.tar", shard(*rows).read_bytes())
    local = open_records(f"wds:{tmp_path}/a.tar", qwen.processor, cache=tmp_path / "codes")
    try:
        spec = "wds:memory://records-of-a-test/*.tar"
        found = open_records(spec, qwen.processor, cache=tmp_path / "other")
        assert [found[k].ids.tolist() for k in range(2)] == [local[k].ids.tolist() for k in range(2)]
        memory.pipe("/records-of-a-test/a.tar", shard({"text": "<video>", "videos": ["/etc/passwd"]}).read_bytes())
        with pytest.raises(
            ValueError, match=r"no video /etc/passwd in memory:///records-of-a-test/a\.tar: name a member"
        ):
            open_records(spec, qwen.processor, cache=tmp_path / "other")
    finally:
        memory.rm("/records-of-a-test", recursive=True)


def test_members_named_from_the_current_folder_and_what_is_wrong_with_a_shard(shard, qwen, tmp_path):
    path = shard({"text": "<video>", "videos": ["000.mp4"]}, {"text": "t", "videos": []})
    with tarfile.open(path) as tar, tarfile.open(tmp_path / "b.tar", "w") as other:  # as `tar cf b.tar .` does
        for info in tar:
            data = tar.extractfile(info)
            info.name = f"./{info.name}"
            other.addfile(info, data)
    data = (tmp_path / "b.tar").read_bytes()
    end = -(-len(data.rstrip(b"\0")) // 512) * 512
    (tmp_path / "b.tar").write_bytes(data[:end])
    found = open_records(f"wds:{tmp_path}/b.tar", qwen.processor, cache=tmp_path / "codes")
    assert len(video_codes(qwen.processor, found[0])) == 1 and "without the mark of their end" in found.notes[0]
