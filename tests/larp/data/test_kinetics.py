"""Kinetics-600 in its common layouts, incomplete and damaged."""

from pathlib import Path

from larp.data.clips import ClipShape
from larp.data.datasets import DataError, NoSplitError, open_videos
from larp.data.loader import iterate_once
from larp.data.video import write_video

import numpy as np
import pytest

HEADER = "label,youtube_id,time_start,time_end,split\n"
TRAIN = (
    HEADER + "surfing water,aaaaaaaaaaa,10,20,train\nabseiling,-bbbbbb_bbb,0,10,train\n"
    "shooting goal (soccer),ccccccccccc,3,13,train\nabseiling,gone_______,5,15,train\n"
)
VALIDATE = HEADER + "abseiling,ddddddddddd,1,11,val\nsurfing water,gone2______,2,12,val\n"
TEST = "youtube_id,time_start,time_end,split\neeeeeeeeeee,7,17,test\n"
CLASSES = ("abseiling", "shooting goal (soccer)", "surfing water")
VIDEO = np.zeros((4, 16, 16, 3), np.uint8)


def make(root: Path, *names: str) -> Path:
    for name in names:
        write_video(root / name, VIDEO, 25)
    return root


def write_lists(folder: Path, names=("train.csv", "validate.csv", "test.csv")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (TRAIN, VALIDATE, TEST), strict=True):
        (folder / name).write_text(text)


CLASS_FOLDERS = (
    "train/surfing water/aaaaaaaaaaa_000010_000020.mp4",
    "train/abseiling/-bbbbbb_bbb_000000_000010.mkv",
    "train/shooting_goal_-soccer-/ccccccccccc.MOV",
    "val/abseiling/ddddddddddd_000001_000011.mp4",
    "test/eeeeeeeeeee_000007_000017.mp4",
    "val/abseiling/unlisted.mp4",
)
FLAT = ("aaaaaaaaaaa_10_20.mp4", "-bbbbbb_bbb.mp4", "ccccccccccc.avi", "ddddddddddd.mp4", "eeeeeeeeeee.mp4", "x.mp4")


@pytest.mark.parametrize("files", [CLASS_FOLDERS, FLAT], ids=["folders", "flat"])
@pytest.mark.parametrize(
    "lists", [("", ("train.csv", "validate.csv", "test.csv")), ("annotations", ("kinetics-600_train.csv", "k600_val.csv", "kinetics_600_test.csv"))]
)  # fmt: skip
def test_the_published_annotation_in_every_layout(tmp_path, files, lists):
    write_lists(make(tmp_path, *files) / lists[0], lists[1])
    train, validation, test = (open_videos(f"k600:{tmp_path}", split) for split in ("train", "validation", "test"))
    assert train.classes == validation.classes == test.classes == CLASSES
    assert [item.name for item in train.items] == [
        "aaaaaaaaaaa_000010_000020",
        "-bbbbbb_bbb_000000_000010",
        "ccccccccccc_000003_000013",
    ]
    assert [item.label for item in train.items] == [2, 0, 1]
    assert [item.caption for item in train.items] == ["surfing water", "abseiling", "shooting goal (soccer)"]
    assert train.missing == ("gone________000005_000015",) and train.published == (392_622, 600)
    assert "1 of 4 listed train videos are missing, such as gone________000005" in train.notes[0]
    assert "1 files are in no list and left out" in train.notes[1]
    assert [(item.name[:11], item.label) for item in validation.items] == [("ddddddddddd", 0)]
    assert validation.missing == ("gone2_______000002_000012",)
    assert [(item.label, item.caption) for item in test.items] == [(None, None)]
    assert len(open_videos(f"k600:{tmp_path}", "all")) == 5
    batch = next(iter(iterate_once(train, ClipShape(4, 8, 8), 3)))
    assert batch["clip"].shape == (3, 3, 4, 8, 8) and batch["label"].tolist() == [2, 0, 1]


def test_lists_and_videos_may_be_in_different_folders(tmp_path):
    write_lists(tmp_path / "lists")
    make(tmp_path / "videos", *FLAT)
    assert len(open_videos(f"k600:{tmp_path / 'lists'},videos={tmp_path / 'videos'}", "train")) == 3
    one = open_videos(f"k600:{tmp_path / 'lists' / 'validate.csv'},videos={tmp_path / 'videos'}", "validation")
    assert len(one) == 1 and one.classes == ("abseiling", "surfing water")
    with pytest.raises(DataError, match=r"none of the 4 listed train videos is below .*lists.*,videos=DIR"):
        open_videos(f"k600:{tmp_path / 'lists'}", "train")


