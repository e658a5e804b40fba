"""Where the published weights of the metrics lie on this machine, and whether they are the published ones.

Nothing here touches the network: `larp-mllm fetch` gets what is missing (`larp.metrics.fetching`).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


class WeightsMissing(ValueError):
    """A weight file is not where it was looked for; the message names the file and the places."""


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of weights below a model's folder, by its path in it: what a figure was measured of."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*.safetensors"))}


def cache_folder() -> Path:
    """The folder in which weight files are looked for: LARP_CACHE, by default ~/.cache/larp."""
    return Path(os.environ.get("LARP_CACHE") or Path.home() / ".cache" / "larp")


@dataclass(frozen=True)
class WeightFile:
    """One published file of weights."""

    filename: str
    """Its name in the cache folder."""
    variable: str
    """Environment variable that may hold its path."""
    url: str
    """Where its authors publish it."""
    sha256: str
    """Hex digest of the published file."""
    what: str
    """What it holds, for messages."""
    size: int = 0
    """Bytes, about; 0 if unknown."""

    def find(self, path: str | Path | None = None) -> Path | None:
        """The file at `path`, else at the environment variable, else in the cache folder; None if it is in none.

        A path that was given (argument or variable) must exist: WeightsMissing otherwise.
        """
        for source, given in (("the given path", path), (self.variable, os.environ.get(self.variable))):
            if given:
                if not Path(given).is_file():
                    raise WeightsMissing(f"{source} names {given}, which does not exist. {self.remedy}")
                return Path(given)
        cached = cache_folder() / self.filename
        return cached if cached.is_file() else None

    def locate(self, path: str | Path | None = None) -> Path:
        """As `find`, but WeightsMissing, naming the file and where to place it, instead of None."""
        found = self.find(path)
        if found is None:
            raise WeightsMissing(f"{self.what}: weights not found. {self.remedy}")
        return found

    @property
    def remedy(self) -> str:
        """One sentence: which file to place where."""
        return (
            f"Place {self.filename} (from {self.url}) at {cache_folder() / self.filename}, or set {self.variable} "
            f"to its path, or run `larp-mllm fetch` on a machine with a network."
        )

    def verify(self, path: Path) -> str:
        """The SHA-256 of `path`; ValueError naming the file if it is not the published one."""
        digest = file_sha256(path)
        if digest != self.sha256:
            raise ValueError(
                f"{path}: not the published {self.filename}: SHA-256 is {digest}, expected {self.sha256}. {self.remedy}"
            )
        return digest


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


I3D_STYLEGANV = WeightFile(
    filename="i3d_torchscript.pt",
    variable="LARP_I3D",
    url="https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    sha256="bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    what="I3D (Kinetics-400, StyleGAN-V torchscript)",
    size=51_000_000,
)
VGG16 = WeightFile(
    filename="vgg16-397923af.pth",
    variable="LARP_VGG16",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    what="VGG16 (torchvision, ImageNet)",
    size=553_000_000,
)
LPIPS_HEADS = WeightFile(
    filename="lpips_vgg.pth",
    variable="LARP_LPIPS",
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    what="LPIPS heads v0.1 for VGG16",
    size=7_000,
)
