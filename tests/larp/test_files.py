"""Reading and writing JSON files, and checks of output paths."""

from larp.files import check_output, check_writable, read_json, write_json

import pytest


def test_json_round_trip_and_nan_becomes_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, float("nan")], "é": (2,)})
    assert read_json(tmp_path / "a.json") == {"a": [1, None], "é": [2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_invalid_json_is_an_error_with_its_path_and_remedy(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON \(.*\): fetch it again$"):
        read_json(tmp_path / "a.json", remedy="fetch it again")


def test_output_paths(tmp_path):
    check_writable(tmp_path / "new/folder/a.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "file/a.json", "is a file, not a folder")):
        with pytest.raises(ValueError, match=words):
            check_writable(path)
    for path, words in (("https://a.b/c.mp4", "URLs are not written to"), ("a\0b", "zero byte")):
        with pytest.raises(ValueError, match=words):
            check_output(path)
