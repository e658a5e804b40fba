"""The doctor finds the damage done to a data set, and nothing in an intact one."""

import shutil
from pathlib import Path

from larp.data.datasets import DataError
from larp.data.doctor import Report, examine
from larp.data.video import write_video

import numpy as np
import pytest

RANDOM = np.random.default_rng(0)


def video(path: Path, frames: int = 16, fps: float = 25) -> Path:
    write_video(path, RANDOM.integers(0, 255, (frames, 16, 24, 3), dtype=np.uint8), fps=fps)
    return path


def look(spec: str, **options) -> Report:
    return examine(spec, workers=2, progress=False, **options)


def texts(report: Report, severity: str) -> list[str]:
    return [problem.text for problem in report.problems if problem.severity == severity]


@pytest.fixture
def ucf(tmp_path) -> Path:
    """An intact UCF-101 with two classes and two clips per class and split; Archery's first group is test."""
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for name in ("Archery", "Surfing"):
        for split, group in (("test", 1), ("train", 2)):
            for clip in (1, 2):
                stem = f"v_{name}_g{group:02d}_c{clip:02d}"
                video(tmp_path / "UCF-101" / name / f"{stem}.avi", frames=16 + clip)
                lists[split].append(f"{name}/{stem}.avi")
    (tmp_path / "ucfTrainTestlist").mkdir()
    for split, names in lists.items():
        (tmp_path / "ucfTrainTestlist" / f"{split}list01.txt").write_text("\n".join(names))
    return tmp_path


def test_a_correct_set_is_summarised(ucf):
    report = look(f"ucf101:{ucf}")
    assert report.ok and not report.problems
    said = report.describe()
    assert "train: 4 videos, 4 can be used, 2 classes (published: 9,537 in 101 classes)" in said
    assert "test: 4 videos, 4 can be used, 2 classes (published: 3,783 in 101 classes)" in said
    assert "frames: 17 to 18" in said and "frames per second: 25 (8)" in said and "pictures: 24x16 (8)" in said
    assert "codecs: h264 (8)" in said and "Archery: 2, 2" in said and said.endswith("errors: 0, warnings: 0")


def test_missing_broken_and_short_videos_are_named_with_reasons(ucf):
    folder = ucf / "UCF-101" / "Archery"
    (folder / "v_Archery_g02_c01.avi").unlink()
    (folder / "v_Archery_g02_c02.avi").write_bytes(b"no video")
    video(folder / "v_Archery_g01_c01.avi", frames=5)
    report = look(f"ucf101:{ucf}")
    assert not report.ok
    train, test = report.splits
    assert train.missing == ("Archery/v_Archery_g02_c01",) and (train.listed, train.usable) == (4, 2)
    assert train.classes == {"Archery": 0, "Surfing": 2} and test.classes == {"Archery": 1, "Surfing": 2}
    said = report.describe()
    assert "error: ucf101" in said and "train videos that cannot be read: 1 of 4" in said
    assert "  Archery/v_Archery_g02_c02: does not begin like a video file" in said
    assert "train videos without a file: 1 of 4\n  Archery/v_Archery_g02_c01\n" in said
    assert (
        "test videos that are too short: 1 of 4\n  Archery/v_Archery_g01_c01: has 5 frames, the clip needs 16" in said
    )
    assert "classes without one: 1 of 2\n  Archery\n" in said
    assert len(look(f"ucf101:{ucf}", frames=4).splits[1].short) == 0
    assert len(look(f"ucf101:{ucf}", frames=4, stride=6).splits[0].short) == 3 - 1


def test_a_group_in_both_splits_is_an_error(ucf):
    lists = ucf / "ucfTrainTestlist"
    with open(lists / "trainlist01.txt", "a") as file:
        file.write("\nArchery/v_Archery_g01_c03.avi 1")
    video(ucf / "UCF-101" / "Archery" / "v_Archery_g01_c03.avi")
    report = look(f"ucf101:{ucf}")
    assert texts(report, "error") == [f"ucf101:{ucf}: groups of UCF-101 with clips in both train and test: 1"]
    assert "\n  v_Archery_g01\n" in report.describe()


