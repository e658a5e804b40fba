"""Features of clips that are computed once: real clips come back in every evaluation, and one takes a second on a CPU."""

from __future__ import annotations

import hashlib
import sqlite3
import warnings
from contextlib import closing
from typing import TYPE_CHECKING

from larp.metrics.weights import cache_folder

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from larp.metrics.i3d import ClipFeatures

VERSION = 1
"""Incremented when a change of the code changes the features of the same clips."""
FILE = "features.sqlite"


class KeptFeatures:
    """Computes features like `features`, and keeps those of each clip in the cache folder (LARP_CACHE), for any later program.

    A clip is known by its values. An evaluation that was stopped finds again what it had computed. Where the file cannot be read or
    written, everything is computed, and a warning says so once.
    """

    def __init__(self, features: ClipFeatures) -> None:
        self._features = features
        self.name, self.dim = features.name, features.dim
        self.min_frames, self.weights_hash = features.min_frames, features.weights_hash
        self._path = cache_folder() / FILE
        self._readable = self._writable = True

    def __call__(self, clip: Tensor) -> Tensor:
        """Return the features (B, D) float32 of clips (B, 3, T, H, W) in [0, 1]. Raises what the extractor raises."""
        keys = [self._key(one) for one in clip]
        known = self._read(keys)
        missing = [row for row, key in enumerate(keys) if key not in known]
        if missing:
            computed = self._features(clip[missing])
            new = {keys[row]: computed[place] for place, row in enumerate(missing)}
            self._write(new)
            known |= new
        return torch.stack([known[key] for key in keys]) if keys else self._features(clip)

    def _key(self, clip: Tensor) -> bytes:
        about = f"{VERSION} {self.name} {self.weights_hash} {tuple(clip.shape)}"
        return hashlib.sha256(about.encode() + clip.float().contiguous().cpu().numpy().tobytes()).digest()

    def _read(self, keys: list[bytes]) -> dict[bytes, Tensor]:
        if not self._readable or not self._path.is_file():
            return {}
        try:
            with closing(sqlite3.connect(self._path, timeout=60)) as store:
                found = {
                    key: store.execute("select value from features where key = ?", [key]).fetchone() for key in keys
                }
        except sqlite3.Error as error:
            self._readable = self._writable = False
            self._warn(error)
            return {}
        values = {key: row[0] for key, row in found.items() if row is not None}
        whole = {key: v for key, v in values.items() if isinstance(v, bytes) and len(v) == 4 * self.dim}
        return {key: torch.from_numpy(np.frombuffer(value, dtype="<f4").copy()) for key, value in whole.items()}

    def _write(self, features: dict[bytes, Tensor]) -> None:
        if not self._writable:
            return
        rows = [(key, value.numpy().astype("<f4").tobytes()) for key, value in features.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=60)) as store, store:
                store.execute("create table if not exists features (key blob primary key, value blob) without rowid")
                store.executemany("insert or replace into features values (?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            self._writable = False
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        warnings.warn(f"features of clips are not kept, {self._path} cannot be used: {error}", stacklevel=2)
