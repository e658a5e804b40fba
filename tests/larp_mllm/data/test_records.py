"""Records of text and videos: read, checked, encoded once."""

import json
import shutil

from larp.data.clips import frames_to_clip
from larp.data.video import read_video, write_video
from larp_mllm.data import record_codes
from larp_mllm.data.records import open_records
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.video_inputs import read_frames
from tests.larp.data.field_videos import numbered, numbers, write

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three videos of 12 frames at 4 fps, one of 3 frames, and a file that is no video."""
    folder = tmp_path_factory.mktemp("films")
    frames = np.random.default_rng(0).integers(0, 256, (3, 12, 16, 16, 3), dtype=np.uint8)
    for name, film in zip("abc", frames, strict=True):
        write_video(folder / f"{name}.mp4", film, 4)
    write_video(folder / "short.mp4", frames[0, :3], 4)
    (folder / "broken.mp4").write_bytes(b"hello")
    return folder


@pytest.fixture
def root(films, tmp_path):
    return shutil.copytree(films, tmp_path / "data")


@pytest.fixture
def read(qwen, root, tmp_path):
    """Writes records, dictionaries or lines, to data/r.jsonl and opens them with the cache folder codes."""

    def read(*records, **options):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (root / "r.jsonl").write_text("\n".join(lines) + "\n")
        options = {"cache": tmp_path / "codes"} | options
        return open_records(root / "r.jsonl", qwen.processor, **options)

    return read


def codes(qwen, path, start, stride=1):
    frames = read_video(path, start, 4, stride)[0]
    return qwen.processor.video_tokenizer.encode(frames_to_clip(frames, 16, 16)[None])[0].tolist()


def spans(qwen, sequence):
    return [content for kind, content in qwen.model.vocabulary.split(sequence.ids) if kind == "video"]


def learned(qwen, sequence):
    """Return the learned text and the number of learned codes."""
    vocabulary = qwen.model.vocabulary
    scored = [id for id in sequence.labels.tolist() if id != IGNORE]
    text = qwen.processor.tokenizer.decode([id for id in scored if vocabulary.is_text(id)])
    return text, sum(vocabulary.is_code(id) for id in scored)


def chat(*content, answer="a person surfing"):
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]}


def test_text_with_placeholders(qwen, read, root):
    records = read({"text": "a red <video> then <video>.", "videos": ["a.mp4", {"path": "b.mp4", "start": 1.0}]})
    assert len(records) == 1
    assert records.names == (f"{root}/r.jsonl:1",)
    shown = qwen.model.vocabulary.split(records[0].ids)
    assert [kind for kind, _ in shown] == ["text", "video", "text", "video", "text"]
    assert [qwen.processor.tokenizer.decode(shown[k][1]) for k in (0, 2)] == ["a red ", " then "]
    assert spans(qwen, records[0]) == [codes(qwen, root / "a.mp4", 4), codes(qwen, root / "b.mp4", 4)]
    assert learned(qwen, records[0])[1] == 8
    assert records[0].labels[-1] == qwen.processor.layout.eos
    assert records.videos == ({root / "a.mp4", root / "b.mp4"},)


def test_start_and_stride_select_the_frames(qwen, read, root):
    record = {"text": "<video>", "videos": [{"path": "a.mp4", "start": 0.5}]}
    assert spans(qwen, read(record)[0]) == [codes(qwen, root / "a.mp4", 2)]
    assert spans(qwen, read(record, stride=2)[0]) == [codes(qwen, root / "a.mp4", 2, 2)]
    # of 12 frames, 7 are reached over at stride 2
    assert spans(qwen, read({"text": "<video>", "videos": ["a.mp4"]}, stride=2)[0]) == [
        codes(qwen, root / "a.mp4", 2, 2)
    ]


def test_start_goes_by_time_where_the_frame_rate_varies(qwen, read, root):
    """Twelve frames in the first second, then one each half second: the average rate would say frame 24 of 30."""
    path = write(root / "slow.mp4", numbered(30), 12, seconds=lambda k: k / 12 if k < 12 else 1 + (k - 12) / 2)
    record = {"text": "<video>", "videos": [{"path": "slow.mp4", "start": 5}]}
    assert spans(qwen, read(record)[0]) == [codes(qwen, path, 20)]
    shown = qwen.processor.video_of({"type": "video", "path": path, "start": 5})
    assert numbers(shown, 30) == [20, 21, 22, 23]
    # Without a start, the middle of the time, 5.25 seconds.
    assert spans(qwen, read({"text": "<video>", "videos": ["slow.mp4"]})[0]) == [codes(qwen, path, 18)]
    assert numbers(read_frames(path, 4, 1).numpy(), 30)[0] == 18


def test_loss_flags_of_a_record_and_its_videos(qwen, read):
    def flags(loss, *videos):
        videos = [{"path": "a.mp4"} | ({} if video is None else {"loss": video}) for video in videos]
        given = {"text": "a<video>b<video>", "videos": videos} | ({} if loss is None else {"loss": loss})
        return learned(qwen, read(given)[0])

    assert flags(None, None, False) == ("ab", 4)
    assert flags(False, None, True) == ("", 4)
    assert flags(True, False, False) == ("ab", 0)
    with pytest.raises(ValueError, match=r"r.jsonl:1: nothing in it is learned"):
        flags(False, None, None)


def test_messages_with_videos(qwen, read, root):
    reply = [{"type": "video", "path": "b.mp4", "start": 2}]
    records = read(
        chat({"type": "text", "text": "what <video>"}, {"type": "video", "video": "a.mp4"}),
        chat({"type": "text", "text": "a red circle"}, answer=reply),
    )
    eos = qwen.processor.tokenizer.eos_token
    assert spans(qwen, records[0]) == [codes(qwen, root / "a.mp4", 4)]
    assert learned(qwen, records[0]) == (f" a person surfing{eos}", 0)
    assert "what <video>" in qwen.processor.tokenizer.decode(qwen.model.vocabulary.split(records[0].ids)[0][1])
    assert spans(qwen, records[1]) == [codes(qwen, root / "b.mp4", 8)]
    assert learned(qwen, records[1]) == (eos, 4)


def test_loss_of_a_chat_of_its_messages_and_of_their_parts(qwen, read):
    eos = qwen.processor.tokenizer.eos_token

    def flags(record=None, asked=None, answered=None, part=None):
        def given(loss):
            return {} if loss is None else {"loss": loss}

        answer = [{"type": "text", "text": "a person surfing", **given(part)}]
        messages = [
            {"role": "user", "content": "a red circle", **given(asked)},
            {"role": "assistant", "content": answer, **given(answered)},
            {"role": "assistant", "content": [{"type": "text", "text": "moving left", "loss": True}]},
        ]
        return learned(qwen, read({"id": 7, "messages": messages} | given(record))[0])[0]

    last = f" moving left{eos}"
    assert flags() == flags(record=True) == f" a person surfing{eos}" + last
    assert flags(record=False) == flags(answered=False) == flags(part=False) == last
    assert flags(record=False, answered=True) == flags(record=False, part=True) == flags()
    assert flags(answered=True, part=False) == last, "a part goes before its message"
    assert flags(asked=True, record=False) == " a red circle" + last
    with pytest.raises(ValueError, match=r"r.jsonl:1: nothing in it is learned"):
        read(chat({"type": "text", "text": "a red circle"}) | {"loss": False})
    with pytest.raises(ValueError, match=r'r.jsonl:1: "loss" must be true or false, got 1'):
        read(chat({"type": "text", "text": "a red circle"}) | {"loss": 1})


def test_a_video_that_is_too_short_for_a_stride_is_an_error(read):
    with pytest.raises(ValueError, match=r"a.mp4: has 12 frames, the clip needs 31: lower --stride, or leave"):
        read({"text": "<video>", "videos": ["a.mp4"]}, stride=10)
    with pytest.raises(ValueError, match=r'a.mp4: .*: lower its "start" or lower --stride, or leave'):
        read({"text": "<video>", "videos": [{"path": "a.mp4", "start": 2}]}, stride=2)
    with pytest.raises(ValueError, match=r"a.mp4: .* holds 12: lower --stride, or leave"):
        read({"text": "<video>", "videos": [{"path": "a.mp4", "start": 1}]}, stride=10)


def test_a_video_is_encoded_once(qwen, read, root, tmp_path, monkeypatch):
    encoded = []
    encode = type(qwen.processor.video_tokenizer).encode

    def counted(self, clips, *rest, **options):
        encoded.append(len(clips))
        return encode(self, clips, *rest, **options)

    monkeypatch.setattr(type(qwen.processor.video_tokenizer), "encode", counted)
    two = {"text": "<video><video>", "videos": ["a.mp4", "b.mp4"]}
    first = read(two, two, {"text": "a<video>", "videos": [{"path": "./a.mp4"}]})
    assert sum(encoded) == 2
    again = read(two, {"text": "<video>", "videos": ["c.mp4"]})
    assert sum(encoded) == 3, "only what is new is encoded"
    assert again[0].ids.equal(first[0].ids)
    assert not list((tmp_path / "codes").glob("*.part")), "files appear whole"
    shutil.copy(root / "c.mp4", root / "a.mp4")
    assert spans(qwen, read(two)[0])[0] == spans(qwen, again[1])[0], "a replaced video is encoded again"
    read({"text": "<video>", "videos": ["a.mp4"]}, stride=2)
    assert sum(encoded) == 5


def test_an_interrupted_encoding_is_continued(qwen, read, monkeypatch, tmp_path):
    monkeypatch.setattr(record_codes, "_CHUNK", 1)
    three = [{"text": "<video>", "videos": [f"{name}.mp4"]} for name in "abc"]
    write, written = record_codes._write_cache, []

    def interrupted(path, found):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, found)

    monkeypatch.setattr(record_codes, "_write_cache", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(*three)
    monkeypatch.setattr(record_codes, "_write_cache", lambda path, found: (written.append(path), write(path, found)))
    assert len(read(*three)) == 3
    assert len(written) == 3, "the two that were there are not written again"


def test_a_damaged_file_of_codes_is_named(read, tmp_path):
    record = {"text": "<video>", "videos": ["a.mp4"]}
    read(record)
    (path,) = (tmp_path / "codes").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .*delete this file"):
        read(record)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written to .*choose another folder"):
        read(record, cache=tmp_path / "file" / "codes")


def video(name, **more):
    return {"text": "<video>", "videos": [{"path": name} | more]}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("hello", "broken JSON: Expecting value at column 1"),
        ("[" * 100_000, "broken JSON"),
        ("[1]", "a record must be an object"),
        ("{}", "a record must be an object"),
        ({"videos": ["a.mp4"]}, "neither messages nor a text"),
        ({"text": " "}, "the record is empty"),
        ({"text": 5}, "text must be a text, got 5"),
        ({"text": "\ud800"}, "half a character"),
        ({"text": "a", "loss": "no"}, '"loss" must be true or false'),
        ({"text": "a", "video": []}, "unknown key 'video'; known are id, loss, text, videos"),
        ({"text": "a", "messages": []}, "unknown key 'text'; known are id, loss, messages"),
        ({"text": "a", "videos": "a.mp4"}, "videos must be a list, got str"),
        ({"text": "<video>"}, "1 <video> placeholders but 0 videos"),
        ({"text": "<video>", "videos": ["a.mp4", "b.mp4"]}, "1 <video> placeholders but 2 videos"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "message 1: the role must be one of"),
        (
            chat({"type": "video", "video": "no.mp4"}),
            r"message 1: there is no video file .*no.mp4: names are relative to",
        ),
        (video(None), "video 1: a video must be the name of a file, got None"),
        (video(["a.mp4"]), "must be the name of a file"),
        (video("a.mp4\0"), "must be the name of a file"),
        (video("a" * 5000), "cannot be found"),
        (video("."), "there is no video file"),
        (video("a.mp4", end=2), "unknown key 'end'"),
        (video("a.mp4", start=-1), '"start" must be a number of seconds'),
        (video("a.mp4", start=True), '"start" must be a number of seconds'),
        (video("a.mp4", start=float("nan")), '"start" must be a number of seconds'),
        (video("a.mp4", start=10**400), '"start" must be a number of seconds from 0 to 1e.08, got 1000'),
        (video("a.mp4", start=1e300), '"start" must be a number of seconds'),
        (video("a.mp4", start=9e7), r'video holds 12: lower its "start", or leave the record out'),
        (video("https://example.org/a.mp4"), "looks like a URL or protocol, and none is opened: download"),
        (video("file:a.mp4"), "looks like a URL"),
        (video("concat:a.mp4|b.mp4"), "looks like a URL"),
        (video("../outside.mp4"), r"outside of the data root .*--allow-outside"),
        (video("/etc/hostname"), "outside of the data root"),
        (video("link.mp4"), "outside of the data root"),
        (video("circle.mp4"), "circle.mp4 cannot be found"),
        (video("broken.mp4"), r"broken.mp4: does not begin like a video.*repair the video, or leave the record out"),
        (
            video("short.mp4"),
            r"short.mp4: has 3 frames, the clip needs 4: give a longer video, or leave the record out",
        ),
        (video("short.mp4", start=0.25), r"the video holds 3: give a longer video, or leave"),
        (
            video("a.mp4", start=2.5),
            r"a.mp4: asked for 4 frames from frame 10, but the video holds 12: lower its .start., or leave",
        ),
    ],
)
def test_bad_records_are_errors_with_a_remedy(read, root, record, said):
    shutil.copy(root / "a.mp4", root.parent / "outside.mp4")
    (root / "link.mp4").symlink_to(root.parent / "outside.mp4")
    (root / "circle.mp4").symlink_to(root / "circle.mp4")
    good = {"text": "a<video>", "videos": ["a.mp4"]}
    with pytest.raises(ValueError, match=rf"^{root}/r.jsonl:2\b(?s:.*)({said})"):
        read(good, record, good)


def test_videos_outside_of_the_root_can_be_allowed_or_the_root_moved(qwen, read, root, tmp_path):
    shutil.copy(root / "a.mp4", tmp_path / "outside.mp4")
    (root / "link.mp4").symlink_to("a.mp4")
    expected = [codes(qwen, root / "a.mp4", 4)]
    assert spans(qwen, read(video("../outside.mp4"), allow_outside=True)[0]) == expected
    assert spans(qwen, read(video("outside.mp4"), data_root=tmp_path)[0]) == expected
    assert spans(qwen, read(video("link.mp4"))[0]) == expected, "a link that stays inside is fine"
    with pytest.raises(ValueError, match=r"--data-root .*no such folder"):
        read(video("a.mp4"), data_root=tmp_path / "nowhere")


def test_the_first_bad_records_are_listed_and_the_others_counted(read):
    with pytest.raises(ValueError, match=r"7 bad records:(?s:.*)r.jsonl:5(?s:.*)\.\.\. and 2 more") as caught:
        read(*["x"] * 7)
    assert "r.jsonl:6" not in str(caught.value)


def test_a_record_longer_than_the_model_is_an_error(read):
    long = {"text": "b " * 40 + "<video>", "videos": ["a.mp4"]}
    length = len(read(long)[0].ids)
    assert len(read(long, positions=length)[0].ids) == length
    shorter = rf"r.jsonl:1: {length} ids, but the base model has {length - 1} positions: shorten the text$"
    with pytest.raises(ValueError, match=shorter):
        read(long, positions=length - 1)
    with pytest.raises(ValueError, match=r"20 positions: give it fewer videos \(6 ids each\)$"):
        read({"text": "<video>" * 12, "videos": ["a.mp4"] * 12}, positions=20)


def test_empty_and_missing_files_are_errors(qwen, read, tmp_path):
    with pytest.raises(ValueError, match=r"r.jsonl: holds no record; a line is"):
        read("", " ")
    with pytest.raises(ValueError, match=r"there is no file .*no.jsonl"):
        open_records(tmp_path / "no.jsonl", qwen.processor, cache=tmp_path)


def test_several_files_each_have_their_own_root(qwen, root, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        shutil.copy(root / "a.mp4", tmp_path / name / "film.mp4")
        (tmp_path / name / "r.jsonl").write_bytes(json.dumps(video("film.mp4")).encode() + b"\r\n")
    records = open_records([tmp_path / "x/r.jsonl", tmp_path / "y/r.jsonl"], qwen.processor, cache=tmp_path / "codes")
    assert records.names == (f"{tmp_path}/x/r.jsonl:1", f"{tmp_path}/y/r.jsonl:1")
    assert torch.equal(records[0].ids, records[1].ids)