def test_equal_files_are_found_under_any_name(ucf):
    folder = ucf / "UCF-101"
    shutil.copy(folder / "Archery/v_Archery_g01_c01.avi", folder / "Surfing/v_Surfing_g02_c02.avi")
    shutil.copy(folder / "Archery/v_Archery_g02_c01.avi", folder / "Archery/v_Archery_g02_c02.avi")
    report = look(f"ucf101:{ucf}")
    said = report.describe()
    assert (
        "error: files that are in two splits, byte for byte: 1" in said and "warning: files that are there more" in said
    )
    assert "train Surfing/v_Surfing_g02_c02 = test Archery/v_Archery_g01_c01" in said and not report.ok
    assert "train Archery/v_Archery_g02_c01 = train Archery/v_Archery_g02_c02" in said


def test_kinetics_overlap_by_clip_is_an_error_and_by_source_video_a_warning(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(header + "a,aaaaaaaaaaa,0,10,train\na,bbbbbbbbbbb,0,10,train\na,g,0,10,train\n")
    (tmp_path / "val.csv").write_text(header + "a,aaaaaaaaaaa,20,30,val\na,bbbbbbbbbbb,0,10,val\n")
    for name in ("train/aaaaaaaaaaa_000000_000010", "val/aaaaaaaaaaa_000020_000030", "bbbbbbbbbbb"):
        video(tmp_path / f"{name}.mp4")
    report = look(f"k600:{tmp_path}")
    assert "train: 3 videos, 2 can be used, 1 classes (published: 392,622 in 600 classes)" in report.describe()
    assert texts(report, "error") == [
        f"k600:{tmp_path}: videos in both train and validation: 1",
        "files that are in two splits, byte for byte: 1",
    ]
    assert f"k600:{tmp_path}: YouTube videos with pieces in both train and validation: 1" in texts(report, "warning")
    assert "\n  aaaaaaaaaaa\n" in report.describe()


def test_damage_after_the_first_frame_needs_decoding(tmp_path):
    for number in range(2):
        path = video(tmp_path / f"{number}.avi", frames=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert not any("cannot be read" in text for text in texts(look(f"folder:{tmp_path}"), "error"))
    assert any("cannot be read: 1 of 1" in text for text in texts(look(f"folder:{tmp_path}", decode=True), "error"))


def test_files_are_examined_although_a_split_cannot_be_opened(ucf):
    shutil.rmtree(ucf / "ucfTrainTestlist")
    report = look(f"ucf101:{ucf}")
    assert [split.split for split in report.splits] == ["all"] and report.splits[0].usable == 8
    assert len(texts(report, "error")) == 1 and "no folder ucfTrainTestlist" in texts(report, "error")[0]


def test_long_lists_are_truncated_by_default(tmp_path):
    (tmp_path / "m.csv").write_text("path\n" + "".join(f"{number}.mp4\n" for number in range(30)))
    video(tmp_path / "0.mp4"), video(tmp_path / "1.mp4")
    report = look(f"csv:{tmp_path / 'm.csv'}")
    assert "... and" in report.describe(most=3) and "... and" not in report.describe(most=0)


def test_joined_specs_are_compared_with_each_other(tmp_path):
    for part in "ab":
        video(tmp_path / part / "x.mp4"), video(tmp_path / part / "y.mp4")
    train = next(split for split in look(f"folder:{tmp_path / 'a'}").splits if split.split == "train")
    assert train.usable == 1
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    (tmp_path / "b" / "x.mp4").rename(tmp_path / "b" / "z.mp4")
    report = look(f"folder:{tmp_path / 'a'}+folder:{tmp_path / 'b'}")
    assert [split.spec for split in report.splits] == [f"folder:{tmp_path / p}" for p in "aabb"]
    assert sum(len(problem.names) for problem in report.problems if "byte for byte" in problem.text) == 2


def test_mistakes(tmp_path):
    with pytest.raises(DataError, match="neither a path that exists"):
        look(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"workers is 0"):
        examine("shapes:", workers=0)
    with pytest.raises(ValueError, match=r"frames=0 must be at least 1"):
        look("shapes:", frames=0)
