"""Videos that are no files of their own, such as members of a tar file: read into memory, never written to disk."""

from __future__ import annotations

import io
import threading
from abc import ABC, abstractmethod
from types import SimpleNamespace

_last = threading.local()


class StoredVideo(ABC):
    """Takes the place of a Path in `larp.data.listing.VideoItem.path`; str() says where the video lies.

    Subclasses are frozen dataclasses: equal ones hold the same bytes.
    """

    @abstractmethod
    def read(self) -> bytes:
        """Return the bytes of the video. Raises OSError or ValueError."""

    @abstractmethod
    def stat(self) -> SimpleNamespace:
        """Return st_size in bytes and st_mtime_ns, as os.stat does for a file."""

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Return the bytes as a seekable file."""
        # A loader opens each video twice in a row, for the number of frames and for the frames.
        if getattr(_last, "video", None) != self:
            _last.video, _last.data = None, self.read()
            _last.video = self
        return io.BytesIO(_last.data)

    def is_file(self) -> bool:
        """Whether it is there; what is listed is."""
        return True
