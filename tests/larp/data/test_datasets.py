"""The spec grammar, every format, disjoint splits, and errors with remedies."""

import json
import os
from pathlib import Path

from larp.data.datasets import DataError, NoSplitError, evenly_spaced, humanize, open_videos
from larp.data.listing import captions_of
from larp.data.video import write_video

import numpy as np
import pytest

PIXELS = np.zeros((2, 16, 16, 3), np.uint8)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def make_ucf101(root: Path, suffix=".avi", home="UCF-101") -> Path:
    """Two of three listed classes; group 1 is test, group 2 is train, group 9 is in no list."""
    lines = {"train": [], "test": []}
    for name in ("Archery", "BasketballDunk", "YoYo"):
        for split, group in (("test", 1), ("train", 2)):
            for clip in (1, 2):
                stem = f"v_{name}_g{group:02d}_c{clip:02d}"
                lines[split].append(f"{name}/{stem}.avi" + (" 1" if split == "train" else ""))
                if name != "YoYo":
                    touch(root / home / name / f"{stem}{suffix}")
    touch(root / home / "Archery" / f"v_Archery_g09_c01{suffix}")
    for split, names in lines.items():
        for fold in (1, 2, 3):
            listing = touch(root / "ucfTrainTestlist" / f"{split}list{fold:02d}.txt")
            listing.write_text("\n".join(names if fold == 1 else names[::2]) + "\n")
    return root


@pytest.mark.parametrize(("suffix", "home"), [(".avi", "UCF-101"), (".mp4", "UCF-101"), (".avi", "")])
def test_ucf101_follows_its_lists(tmp_path, suffix, home):
    root = make_ucf101(tmp_path / "data", suffix, home)
    for split, group in (("train", "g02"), ("test", "g01")):
        videos = open_videos(f"ucf101:{root}", split)
        assert videos.classes == ("Archery", "BasketballDunk") and len(videos) == 4
        assert all(group in item.name for item in videos.items) and [item.label for item in videos.items] == [
            0,
            0,
            1,
            1,
        ]
        assert videos.items[2].caption == "basketball dunk"
        assert "2 of the 3 listed classes" in videos.notes[0] and "1 files are in no list" in videos.notes[1]
    assert len(open_videos(f"ucf101:{root}", "all")) == 9
    assert len(open_videos(f"ucf101:{root},fold=2", "train")) == 2


def test_ucf101_finds_lists_beside_its_root(tmp_path):
    root = make_ucf101(tmp_path)
    assert len(open_videos(f"ucf101:{root / 'UCF-101'}", "test")) == 4


@pytest.mark.parametrize(
    "folders", [["HandstandPushups"], ["HandStandPushups"], ["HandStandPushups", "HandstandPushups"]]
)
def test_the_two_spellings_of_an_ucf101_class_are_one(tmp_path, folders):
    root = make_ucf101(tmp_path)
    for number, folder in enumerate(folders, 1):
        for stem in (f"v_HandStandPushups_g0{number}_c01", "v_HandstandPushups_g05_c01"):
            touch(root / "UCF-101" / folder / f"{stem}.avi")
    with (root / "ucfTrainTestlist" / "trainlist01.txt").open("a") as file:
        file.writelines(f"HandstandPushups/v_HandStandPushups_g0{group}_c01.avi 37\n" for group in (1, 2, 5))
    videos = open_videos(f"ucf101:{root}", "train")
    assert videos.classes == ("Archery", "BasketballDunk", "HandstandPushups")
    assert len([item for item in videos.items if item.label == 2]) == len(folders) + 1
    assert {item.caption for item in videos.items if item.label == 2} == {"handstand pushups"}


def test_some_classes_alone(tmp_path):
    root = make_ucf101(tmp_path)
    touch(root / "UCF-101/YoYo/v_YoYo_g02_c01.avi")
    videos = open_videos(f"ucf101:{root},classes=yo yo/Archery")
    assert videos.classes == ("Archery", "YoYo") and {videos.classes[item.label] for item in videos.items} == {
        "Archery",
        "YoYo",
    }
    assert len(open_videos(f"ucf101:{root},fold=1,classes=archery").items) == 2
    with pytest.raises(DataError, match=r"unknown class 'Archer'; nearest: Archery \(of 3\)"):
        open_videos(f"ucf101:{root},classes=Archer")


