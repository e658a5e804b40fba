"""Packs of clips: they unpack to their contents with either decoder, and damaged packs are refused in one line."""

import json
import os
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

from larp.data.clip_pack import PackOptions, pack_clips
from larp.data.clip_unpack import unpack_clips
from larp.data.clips import resize_frames
from larp.data.datasets import open_videos
from larp.data.listing import DataError, NoSplitError
from larp.data.video import VideoError, read_video, write_video
from larp_mllm.cli import main

import numpy as np
import pytest

UCF = "UCF-101/{0}/v_{0}_g{1:02d}_c{2:02d}.mp4"
TINY = PackOptions(size=32, max_frames=12, held_out_frames=4, crf=12)


def moving(seed: int, frames: int = 20, height: int = 40, width: int = 48) -> np.ndarray:
    """A coloured square on a gradient, asymmetric in space, colour and time."""
    ramp = np.linspace(30, 200, width).astype(np.uint8)
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = np.stack([ramp, np.roll(ramp, 5 * seed), ramp[::-1]], axis=-1)
    for t in range(frames):
        video[t, 10:26, 4 + t : 20 + t] = (210, 60, 40 + 10 * seed)
    return video


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """UCF-101 with two classes, and a folder of other captioned clips, one of them broken."""
    root = tmp_path_factory.mktemp("data")
    lists = root / "ucf/ucfTrainTestlist"
    lists.mkdir(parents=True)
    train, test = [], []
    for number, name in enumerate(("Surfing", "Archery")):
        for group in (3, 8, 9):
            write_video(root / "ucf" / UCF.format(name, group, 1), moving(10 * number + group), fps=25)
            (test if group == 3 else train).append(f"{name}/v_{name}_g{group:02d}_c01.avi")
    (lists / "trainlist01.txt").write_text("".join(f"{line} 1\n" for line in train))
    (lists / "testlist01.txt").write_text("".join(f"{line}\n" for line in test))
    write_video(root / "more/a dog.mp4", moving(1), fps=12)
    write_video(root / "more/short.mp4", moving(2, frames=3), fps=30)
    (root / "more/broken.mp4").write_bytes(b"nothing of a video")
    rows = [
        {"path": "a dog.mp4", "class": "dogs", "caption": "a dog"},
        {"path": "short.mp4", "class": "rest", "group": "s"},
        {"path": "broken.mp4", "class": "rest"},
    ]
    (root / "more/clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def pack(home) -> Path:
    path = home / "box.clips"
    report = pack_clips([f"ucf101:{home / 'ucf'}", f"jsonl:{home / 'more/clips.jsonl'}"], path, TINY)
    assert report.clips == {"train": 4, "validation": 2, "test": 2} and report.bytes == path.stat().st_size
    assert report.frames == 2 * 12 + 2 * 4 + 2 * 4 + 12 + 3 and report.psnr > 35
    assert [name for name, _ in report.skipped] == ["broken.mp4"]
    return path


def rewritten(pack: Path, to: Path, member: str, change) -> Path:
    """A copy of a pack, valid as a zip file, with one member changed."""
    with zipfile.ZipFile(pack) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name == member else data)
    return to


def test_a_pack_keeps_splits_labels_and_captions(pack, tmp_path):
    assert unpack_clips(pack, tmp_path / "box").fresh
    spec = f"jsonl:{tmp_path / 'box/clips.jsonl'}"
    train = open_videos(spec, "train")
    assert train.classes == ("Archery", "Surfing")
    assert [(item.name, item.label, item.caption, item.group) for item in train.items] == [
        ("Archery/v_Archery_g08_c01.npy", 0, "archery", "v_Archery_g08"),
        ("Surfing/v_Surfing_g08_c01.npy", 1, "surfing", "v_Surfing_g08"),
        ("a_dog.npy", None, "a dog", None),
        ("short.npy", None, None, "s"),
    ]
    assert [item.group for item in open_videos(spec, "validation").items] == ["v_Archery_g09", "v_Surfing_g09"]
    assert [item.group for item in open_videos(spec, "test").items] == ["v_Archery_g03", "v_Surfing_g03"]
    rows = [json.loads(line) for line in (tmp_path / "box/clips.jsonl").read_text().splitlines()]
    assert [(row["frames"], row["fps"]) for row in rows[-2:]] == [(12, 12.0), (3, 30.0)]
    labelled = open_videos(f"jsonl:{tmp_path / 'box/labelled.jsonl'}", "all")
    assert len(labelled) == 6 and None not in [item.label for item in labelled.items]


