"""WebDataset shards: found, indexed, split, read and resumed as folders are; what is broken is named, and nothing else is lost."""

import gzip
import io
import json
import os
import tarfile
from itertools import chain, islice

from larp.data import shards, tar_index
from larp.data.clips import ClipShape
from larp.data.datasets import DataError, open_videos
from larp.data.doctor import examine
from larp.data.listing import CAPTION_BREAK
from larp.data.loader import ClipLoader, iterate_once
from larp.data.shards import expand_braces
from larp.data.tar_index import open_index
from larp.data.token_files import shard_slices
from larp.data.video import VideoError, read_video, write_video

import numpy as np
import pytest

SHAPE = ClipShape(4, 16, 16)


@pytest.fixture(scope="module")
def movies(tmp_path_factory) -> list[bytes]:
    """Video files, each with frames of its own grey."""
    folder, found = tmp_path_factory.mktemp("movies"), []
    for number in range(12):
        path = folder / f"{number}.mp4"
        write_video(path, np.full((6, 16, 16, 3), 20 * number, np.uint8), fps=8)
        found.append(path.read_bytes())
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path / "cache"))


def write_tar(path, members) -> None:
    """Write members, (name, bytes) each."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number: int, movie: bytes, **more: bytes) -> list[tuple[str, bytes]]:
    """The members of one sample as video2dataset writes them."""
    texts = {"txt": f"caption {number}".encode(), "json": json.dumps({"title": f"json {number}"}).encode(), **more}
    return [(f"{number:09d}.{name}", data) for name, data in {"mp4": movie, **texts}.items()]


def write_shards(folder, movies, each: int = 4) -> None:
    for begin in range(0, len(movies), each):
        members = [m for k in range(begin, begin + each) for m in sample(k, movies[k], cls=str(k % 2).encode())]
        write_tar(folder / f"{begin // each:05d}.tar", members)


def grey(clip) -> int:
    return round(float(clip.mean()) * 255 / 20)


def test_shards_are_a_list_of_videos_with_captions_and_classes(tmp_path, movies):
    write_shards(tmp_path, movies)
    videos = open_videos(f"wds:{tmp_path}/{{00000..00002}}.tar", "all")
    assert len(videos) == 12 and videos.classes == ("0", "1") and videos.notes == ()
    assert [item.name for item in videos.items[:5]][3:] == ["00000.tar/000000003.mp4", "00001.tar/000000004.mp4"]
    assert [item.caption for item in videos.items] == [f"caption {k}" for k in range(12)]
    assert [item.label for item in videos.items] == [k % 2 for k in range(12)]
    assert grey(read_video(videos.items[7].path)[0] / 255) == 7
    assert open_videos(f"wds:{tmp_path}/*.tar,caption=title", "all").items[2].caption == "json 2"
    train, test = (open_videos(f"wds:{tmp_path}", split) for split in ("train", "test"))
    assert not {item.name for item in train.items} & {item.name for item in test.items}
    assert len(train) + len(test) == 12 and len(test) >= 1
    assert not [path for path in tmp_path.rglob("*.mp4")], "nothing is unpacked"
    both = open_videos(f"wds:{tmp_path}/00000.tar+wds:{tmp_path}/00001.tar", "all")
    assert len(both) == 8 and len({item.name for item in both.items}) == 8


def test_ranks_and_workers_read_each_sample_once_and_resume_at_the_sample(tmp_path, movies):
    write_shards(tmp_path, movies)
    videos = open_videos(f"wds:{tmp_path}/*.tar", "all")

    def loader(rank=0, world_size=1, micro=2, workers=0):
        return ClipLoader(videos, SHAPE, 4, micro, seed=5, rank=rank, world_size=world_size, workers=workers)

    whole = [batch["index"].tolist() for batch in islice(loader(), 6)]
    assert sorted(chain.from_iterable(whole)) == list(range(12)), "an epoch has each sample once"
    parts = [[batch["index"].tolist() for batch in islice(loader(rank, 2, workers=2), 3)] for rank in (0, 1)]
    assert [rows for pair in zip(*parts, strict=True) for rows in pair] == whole, (
        "two ranks of two threads see the same"
    )
    first = loader()
    list(islice(first, 3))
    again = loader(workers=1)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [batch["index"].tolist() for batch in islice(again, 3)] == whole[3:]
    for batch in islice(loader(), 2):
        assert [grey(clip) for clip in batch["clip"]] == batch["index"].tolist()
    seen = [k for rank in range(3) for b in iterate_once(videos, SHAPE, 5, rank, 3) for k in b["index"].tolist()]
    assert sorted(seen) == list(range(12))
    write_shards(tmp_path, movies[:8])
    other = ClipLoader(open_videos(f"wds:{tmp_path}/0000[01].tar", "all"), SHAPE, 4, 2, seed=5)
    with pytest.raises(ValueError, match="the data is not the same: videos"):
        other.load_state_dict(first.state_dict())


def test_the_index_is_written_once_beside_the_shard_or_in_the_cache(tmp_path, movies, monkeypatch):
    write_shards(tmp_path, movies[:4])
    shard, beside = str(tmp_path / "00000.tar"), tmp_path / "00000.tar.larp-index"
    assert len(open_index(shard)) == 4 and beside.stat().st_mode & 0o777 == 0o644
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", None)
    assert len(open_index(shard)) == 4, "the headers are not read again"
    beside.write_bytes(beside.read_bytes()[:40])
    monkeypatch.setattr(tar_index, "_scan", scan)
    assert len(open_index(shard)) == 4, "a damaged index is made again"
    write_tar(tmp_path / "00000.tar", [m for k in range(2) for m in sample(k, movies[k])])
    assert len(open_index(shard)) == 2, "as is that of a shard that was replaced"
    beside.unlink()
    beside.mkdir()  # takes no file, as a folder of somebody else
    assert len(open_index(shard)) == 2 and len(list((tmp_path / "cache" / "shards").iterdir())) == 1
    held = open_videos(f"wds:{shard}", "all").items[1].path
    write_tar(tmp_path / "00000.tar", [("a.mp4", b"short")])
    with pytest.raises(
        VideoError, match=r"00000.tar/000000001.mp4: cannot be decoded.*was changed since it was listed"
    ):
        read_video(held)
    now = os.stat(shard).st_mtime_ns
    with pytest.raises(VideoError, match=r"cannot be decoded.*changed or cut off"):
        read_video(held.__class__(**{**held.__dict__, "offset": 10**6, "mtime_ns": now}))


def note(videos, words: str) -> str:
    (found,) = [line for line in videos.notes if words in line]
    return found


@pytest.mark.parametrize("cut", ["data", "header", "padding", "end"])
def test_a_shard_that_is_cut_off_is_named_and_read_as_far_as_it_goes(tmp_path, movies, cut):
    write_shards(tmp_path, movies)
    path = tmp_path / "00001.tar"
    with tarfile.open(path) as tar:
        infos = {info.name: info for info in tar}
    third = infos["000000006.mp4"]
    place = {
        "data": third.offset_data + 700,
        "header": third.offset + 100,
        "padding": third.offset,
        "end": infos["000000007.cls"].offset_data + 512,
    }[cut]
    os.truncate(path, place)
    videos = open_videos(f"wds:{tmp_path}/*.tar", "all")
    left = {"end": 12}.get(cut, 10)
    assert len(videos) == left and videos.items[5].caption == "caption 5"
    words = {"data": "within 000000006.mp4, which is left out", "end": "after 000000007.cls"}.get(
        cut, "after 000000005.cls"
    )
    assert "1 (00001.tar: " in note(videos, "cut off") and words in note(videos, "cut off")


def test_bytes_that_are_damaged_lose_their_own_sample_alone(tmp_path, movies):
    write_shards(tmp_path, movies[:8])
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as tar:
        place = {info.name: info for info in tar}["000000001.mp4"].offset
    data = bytearray(path.read_bytes())
    data[place : place + 512] = os.urandom(512)
    path.write_bytes(data)
    videos = open_videos(f"wds:{tmp_path}/*.tar", "all")
    assert [item.caption for item in videos.items] == [f"caption {k}" for k in range(8) if k != 1]
    assert "after 000000000.cls" in note(videos, "damaged and left out")
    assert "1 (00000.tar: 000000001)" in note(videos, "keys without a video")
    joined = b"".join((tmp_path / f"0000{k}.tar").read_bytes() for k in (1, 1))
    (tmp_path / "joined.tar").write_bytes(joined)
    assert (
        len(open_index(str(tmp_path / "joined.tar"))) == 8
        and len(open_videos(f"wds:{tmp_path}/joined.tar", "all")) == 8
    )


def test_a_member_that_is_no_video_is_skipped_and_named(tmp_path, movies):
    write_tar(
        tmp_path / "a.tar", [m for k in range(3) for m in sample(k, movies[k] if k != 1 else b"<html>404</html>")]
    )
    videos = open_videos(f"wds:{tmp_path}/a.tar", "all")
    loader = ClipLoader(videos, SHAPE, 3, 3, seed=0)
    indices = [k for batch in islice(loader, 4) for k in batch["index"].tolist()]
    assert set(indices) == {0, 2} and len(indices) == 12
    assert [name for name, _ in loader.skipped] == ["a.tar/000000001.mp4"]
    assert loader.skipped[0][1].startswith("does not begin like a video file")
    report = examine(f"wds:{tmp_path}/a.tar", frames=4)
    assert sum(len(split.broken) for split in report.splits) == 1 and sum(split.usable for split in report.splits) == 2


def test_odd_samples_are_named_and_counted(tmp_path, movies):
    members = [
        *[("two.mp4", movies[0]), ("two.webm", movies[1]), ("two.txt", b"both")],
        *[("latin.mp4", movies[2]), ("latin.txt", "caf\u00e9".encode("latin-1"))],
        *[("again.mp4", movies[3]), ("again.mp4", movies[4]), ("again.txt", b"first"), ("again.txt", b"second")],
        *[("text.txt", b"alone"), ("nojson.mp4", movies[5]), ("nojson.json", b"{"), ("number.mp4", movies[6])],
        *[
            ("number.json", b'{"caption": 3}'),
            ("._mac.mp4", b"fork"),
            ("no extension", b""),
            ("d/e.f/deep.mp4", movies[7]),
        ],
    ]
    write_tar(tmp_path / "a.tar", members)
    videos = open_videos(f"wds:{tmp_path}/a.tar", "all")
    captions = {item.name.removeprefix("a.tar/"): item.caption for item in videos.items}
    assert captions == {
        **{"two.mp4": "both", "two.webm": "both", "latin.mp4": None, "again.mp4": "first", "again.mp4#2": "first"},
        **{"nojson.mp4": None, "number.mp4": None, "d/e.f/deep.mp4": None},
    }
    assert [grey(read_video(item.path)[0] / 255) for item in videos.items] == list(range(8))
    assert "2 (a.tar: two (two.mp4, two.webm); a.tar: again" in note(videos, "several videos, each of which is used")
    assert "1 (a.tar: latin)" in note(videos, "captions that are not UTF-8")
    assert "1 (a.tar: text)" in note(videos, "keys without a video")
    assert "nojson" in note(videos, ".json that cannot be read") and "number" in note(videos, "that are no text")
    assert "again.txt" in note(videos, "two texts")


def test_texts_that_are_odd_or_disagree(tmp_path, movies):
    big = b"x" * (2**24 + 1)
    texts = [
        dict(txt=b"t", json=b'{"caption": "j"}'), dict(txt=b" ", json=b'{"caption": "j"}'),
        dict(txt=b"caf\xe9", json=b'{"caption": "j"}'), dict(txt=b"j\n", json=b'{"caption": "j"}'), dict(json=big),
        dict(json=b'{"caption": ["one", " two ", null, "one"]}'),
    ]  # fmt: skip
    members = [(f"{k}.{n}", data) for k, more in enumerate(texts) for n, data in {"mp4": movies[k], **more}.items()]
    write_tar(
        tmp_path / "a.tar", [*members, ("m/a.left.mp4", movies[6]), ("m/a.txt", b"both"), ("m/a.left.txt", b"left")]
    )
    videos = open_videos(f"wds:{tmp_path}/a.tar", "all")
    assert [item.caption for item in videos.items] == [
        "t",
        "j",
        "j",
        "j",
        None,
        CAPTION_BREAK.join(["one", "two"]),
        "left",
    ]
    assert "1 (a.tar: 0)" in note(videos, "of which .txt is used") and "1 (a.tar: 2)" in note(videos, "not UTF-8")
    assert "1 (a.tar: 4.json)" in note(videos, "more than 16 MiB") and len(videos.notes) == 3


def test_a_field_that_samples_lack_is_named(tmp_path, movies):
    members = [m for k in range(2) for m in sample(k, movies[k])] + [("c.mp4", movies[2])]
    write_tar(tmp_path / "a.tar", members)
    videos = open_videos(f"wds:{tmp_path}/a.tar,caption=titel", "all")
    assert "3 (a.tar: 000000000; " in note(videos, "keys without a text in the field titel of .json")
    assert "1 (a.tar: c)" in note(open_videos(f"wds:{tmp_path}/a.tar,caption=title", "all"), "in the field title")


def test_classes_that_are_odd(tmp_path, movies):
    labels = [b"7", b"007\n", b"10", b"-1", b"", b"\xff"]
    members = [(f"{k}.{n}", data) for k, cls in enumerate(labels) for n, data in (("mp4", movies[k]), ("cls", cls))]
    write_tar(tmp_path / "a.tar", members)
    videos = open_videos(f"wds:{tmp_path}/a.tar", "all")
    assert videos.classes == ("7", "10") and [item.label for item in videos.items] == [0, 0, 1, None, None, None]
    assert len(videos.notes) == 1 and "1 (a.tar: 5)" in note(videos, "classes that are not UTF-8")
    write_tar(tmp_path / "a.tar", [*members[:2], ("b.mp4", movies[0]), ("b.cls", b"cat")])
    assert "1 (cat)" in note(open_videos(f"wds:{tmp_path}/a.tar", "all"), "are no numbers, where others are")


def test_links_names_of_any_kind_and_keys_that_come_again(tmp_path, movies):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in [
            *[("./a.mp4", movies[0]), ("./a.txt", b"one"), ("b#1.mp4", movies[1]), ("b#2.mp4", movies[2])],
            *[
                ("./a.mp4", movies[3]),
                ("./a.txt", b"two"),
                (f"{'n' * 200}/\u00e9{'m' * 150}.mp4", movies[4]),
                ("x\ny.txt", b""),
            ],
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("s.mp4", tarfile.SYMTYPE), ("h.mp4", tarfile.LNKTYPE), ("d.mp4", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
    videos = open_videos(f"wds:{tmp_path}/a.tar", "all")
    assert [item.caption for item in videos.items] == ["one", None, None, "two", None]
    assert [grey(read_video(item.path)[0] / 255) for item in videos.items] == list(range(5))
    assert len({str(item.path) for item in videos.items}) == len({item.name for item in videos.items}) == 5
    assert "1 (a.tar: ./a.mp4)" in note(videos, "keys that come again")
    assert "2 (a.tar: s.mp4; a.tar: h.mp4)" in note(videos, "that are links")
    assert r"1 (a.tar: x\ny)" in note(videos, "keys without a video")


def test_packed_shards_in_a_folder_are_named_and_a_member_may_be_a_photo(tmp_path, movies):
    write_tar(tmp_path / "0.tar", [("photo.mp4", b"\xff\xd8\xff\xe0" + b"0" * 99), ("a.mp4", movies[0])])
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    write_tar(tmp_path / "2.tar", [])
    videos = open_videos(f"wds:{tmp_path}", "all")
    assert "1 (1.tar.gz)" in note(videos, "packed with gzip") and "1 (2.tar)" in note(videos, "without a member")
    loader = ClipLoader(videos, SHAPE, 4, 4, seed=0)
    assert set(next(iter(loader))["index"].tolist()) == {1} and [name for name, _ in loader.skipped] == [
        "0.tar/photo.mp4"
    ]


def test_an_index_of_somebody_else_that_does_not_fit_is_made_again(tmp_path, movies):
    write_shards(tmp_path, movies[:4])
    shard, beside = str(tmp_path / "00000.tar"), tmp_path / "00000.tar.larp-index"
    good = open_index(shard)
    for column, value in (
        ("sizes", 10**12),
        ("offsets", -1),
        ("labels", 9),
        ("names_ends", 10**6),
        ("json_sizes", 10**9),
    ):
        columns = {name: values.clone() for name, values in good.columns.items()}
        columns[column][1] = value
        tar_index._save(tar_index.ShardIndex(shard, good.state, columns, good.classes, ()), beside, "")
        assert all(open_index(shard).columns[name].equal(values) for name, values in good.columns.items()), column


def test_pieces_of_one_video_stay_in_one_split(tmp_path, movies):
    members = [(f"{k // 4:09d}_{k % 4:05d}.mp4", movies[k % 12]) for k in range(80)]
    write_tar(tmp_path / "a.tar", members)
    groups = [{item.group for item in open_videos(f"wds:{tmp_path}/a.tar", split).items} for split in ("train", "test")]
    assert groups[1] and not groups[0] & groups[1] and len(groups[0] | groups[1]) == 20


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: "*.tar", "no shard matches"),
        (lambda p: "{000..003}.tar", "no shard matches 4 names"),
        (lambda p: (p / "a.tar").write_bytes(b"") or "a.tar", "0 samples in 1 shards"),
        (
            lambda p: (p / "a.tar").write_bytes(b"no tar" * 999) and "a.tar",
            "0 samples in 1 shards: files that are no tar files: 1",
        ),
        (lambda p: (p / "a.tar").write_bytes(gzip.compress(b"x")) and "a.tar", "packed with gzip.*unpack"),
        (
            lambda p: write_tar(p / "a.tar", [("a.txt", b"x")]) or "a.tar",
            "0 samples in 1 shards: keys without a video: 1",
        ),
        (lambda p: write_tar(p / "a.tar", [("a.jpg", b"x")]) or "a.tar", "0 samples in 1 shards: their members"),
        (lambda p: write_tar(p / "a.tar", [("a.mp4", b"x")]) or "a.tar,captoin=x", "unknown option 'captoin'.*caption"),
    ],
)
def test_shards_without_a_sample_are_refused_in_one_line(tmp_path, make, words):
    with pytest.raises(DataError, match=words) as error:
        open_videos(f"wds:{tmp_path}/{make(tmp_path)}", "all")
    assert "\n" not in str(error.value)


def test_shards_without_their_kind_are_told_it(tmp_path, movies):
    write_shards(tmp_path, movies[:4])
    with pytest.raises(DataError, match=r"is a tar file: give wds:.*00000\.tar"):
        open_videos(f"{tmp_path}/00000.tar")
    with pytest.raises(DataError, match=r"no video below .*; for its \.tar files give wds:"):
        open_videos(f"folder:{tmp_path}")


def test_missing_shards_of_a_range_are_named(tmp_path, movies):
    write_shards(tmp_path, movies)
    (tmp_path / "00001.tar").unlink()
    (tmp_path / "00003.tar").mkdir()
    videos = open_videos(f"wds:{tmp_path}/{{00000..00002}}.tar::{tmp_path}/00000.tar", "all")
    assert len(videos) == 8 and "1 of 3" in note(videos, "missing") and "00001.tar" in note(videos, "missing")


def test_braces_stand_for_what_they_stand_for_in_webdataset():
    patterns = [
        "a-{000..011}.tar",
        "{a,b}/{1..3}",
        "{9..11}",
        "x{08..10}y{a,{b,c}}",
        "{3..1}",
        "plain.tar",
        "{a}{1..2}",
    ]
    assert (
        expand_braces(patterns[0])[9:] == ["a-009.tar", "a-010.tar", "a-011.tar"]
        and len(expand_braces(patterns[0])) == 12
    )
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"] and expand_braces("{a}{1..2}") == [
        "{a}1",
        "{a}2",
    ]
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in patterns:
        assert expand_braces(pattern) == list(braceexpand(pattern)), pattern


def test_shards_of_the_package_webdataset_are_read(tmp_path, movies):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for k in range(3):
            writer.write({"__key__": f"{k:09d}", "mp4": movies[k], "txt": f"caption {k}", "json": {"n": k}, "cls": k})
    videos = open_videos(f"wds:{tmp_path}/a.tar", "all")
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [item.caption for item in videos.items] == [row["txt"].decode() for row in theirs]
    assert [item.path.read() for item in videos.items] == [row["mp4"] for row in theirs] and videos.notes == ()
    assert [item.label for item in videos.items] == [0, 1, 2]


def test_remote_shards_are_read_through_fsspec(tmp_path, movies):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    write_shards(tmp_path, movies)
    for path in tmp_path.glob("*.tar"):
        memory.pipe(f"/shards-of-a-test/{path.name}", path.read_bytes())
    try:
        for pattern in ("{00000..00002}.tar", "*.tar"):
            videos = open_videos(f"wds:memory://shards-of-a-test/{pattern}", "all")
            assert len(videos) == 12 and grey(read_video(videos.items[9].path)[0] / 255) == 9
        assert videos.items[4].name == "00001.tar/000000004.mp4"
        assert len(list((tmp_path / "cache" / "shards").iterdir())) == 3
        with pytest.raises(DataError, match="no shard matches"):
            open_videos("wds:memory://shards-of-a-test/b*.tar", "all")
        with pytest.raises(DataError, match="cannot be listed"):
            open_videos("wds:nosuchprotocol://a.tar", "all")
    finally:
        memory.rm("/shards-of-a-test", recursive=True)


def test_many_notes_are_counted_and_the_first_named(tmp_path):
    assert "25 (0; 1; 2" in (line := shards._note("shards that are missing", list(map(str, range(25))), "wds:x")[0])
    assert line.endswith("19 and 5 more)")


def test_shards_of_a_cache_follow_the_shards_of_the_data():
    slices = shard_slices(3000, [range(0, 40), range(40, 46), range(46, 46), range(46, 1046), range(1046, 3000)])
    assert [k for part in slices for k in part] == list(range(3000)) and slices[0] == range(0, 46)
    assert all(len(part) <= 46 for part in slices) and {1046} <= {part.start for part in slices}
    million = shard_slices(10_000_000, [range(k, k + 10_000) for k in range(0, 10_000_000, 10_000)])
    assert len(million) == 2000 and shard_slices(600_000)[0] == range(585) and len(shard_slices(10_000_000)) == 1025