def test_ucf101_mistakes(tmp_path):
    root = make_ucf101(tmp_path / "a")
    touch(root / "UCF-101" / "Archary" / "v_Archary_g01_c01.avi")
    with pytest.raises(DataError, match=r"1 of 3 class folders are not in the lists.*'Archary' \(nearest: 'Archery'\)"):
        open_videos(f"ucf101:{root}", "train")
    with pytest.raises(DataError, match=r"fold=4; UCF-101 has the folds 1, 2 and 3"):
        open_videos(f"ucf101:{make_ucf101(tmp_path / 'b')},fold=4")
    with pytest.raises(DataError, match=r"unknown option 'flod'; known: fold=1, classes=; did you mean fold\?"):
        open_videos(f"ucf101:{root},flod=1")
    with pytest.raises(DataError, match=r"option fold='one' must be a whole number"):
        open_videos(f"ucf101:{root},fold=one")
    touch(tmp_path / "c" / "Archery" / "v_Archery_g01_c01.avi")
    with pytest.raises(DataError, match=r"no folder ucfTrainTestlist"):
        open_videos(f"ucf101:{tmp_path / 'c'}")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match=r"no class folder with videos"):
        open_videos(f"ucf101:{tmp_path / 'd'}")
    e = make_ucf101(tmp_path / "e")
    for path in (e / "UCF-101").rglob("*.avi"):
        path.rename(path.with_name("renamed_" + path.name))
    with pytest.raises(DataError, match=r"none of the 9 videos is in .*trainlist01.txt"):
        open_videos(f"ucf101:{e}")
    with pytest.raises(DataError, match=r"there is no folder '/nowhere'"):
        open_videos("ucf101:/nowhere")


def test_folder_is_recursive_and_its_splits_are_stable(tmp_path):
    for k in range(60):
        touch(tmp_path / f"d{k % 3}" / f"clip {k}.mp4")
    for name in ("notes.txt", "a.RMVB", "b.rmvb", "README", ".hidden.txt"):
        touch(tmp_path / name)
    train, test, everything = (open_videos(f"folder:{tmp_path}", split) for split in ("train", "test", "all"))
    names = {item.name for item in test.items}
    assert len(everything) == 60 and 1 <= len(test) <= 14 and not names & {item.name for item in train.items}
    assert len(train) + len(test) == 60 and train.classes == () and train.items[0].label is None
    (note,) = train.notes
    assert "files passed over" in note and "2 .rmvb, 1 " in note and "1 .txt" in note and "1 without a suffix" in note
    touch(tmp_path / "more.mp4")
    assert names <= {item.name for item in open_videos(str(tmp_path), "test").items}


@pytest.mark.parametrize("suffix", [".mts", ".m2ts", ".vob", ".MTS"])
def test_files_of_camcorders_and_discs_are_videos(tmp_path, suffix):
    touch(tmp_path / f"a{suffix}")
    videos = open_videos(f"folder:{tmp_path}", "all")
    assert len(videos) == 1 and not videos.notes


def test_even_two_videos_split(tmp_path):
    touch(tmp_path / "a.mp4"), touch(tmp_path / "b.mp4")
    assert len(open_videos(f"folder:{tmp_path}", "train")) == len(open_videos(f"folder:{tmp_path}", "test")) == 1