def test_videos_of_more_are_unlabelled_training_videos(home, tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path / "data"))
    more = [f"jsonl:{home / 'more/clips.jsonl'}", "shapes:count=6,size=16"]
    report = pack_clips([f"ucf101:{home / 'ucf'}"], tmp_path / "box.clips", TINY, more=more)
    assert report.clips == {"train": 2 + 2 + 6, "validation": 2, "test": 2}
    unpack_clips(tmp_path / "box.clips", tmp_path / "box")
    whole, labelled = (
        open_videos(f"jsonl:{tmp_path / 'box' / name}", "train") for name in ("clips.jsonl", "labelled.jsonl")
    )
    assert whole.classes == labelled.classes == ("Archery", "Surfing") and len(labelled) == 2
    assert sum(item.label is None and bool(item.caption) for item in whole.items) == 7


def test_the_frames_are_the_middle_ones_resized(home, pack, tmp_path):
    unpack_clips(pack, tmp_path / "box", decoder="pyav")
    unpack_clips(pack, tmp_path / "small", size=16, workers=1, decoder="pyav")
    for name, first, count in (("Archery/v_Archery_g08_c01", 4, 12), ("Surfing/v_Surfing_g03_c01", 8, 4)):
        packed = np.load(tmp_path / f"box/{name}.npy")
        source = resize_frames(read_video(home / f"ucf/UCF-101/{name}.mp4", first, count)[0], 32, 32)
        assert packed.shape == source.shape and packed.dtype == np.uint8
        assert np.abs(packed.astype(int) - source).mean() < 3
        assert np.array_equal(np.load(tmp_path / f"small/{name}.npy"), resize_frames(packed, 16, 16))


def test_both_decoders_give_the_same_frames(pack, tmp_path):
    pytest.importorskip("cv2")
    for decoder in ("pyav", "opencv"):
        unpack_clips(pack, tmp_path / decoder, decoder=decoder)
    files = sorted((tmp_path / "pyav").rglob("*.npy"))
    assert len(files) == 8
    for file in files:
        other = np.load(tmp_path / "opencv" / file.relative_to(tmp_path / "pyav"))
        assert np.abs(np.load(file).astype(int) - other).max() <= 2


def test_real_clips_come_back(clips_root, tmp_path):
    source = sorted((clips_root / "ucf101/UCF-101/Surfing").glob("*.mp4"))[:2]
    (tmp_path / "two").mkdir()
    for path in source:
        (tmp_path / "two" / path.name).symlink_to(path)
    report = pack_clips([f"folder:{tmp_path / 'two'}"], tmp_path / "two.clips", PackOptions(size=64, max_frames=24))
    assert report.clips == {"train": 2} and report.psnr > 34
    decoders = ["pyav"]
    try:
        import cv2  # noqa: F401

        decoders.append("opencv")
    except ImportError:
        pass
    for decoder in decoders:
        unpack_clips(tmp_path / "two.clips", tmp_path / decoder, decoder=decoder)
        frames = np.load(tmp_path / decoder / f"{source[0].stem}.npy")
        assert frames.shape == (24, 64, 64, 3)


def test_a_second_call_leaves_a_complete_folder_unchanged(pack, tmp_path):
    unpack_clips(pack, tmp_path / "box")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "box").rglob("*")}
    assert not unpack_clips(pack, tmp_path / "box").fresh
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "box").rglob("*")}
    with pytest.raises(DataError, match="holds something else: delete it"):
        unpack_clips(pack, tmp_path / "box", size=16)


