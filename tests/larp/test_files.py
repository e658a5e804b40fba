"""Reading and writing files, and checks of output paths."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from larp import files
from larp.data.contact_sheet import contact_sheet
from larp.data.video import write_video
from larp.files import (
    cache_folder,
    check_output,
    check_writable,
    claim,
    error_line,
    read_json,
    replacing,
    replacing_folder,
    user_path,
    write_json,
    write_text,
    writing_alone,
)

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


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


@contextmanager
def masked(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_files_obey_the_umask(tmp_path, mask, mode):
    with masked(mask):
        write_text(tmp_path / "a.txt", "a")
        with replacing(tmp_path / "new/b.safetensors") as part:
            save_file({"a": torch.zeros(1)}, part)
        write_video(tmp_path / "c.mp4", np.zeros((1, 16, 16, 3), np.uint8), 10)
        contact_sheet([np.zeros((1, 16, 16, 3), np.uint8)], ["d"], tmp_path / "d.png")
        with replacing_folder(tmp_path / "e") as folder:
            save_file({"a": torch.zeros(1)}, folder / "e.safetensors")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_a_refused_chmod_is_no_failure(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with replacing(tmp_path / "a") as part:
        save_file({"a": torch.zeros(1)}, part)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_programs_that_write_one_file_do_not_see_each_other(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first", "closed last"
    assert [claim(tmp_path / f"{number}" for number in range(9)).name for _ in range(3)] == ["0", "1", "2"]
    with writing_alone(tmp_path), pytest.raises(ValueError, match="another program writes"), writing_alone(tmp_path):
        pass


def test_what_a_killed_program_left_is_removed_by_the_next_one(tmp_path):
    # safetensors writes to a file of its own beside the one that it is told.
    program = (
        "import os; from larp.files import replacing\n"
        "with replacing('weights.safetensors') as part:\n"
        "    part.with_name('.tmp4MBrP3').touch(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "next.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["next.txt"]


def test_a_folder_survives_an_interrupt_while_it_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    own, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        own(*paths)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as on systems that cannot
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "model") as part:
        (part / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model/old").exists()


def test_a_folder_is_there_at_every_moment_of_its_replacement(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("one rename would leave no folder for a moment"))
    with replacing_folder(tmp_path / "model") as part:
        (part / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_a_full_disk_leaves_what_was_whole(tmp_path, full_disk):
    (tmp_path / "a").write_text("whole")
    with full_disk():
        for write in (lambda part: part.write_bytes(bytes(9000)), lambda part: torch.save(torch.zeros(9000), part),
                      lambda part: save_file({"a": torch.zeros(9000)}, part)):  # fmt: skip
            with pytest.raises(OSError, match=r"/a'$") as found, replacing(tmp_path / "a") as part:
                write(part)
            assert error_line(found.value).endswith("free space there, or choose another place")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "whole")]


def test_names_too_long_are_refused_before_the_work(tmp_path):
    for path, words in (
        (tmp_path / ("n" * 300 + ".mp4"), "the name has 304 bytes"),
        (tmp_path / "é".join("n" * 140) / "x.mp4", "the name has 418 bytes"),
        (tmp_path.joinpath(*["n" * 250] * 16), "the path has 4"),
    ):
        with pytest.raises(ValueError, match=words):
            check_writable(path)


def test_a_home_stands_for_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a" and user_path("~nobody-here.mp4") == Path("~nobody-here.mp4")
    monkeypatch.setenv("LARP_DATA", "~/data")
    assert cache_folder("LARP_DATA") == tmp_path / "data"


def test_a_user_without_a_home_has_a_folder_of_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("LARP_DATA", raising=False)
    folder = cache_folder("LARP_DATA")
    assert folder == tmp_path / f"larp-{os.getuid()}" / "larp" and folder.parent.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="no home folder"):
        user_path("~/a")
    folder.parent.rmdir()
    folder.parent.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="belongs to another user"):
        cache_folder("LARP_DATA")


def test_names_that_are_not_utf8_are_written_with_escapes(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    write_json(tmp_path / "a.json", [name, "é"])
    assert read_json(tmp_path / "a.json") == [name, "é"]