def test_manifests(tmp_path):
    touch(tmp_path / "v" / "a.mp4"), touch(tmp_path / "v" / "b.mp4")
    (tmp_path / "m.csv").write_text("path,label,split\nv/a.mp4,PlayingPiano,train\nv/b.mp4,Archery,test\n")
    train, test = open_videos(f"csv:{tmp_path / 'm.csv'}", "train"), open_videos(str(tmp_path / "m.csv"), "test")
    assert train.classes == test.classes == ("Archery", "PlayingPiano")
    assert [(i.path, i.name, i.label, i.caption) for i in train.items] == [
        (tmp_path / "v/a.mp4", "v/a.mp4", 1, "playing piano")
    ]
    rows = [{"path": str(tmp_path / "v/a.mp4"), "caption": "a dog, running"}, {"path": "v/b.mp4", "label": 10}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    videos = open_videos(f"jsonl:{tmp_path / 'm.jsonl'}", "all")
    assert videos.items[0].path == tmp_path / "v/a.mp4" and videos.items[0].caption == "a dog, running"
    assert (
        videos.classes == ("10",) and [i.label for i in videos.items] == [None, 0] and videos.items[1].caption is None
    )


def test_one_file_in_several_spellings_is_one_video(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.mp4").touch()
    rows = [
        {"path": "v/a.mp4", "caption": "one"},
        {"path": "./v//a.mp4", "caption": ["two", " ", "one"]},
        {"path": str(tmp_path / "v/a.mp4"), "caption": "three"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (item,) = open_videos(f"jsonl:{tmp_path / 'm.jsonl'}", "all").items
    assert item.name == "v/a.mp4" and captions_of(item.caption) == ("one", "two", "three")


def test_a_manifest_may_spell_handstand_pushups_both_ways(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "m.csv").write_text("path,label\na.mp4,HandStandPushups\nb.mp4,HandstandPushups\nc.mp4,Archery\n")
    videos = open_videos(f"csv:{tmp_path / 'm.csv'}", "all")
    assert videos.classes == ("Archery", "HandstandPushups") and [item.label for item in videos.items] == [1, 1, 0]


@pytest.mark.parametrize("form", ["m.csv", "m.jsonl"])
def test_a_video_may_have_several_captions(tmp_path, form):
    touch(tmp_path / "a.mp4"), touch(tmp_path / "b.mp4")
    pairs = [("a.mp4", "a dog runs"), ("b.mp4", "rain"), ("a.mp4", "the dog, running"), ("a.mp4", "a dog runs")]
    path = tmp_path / form
    if form == "m.csv":
        path.write_text("path,caption\n" + "".join(f'{name},"{caption}"\n' for name, caption in pairs))
    else:
        rows = [{"path": name, "caption": caption} for name, caption in pairs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    videos = open_videos(str(path), "all")
    assert [item.name for item in videos.items] == ["a.mp4", "b.mp4"]
    assert [captions_of(item.caption) for item in videos.items] == [("a dog runs", "the dog, running"), ("rain",)]


def test_text_of_manifests_may_hold_unicode_line_separators(tmp_path):
    touch(tmp_path / "a.mp4"), touch(tmp_path / "b.mp4")
    caption = "one\u2028two\u0085three\x1cfour"
    (tmp_path / "m.csv").write_text(f'path,caption\r\na.mp4,{caption}\r\nb.mp4,"two\nlines"\r\n', "utf-8-sig")
    assert [item.caption for item in open_videos(f"csv:{tmp_path / 'm.csv'}", "all").items] == [caption, "two\nlines"]
    caption = "one\u2028two\u0085three"
    row = json.dumps({"path": "a.mp4", "caption": caption}, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_text(row + "\r\n\n" + row.replace("a.mp4", "b.mp4"), encoding="utf-8-sig")
    assert [item.caption for item in open_videos(f"jsonl:{tmp_path / 'm.jsonl'}", "all").items] == [caption] * 2


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_in_another_encoding_is_named(tmp_path, name):
    texts = {"m.csv": "path,caption\na.mp4,caf\u00e9\n", "m.jsonl": '{"path": "a.mp4", "caption": "caf\u00e9"}\n'}
    (tmp_path / name).write_text(texts[name], encoding="latin-1")
    with pytest.raises(DataError, match=rf"{tmp_path / name}: not UTF-8 text .*save it as UTF-8"):
        open_videos(str(tmp_path / name), "all")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"path": "a.mp4"}\n{"path": \n', "m.jsonl, line 2: broken JSON"),
        ("m.jsonl", '["a.mp4"]', "line 1: each line must be an object"),
        ("m.jsonl", '{"label": 1}', "line 1: no path"),
        ("m.jsonl", '{"path": "a.mp4"}\n{"path": "a.mp4"}', "line 2: lists a.mp4 again .first in line 1"),
        (
            "m.csv",
            "path,caption,label\na.mp4,one,3\na.mp4,two,4",
            "line 3: lists a.mp4 again .first in line 2. with another label: a video may have several captions, but one",
        ),
        ("m.jsonl", '{"path": "a.mp4", "split": "dev"}', "line 1: split is 'dev'; it must be train or test"),
        ("m.jsonl", '{"path": "a.mp4", "split": "test"}\n{"path": "b.mp4"}', "line 2: some lines have a split"),
        ("m.jsonl", '{"path": "a.mp4", "split": "test"}', "no line has split train"),
        ("m.jsonl", '{"path": "gone.mp4"}', "none of its 1 videos exists.*relative to the manifest"),
        ("m.jsonl", "", "the manifest lists no video"),
        ("m.csv", "file,label\na.mp4,1\n", "line 1: the header must name a column path"),
        ("m.csv", "path,label\na.mp4,1\n,2\n", "line 3: no path"),
        ("m.csv", 'path,caption\na.mp4,one\nb.mp4,"' + "x" * 140_000, "m.csv, line 3: broken CSV: field larger.*quote"),
        (
            "m.jsonl",
            '{"path": "a.mp4"}\n{"path": "b.mp4", "caption": ["c", ["d"]]}',
            r'line 2: caption must be text.*\["d"\]',
        ),
        ("m.jsonl", '{"path": "a.mp4", "label": {"a": 1}}', "m.jsonl, line 1: label must be text or a number"),
        ("m.jsonl", '{"path": ["a.mp4"]}', "m.jsonl, line 1: path must be text or a number"),
    ],
)
def test_broken_manifests_name_the_line(tmp_path, name, text, message):
    touch(tmp_path / "a.mp4")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        open_videos(f"{name[2:]}:{tmp_path / name}", "train")


def test_shapes_is_captioned_labelled_and_split_by_triples():
    spec = "shapes:count=60,seed=1,size=16,frames=4"
    train, test, everything = (open_videos(spec, split) for split in ("train", "test", "all"))
    assert (
        len(train) == 60 and len(test) == 16 and len(everything) == 76 and len({i.name for i in everything.items}) == 76
    )
    item = train.items[0]
    assert train.classes == test.classes and len(train.classes) == 18
    assert all(word in item.caption for word in train.classes[item.label].split())
    with pytest.raises(DataError, match=r"takes only options"):
        open_videos("shapes:/a/path")
    with pytest.raises(ValueError, match=r"count=0 is too small"):
        open_videos("shapes:count=0")


def test_joined_specs_merge_classes_by_name_and_keep_names_unique(tmp_path):
    for part, label in (("a", "Archery"), ("b", "Surfing"), ("c", "Archery")):
        touch(tmp_path / part / "v.mp4")
        (tmp_path / part / "m.csv").write_text(f"path,label\nv.mp4,{label}\n")
    videos = open_videos("+".join(f"csv:{tmp_path / part / 'm.csv'}" for part in "abc"), "all")
    assert videos.classes == ("Archery", "Surfing") and [i.label for i in videos.items] == [0, 1, 0]
    assert [i.name for i in videos.items] == ["v.mp4", "2:v.mp4", "3:v.mp4"]


def test_a_plus_or_comma_in_a_path_is_part_of_it(tmp_path):
    write_video(tmp_path / "a+b, c=d" / "v.mp4", PIXELS, 10)
    assert len(open_videos(f"folder:{tmp_path / 'a+b, c=d'}+shapes:count=2,size=16,frames=2", "all")) == 1 + 2 + 16


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the data spec is empty; give one of ucf101:"),
        (
            "ucf11:/data",
            r"unknown data spec 'ucf11:/data': the kinds are ucf101:, k600:, csv:, .*, shapes:; did you mean ucf101:\?",
        ),
        ("shape", r"neither a path that exists nor one of the kinds .*did you mean shapes:\?"),
        ("/no/such/path", "neither a path that exists"),
        ("folder:", "the path is missing after the colon"),
        ("folder:/no/such", "there is no folder '/no/such'"),
        ("csv:/no/such.csv", "there is no file '/no/such.csv'"),
        ("jsonl:/dev/null", "'/dev/null' is a folder, a pipe or a device"),
    ],
)
def test_unknown_specs_list_the_known_ones(spec, message):
    with pytest.raises(DataError, match=message):
        open_videos(spec)


def test_an_empty_folder_and_a_single_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no video below .*looked for files ending in"):
        open_videos(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"no .csv or .jsonl manifest"):
        open_videos(str(touch(tmp_path / "a.mp4")))
    with pytest.raises(DataError, match=r"unknown split 'val'; choose train, test or all"):
        open_videos(str(tmp_path), "val")


def test_missing_splits(tmp_path):
    for name in "ab":
        touch(tmp_path / "v" / f"{name}.mp4")
    (tmp_path / "m.csv").write_text("path,split\nv/a.mp4,train\nv/b.mp4,validation\n")
    assert [i.name for i in open_videos(str(tmp_path / "m.csv"), "validation").items] == ["v/b.mp4"]
    for spec in (f"folder:{tmp_path}", "shapes:", f"ucf101:{make_ucf101(tmp_path / 'ucf')}"):
        with pytest.raises(NoSplitError, match=r"has no validation split; choose train, test, or all"):
            open_videos(spec, "validation")
    with pytest.raises(NoSplitError, match="no line has split test"):
        open_videos(str(tmp_path / "m.csv"), "test")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BasketballDunk", "basketball dunk"),
        ("YoYo", "yo yo"),
        ("TVShow", "tv show"),
        ("playing_piano-fast", "playing piano fast"),
        ("surfing", "surfing"),
    ],
)
def test_humanize(name, words):
    assert humanize(name) == words