@pytest.mark.parametrize("name", ["short.npy", "clips.jsonl", "labelled.jsonl"])
def test_a_second_call_finds_missing_and_changed_files(pack, tmp_path, name):
    unpack_clips(pack, tmp_path / "box")
    file = tmp_path / "box" / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{name}: has changed since it was unpacked: delete the folder"):
        unpack_clips(pack, tmp_path / "box")
    file.unlink()
    with pytest.raises(DataError, match=f"{name}: is gone or cannot be read: delete the folder"):
        unpack_clips(pack, tmp_path / "box")
    file.write_bytes(data)
    assert not unpack_clips(pack, tmp_path / "box").fresh


def test_an_empty_folder_is_accepted(pack, tmp_path):
    (tmp_path / "box").mkdir()
    assert unpack_clips(pack, tmp_path / "box").clips == 8


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def wandering(data: bytes) -> bytes:
    return data.replace(b'"path": "short.mp4"', b'"path": "../short.mp4"')


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda pack, to: rewritten(pack, to, "short.mp4", flip), r"short\.mp4 has another hash"),
        (lambda pack, to: rewritten(pack, to, "clips.jsonl", wandering), r"line 8 of its clips\.jsonl"),
        (lambda pack, to: rewritten(pack, to, "clips.jsonl", lambda data: data[:-9]), r"line 8 of its clips\.jsonl"),
        (lambda pack, to: rewritten(pack, to, "clips.jsonl", lambda data: b""), "holds no clip"),
        (lambda pack, to: to.write_bytes(pack.read_bytes()[:-100]), "cut or damaged"),
        (lambda pack, to: to.write_bytes(pack.read_bytes()[:5000]), "cut or damaged"),
        (lambda pack, to: to.write_bytes(b""), "cut or damaged"),
        (lambda pack, to: to.write_bytes(2 * pack.read_bytes()), "another file lies before it"),
        (lambda pack, to: to.mkdir(), "cannot be read: is a directory"),
        (lambda pack, to: None, "no such file"),
    ],
)
def test_a_damaged_pack_gives_one_line_and_leaves_no_files(pack, tmp_path, capsys, spoil, reason):
    bad = tmp_path / "bad.clips"
    spoil(pack, bad)
    with pytest.raises(DataError, match=reason) as caught:
        unpack_clips(bad, tmp_path / "box")
    assert "bad.clips" in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.clips"}
    with pytest.raises(SystemExit):
        main(["unpack-clips", str(bad), "-o", str(tmp_path / "box")])
    assert capsys.readouterr().err.splitlines()[-1] == f"larp-mllm: {caught.value}"


def test_a_damaged_clip_is_named(pack, tmp_path):
    data = bytearray(pack.read_bytes())
    with zipfile.ZipFile(pack) as archive:
        place = archive.getinfo("short.mp4").header_offset + 200
    data[place : place + 50] = bytes(50)
    (tmp_path / "bad.clips").write_bytes(data)
    with pytest.raises(DataError, match=r"short\.mp4 is missing or damaged"):
        unpack_clips(tmp_path / "bad.clips", tmp_path / "box")


def test_a_clip_of_another_length_is_refused(pack, tmp_path):
    def longer(data: bytes) -> bytes:
        return data.replace(b'"frames": 3', b'"frames": 4')

    bad = rewritten(pack, tmp_path / "bad.clips", "clips.jsonl", longer)
    with pytest.raises(DataError, match=r"short\.mp4 decodes to \(3, 32, 32, 3\) where 4 frames were packed"):
        unpack_clips(bad, tmp_path / "box")


