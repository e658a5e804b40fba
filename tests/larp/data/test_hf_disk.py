"""Data sets that the package `datasets` saved to disk, as data specs."""

from itertools import chain, islice

from larp.data.clips import ClipShape
from larp.data.datasets import DataError, NoSplitError, open_videos
from larp.data.doctor import examine
from larp.data.listing import captions_of
from larp.data.loader import ClipLoader
from larp.data.video import read_video, write_video

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("movies"), []
    for number in range(6):
        write_video(path := folder / f"{number}.mp4", np.full((6, 16, 16, 3), 30 * number, np.uint8), fps=8)
        paths.append(path)
    return paths


def saved(folder, movies, **columns):
    """Save the movies as bytes, with further columns, as train and test."""
    kinds = {"caption": datasets.Value("string"), "label": datasets.ClassLabel(names=["HighJump", "surfing"])}
    features = datasets.Features({"video": datasets.Video()} | {name: kinds[name] for name in columns})
    rows = {"video": [{"bytes": path.read_bytes(), "path": None} for path in movies], **columns}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table.select(range(4)), "test": table.select(range(4, 6))}).save_to_disk(folder)
    return f"hf-disk:{folder}"


def test_a_saved_data_set_is_a_list_of_videos(tmp_path, movies):
    spec = saved(tmp_path / "d", movies, caption=["a", None, " c ", "", "e", "f"], label=[0, 1, 0, 1, 1, -1])
    train, test, whole = (open_videos(spec, split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(whole)) == (4, 2, 6) and train.classes == ("HighJump", "surfing")
    assert [item.caption for item in whole.items] == ["a", "surfing", "c", "surfing", "e", "f"]
    assert [item.label for item in whole.items] == [0, 1, 0, 1, 1, None]
    assert [item.name for item in test.items] == ["test/00000000", "test/00000001"]
    assert read_video(test.items[1].path)[0].mean() == pytest.approx(150, abs=2)
    first = ClipLoader(whole, ClipShape(4, 16, 16), 2, 2, seed=0)
    batches = [batch["index"].tolist() for batch in islice(first, 3)]
    assert sorted(chain.from_iterable(batches)) == list(range(6)) and first.skipped == []
    again = ClipLoader(whole, ClipShape(4, 16, 16), 2, 2, seed=0)
    again.load_state_dict(first.state_dict())
    with pytest.raises(NoSplitError, match="choose train, test"):
        open_videos(spec, "validation")


def test_paths_as_text_and_other_names_of_columns(tmp_path, movies):
    rows = {"file": [str(path) for path in movies], "words": list("abcdef"), "kind": ["x", "y"] * 3}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "d")
    spec = f"hf-disk:{tmp_path / 'd'},video=file,caption=words,label=kind"
    whole = open_videos(spec, "all")
    assert [item.path for item in whole.items] == movies and whole.classes == ("x", "y")
    assert [item.caption for item in whole.items] == list("abcdef")
    train, test = open_videos(spec, "train"), open_videos(spec, "test")
    assert len(train) + len(test) == 6 and len(test) >= 1
    with pytest.raises(DataError, match="has no column of videos; give video=COLUMN, one of file, words, kind"):
        open_videos(f"hf-disk:{tmp_path / 'd'}")
    with pytest.raises(DataError, match="caption=caption: no such column"):
        open_videos(f"hf-disk:{tmp_path / 'd'},video=file,caption=caption")


def test_lists_of_captions(tmp_path, movies):
    rows = {"file": [str(path) for path in movies[:2]], "caption": [["a", None, " b", "a"], None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "d")
    found = open_videos(f"hf-disk:{tmp_path / 'd'},video=file", "all")
    assert [captions_of(item.caption) for item in found.items] == [("a", "b"), ()]


def test_rows_without_a_usable_video_are_named(tmp_path, movies):
    table = {"video": [{"bytes": movies[0].read_bytes(), "path": None}, {"bytes": b"nothing", "path": None}, None]}
    datasets.Dataset.from_dict(table, features=datasets.Features({"video": datasets.Video()})).save_to_disk(
        tmp_path / "d"
    )
    loader = ClipLoader(open_videos(f"hf-disk:{tmp_path / 'd'}", "all"), ClipShape(4, 16, 16), 3, 3, seed=0)
    assert {k for batch in islice(loader, 3) for k in batch["index"].tolist()} == {0}
    assert [name for name, _ in loader.skipped] == ["00000001", "00000002"]
    report = examine(f"hf-disk:{tmp_path / 'd'}", frames=4, progress=False)
    assert sum(len(split.broken) + len(split.missing) for split in report.splits) == 2
    assert "does not begin like a video" in loader.skipped[0][1] and "the row holds no video" in loader.skipped[1][1]


def test_other_folders_are_refused_in_one_line(tmp_path, movies):
    with pytest.raises(DataError, match="there is no folder"):
        open_videos(f"hf-disk:{tmp_path / 'absent'}")
    with pytest.raises(DataError, match=r"cannot be loaded .*give a folder that save_to_disk wrote") as error:
        open_videos(f"hf-disk:{tmp_path}")
    assert "\n" not in str(error.value)
    saved(tmp_path / "d", movies)
    with pytest.raises(DataError, match=r"no video below .*d; for a data set that save_to_disk wrote give hf-disk:"):
        open_videos(str(tmp_path / "d"))