def test_real_clips(clips_root):
    spec = f"ucf101:{clips_root / 'ucf101'}"
    train, test = open_videos(spec, "train"), open_videos(spec, "test")
    assert (len(train), len(test), len(open_videos(spec, "all"))) == (529, 202, 731)
    assert train.classes == ("Archery", "BasketballDunk", "HorseRace", "PlayingPiano", "PlayingViolin", "Surfing")
    groups = [{item.name.rsplit("_", 1)[0] for item in videos.items} for videos in (train, test)]
    assert not groups[0] & groups[1]
    assert len(open_videos(f"ucf101:{clips_root / 'ucf101_original'}", "test")) == 18
    captioned = open_videos(str(clips_root / "captioned" / "captions.jsonl"), "all")
    assert len(captioned) == 100 and all(item.caption for item in captioned.items)


@pytest.mark.parametrize(("count", "chosen"), [(1, "a"), (2, "ad"), (4, "abde"), (6, "abcdef"), (9, "abcdef")])
def test_evenly_spaced_items_come_from_all_over_a_set(count, chosen):
    assert "".join(evenly_spaced("abcdef", count)) == chosen
    assert evenly_spaced((), count) == ()


def test_linked_folders_are_followed_once(tmp_path):
    for name in ("data/a/0.mp4", "data/a/1.mp4", "elsewhere/2.mp4"):
        touch(tmp_path / name)
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to("..")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    names = [item.name for item in open_videos(f"folder:{tmp_path / 'data'}", "all").items]
    assert names == ["a/0.mp4", "a/1.mp4", "link/2.mp4"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "a/0.mp4")
    touch(tmp_path / "b/0.mp4")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"/b: the folder cannot be read \(Permission denied\)"):
        open_videos(f"folder:{tmp_path}", "all")


def test_names_that_are_not_utf8_are_videos(tmp_path):
    for number in range(20):
        touch(tmp_path / os.fsdecode(b"caf\xe9-%d.mp4" % number))
    train, test = (open_videos(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert len(train) + len(test) == 20 and all(item.path.is_file() for item in train.items)


def test_manifests_name_videos_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    video = touch(tmp_path / "videos/0.mp4")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/a.jsonl").write_text(json.dumps({"path": "~/videos/0.mp4"}))
    (tmp_path / "list/a.csv").write_text("path\n~/videos/0.mp4\n")
    for spec in ("~/list/a.jsonl", "jsonl:~/list/a.jsonl", "csv:~/list/a.csv", "~/videos"):
        assert [item.path for item in open_videos(spec, "all").items] == [video]