def test_packing_refuses_unusable_input(home, tmp_path):
    more = f"folder:{home / 'more'}"
    with pytest.raises(DataError, match="would be packed under the name of"):
        pack_clips([more, more], tmp_path / "x.clips")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/x.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"none of 1 videos can be packed; the first, x\.mp4"):
        pack_clips([f"folder:{tmp_path / 'none'}"], tmp_path / "x.clips")
    for wrong in ({"size": 8}, {"max_frames": 0}, {"held_out_frames": 0}, {"crf": 52}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PackOptions(**wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["none"]


def test_a_copy_of_a_held_out_video_is_left_out_of_training(home, tmp_path):
    (tmp_path / "small").mkdir()
    shutil.copy(home / "ucf" / UCF.format("Surfing", 3, 1), tmp_path / "small/a.mp4")
    shutil.copy(home / "ucf" / UCF.format("Surfing", 8, 1), tmp_path / "small/b.mp4")
    report = pack_clips(
        [f"ucf101:{home / 'ucf'}", f"folder:{tmp_path / 'small'}"], tmp_path / "x.clips", TINY, workers=2
    )
    reason = "the train video is Surfing/v_Surfing_g03_c01 of split test, byte for byte"
    assert report.skipped == (("a.mp4", reason),) and report.clips == {"train": 3, "validation": 2, "test": 2}


def test_an_unwritable_destination_is_reported_before_the_work(home, pack, tmp_path, monkeypatch):
    monkeypatch.setattr("larp.data.clip_pack._encode", None)
    monkeypatch.setattr("larp.data.clip_unpack._unpack", None)
    (tmp_path / "file").touch()
    spec = f"folder:{home / 'more'}"
    with pytest.raises(DataError, match=f"^{tmp_path}: is a folder: give the name of a file$"):
        pack_clips([spec], tmp_path)
    for work, source in ((pack_clips, [spec]), (unpack_clips, pack)):
        with pytest.raises(DataError, match=f"^{tmp_path}/file/x: cannot be written: {tmp_path}/file is a file"):
            work(source, tmp_path / "file/x")
        with pytest.raises(ValueError, match="workers is 0"):
            work(source, tmp_path / "x", workers=0)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1000))
    for work, source in ((pack_clips, [spec]), (unpack_clips, pack)):
        with pytest.raises(DataError, match=f"^{tmp_path}/x: needs 0.[0-9] MB, and {tmp_path} has 0.0 MB left"):
            work(source, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_with_path_and_reason(home, pack, tmp_path, monkeypatch):
    def full(path, *_, **__) -> int:
        with open("/dev/full", "wb", buffering=0) as file:
            return file.write(b"x")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match=f"^{tmp_path}/x: cannot be written: no space left on device$"):
            unpack_clips(pack, tmp_path / "x")
    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(DataError, match=f"^{tmp_path}/x: cannot be written: no space left on device$"):
        pack_clips([f"folder:{home / 'more'}"], tmp_path / "x", TINY)
    assert not any(tmp_path.iterdir())


def test_the_commands_report_their_results(home, tmp_path, capsys):
    out = tmp_path / "more.clips"
    main(["pack-clips", "--data", f"folder:{home / 'more'}", "-o", str(out), "--size", "32", "--max-frames", "5"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("left out: broken.mp4: ") and ": 2 train clips, 8 frames of 32x32, " in said[1].replace(
        f"{out.stat().st_size} bytes, ", ""
    )
    note = "note: no clip is for test: a training on them needs other clips with --eval-data"
    assert said[2:] == ["note: 2 clips have fewer than 16 frames, too few for most models, such as a_dog.mp4", note]
    for state in ("", ", as before"):
        main(["unpack-clips", str(out), "-o", str(tmp_path / "more")])
        assert capsys.readouterr().out == f"{tmp_path / 'more'}: 2 clips, 8 frames{state}\n{note}\n"
    with pytest.raises(NoSplitError, match="no line has split test, all have train: give other data with --eval-data"):
        open_videos(f"jsonl:{tmp_path / 'more/clips.jsonl'}", "test")
    with pytest.raises(DataError, match=f"is a pack of clips: larp-mllm unpack-clips {out} -o DIR"):
        open_videos(str(out))
    assert not (tmp_path / "more/labelled.jsonl").exists()