def test_validation_replaces_test_only_on_request(tmp_path):
    write_lists(make(tmp_path, *FLAT))
    (tmp_path / "test.csv").unlink()
    with pytest.raises(NoSplitError, match=r"no test split; choose train, validation, or add ,test=validation"):
        open_videos(f"k600:{tmp_path}", "test")
    spec = f"k600:{tmp_path},test=validation"
    test = open_videos(spec, "test")
    assert [item.name[:11] for item in test.items] == ["ddddddddddd"] and test.published == (30_000, 600)
    with pytest.raises(NoSplitError, match="has no validation split"):
        open_videos(spec, "validation")
    with pytest.raises(DataError, match="test='val'; choose test or validation"):
        open_videos(f"k600:{tmp_path},test=val", "test")


def test_a_clip_in_two_lists_is_found_in_the_folder_of_its_split(tmp_path):
    write_lists(make(tmp_path, "train/a/aaaaaaaaaaa_000010_000020.mp4", "val/a/aaaaaaaaaaa_000010_000020.mp4"))
    (tmp_path / "validate.csv").write_text(HEADER + "surfing water,aaaaaaaaaaa,10,20,val\n" * 2)
    train, validation = (open_videos(f"k600:{tmp_path}", split) for split in ("train", "validation"))
    assert "train" in train.items[0].path.parts and "val" in validation.items[0].path.parts
    assert "1 lines of the validation split name a video again" in validation.notes[0] and len(validation) == 1


@pytest.mark.parametrize(
    "text", ["path,label\nv/a.mp4,surfing\nv/b c,d.mp4,9\n", "v/a.mp4 3\nv/b c,d.mp4,9\ngone.mp4 1\n"]
)
def test_lists_of_path_and_label(tmp_path, text):
    make(tmp_path, "v/a.mp4", "v/b c,d.mp4")
    text = text.replace("path,label\nv/a.mp4,surfing\nv/b c,d.mp4,9", 'path,label\nv/a.mp4,surfing\n"v/b c,d.mp4",9')
    (tmp_path / "train.csv").write_text(text)
    videos = open_videos(f"k600:{tmp_path}", "train")
    assert [item.path for item in videos.items] == [tmp_path / "v/a.mp4", tmp_path / "v/b c,d.mp4"]
    assert {videos.classes[item.label] for item in videos.items} in ({"surfing", "9"}, {"3", "9"})
    assert videos.missing == (("gone.mp4",) if "gone" in text else ())


def test_a_single_list_splits_by_its_column_or_by_a_hash(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "mine.csv").write_text("path,label,split\na.mp4,x,train\nb.mp4,y,validate\n")
    spec = f"k600:{tmp_path / 'mine.csv'}"
    assert [item.name for item in open_videos(spec, "validation").items] == ["b.mp4"]
    (tmp_path / "mine.csv").write_text("a.mp4,x\nb.mp4,y\n")
    assert len(open_videos(spec, "train")) == len(open_videos(spec, "test")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: neither the header of the published annotation"),
        ("id,label\nx,y\n", "line 1: neither the header of the published annotation .*'id,label'"),
        (HEADER, "the lists hold no video"),
        (HEADER + "surfing,,1,2,train\n", "train.csv, line 2: no youtube_id"),
        (
            HEADER + "surfing,abc,one,2,train\n",
            "train.csv, line 2: time_start and time_end must be seconds, not one and 2",
        ),
        (HEADER + "surfing,abc,1,2,dev\n", "train.csv, line 2: split is 'dev'; it must be one of train, val"),
        ("path,label\n,1\n", "train.csv, line 2: no path"),
        (HEADER + 'x,y,1,2,"' + "z" * 140_000, "train.csv, line 2: broken CSV"),
    ],
)
def test_broken_lists_name_the_line(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_videos(f"k600:{tmp_path}", "train")


def test_lists_that_are_absent_or_ambiguous(tmp_path):
    with pytest.raises(DataError, match=r"no list in .* or .*annotations; put the published train.csv"):
        open_videos(f"k600:{tmp_path}", "train")
    for name in ("val.csv", "validate.csv"):
        (tmp_path / name).write_text(VALIDATE)
    with pytest.raises(DataError, match=r"two lists of the validation split, .*val.csv and .*validate.csv"):
        open_videos(f"k600:{tmp_path}", "validation")
    with pytest.raises(
        DataError, match=r"unknown option 'vidoes'; known: videos=, test=test, classes=; did you mean videos\?"
    ):
        open_videos(f"k600:{tmp_path},vidoes=x")
