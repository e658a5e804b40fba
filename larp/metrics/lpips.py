"""LPIPS: perceptual distance of two clips, frame by frame, by features of VGG16 or AlexNet; metric and training loss.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1.
Letters: B clips, T frames, H x W pixels, C channels of one feature map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from larp.metrics.weights import LPIPS, LPIPS_ALEXNET, LPIPS_HEADS, VGG16, WeightsMissing
from larp.models.losses import check_pair

import torch
from torch import Tensor, nn

Net = Literal["vgg16", "alexnet"]
SOURCES = {"vgg16": LPIPS, "alexnet": LPIPS_ALEXNET}
"""The published weights of each network."""
# Output channels of the 13 convolutions; "pool" halves the resolution.
_VGG16_LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
# The five feature maps that are compared: index in `features` and number of channels.
_TAPS = {
    "vgg16": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
    "alexnet": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
}
SMALLEST = 16
"""Minimum of height and width in pixels for VGG16: smaller frames leave some layers without a feature map."""
_SMALLEST = {"vgg16": SMALLEST, "alexnet": 31}
# Normalisation of images in [-1, 1] in LPIPS 0.1, close to ImageNet's mean and standard deviation.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for outputs in _VGG16_LAYERS:
        if outputs == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            channels = outputs
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for outputs, kernel, stride, padding, pooled in (
        (64, 11, 4, 2, False),
        (192, 5, 1, 2, True),
        (384, 3, 1, 1, True),
        (256, 3, 1, 1, False),
        (256, 3, 1, 1, False),
    ):
        if pooled:
            layers.append(nn.MaxPool2d(3, 2))
        layers += [nn.Conv2d(channels, outputs, kernel, stride, padding), nn.ReLU(inplace=True)]
        channels = outputs
    return nn.Sequential(*layers)


class Lpips(nn.Module):
    """LPIPS with VGG16 or AlexNet; frozen, always in evaluation mode, differentiable in its inputs.

    The constructor gives random weights, for tests; `Lpips.load` reads the published ones. State keys are
    `features.N.weight` and `features.N.bias`, as in torchvision's networks, and `heads.i` (1, C, 1, 1).
    """

    def __init__(self, net: Net = "vgg16") -> None:
        super().__init__()
        if net not in SOURCES:
            raise ValueError(f"LPIPS has no network '{net}': choose vgg16 or alexnet")
        self.net = net
        # cuDNN's and oneDNN's 16-bit convolutions are faster with channels last.
        features = _vgg16() if net == "vgg16" else _alexnet()
        self.features = features.to(memory_format=torch.channels_last)
        self.heads = nn.ParameterList(nn.Parameter(torch.full((1, c, 1, 1), 1 / c)) for c in _TAPS[net].values())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.weights_hash = "random weights"
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Lpips:
        """Stay in evaluation mode, also as a part of a module in training mode."""
        return super().train(False)

    @classmethod
    def load(cls, path: str | Path | None = None, net: Net = "vgg16", dtype: torch.dtype = torch.float32) -> Lpips:
        """Return LPIPS with the published weights.

        Args:
            path: a safetensors file of `larp-mllm fetch`. By default VGG16 uses the authors' two files if both exist
                (LARP_VGG16 and LARP_LPIPS, else the cache folder), otherwise the fetched file in the cache folder
                (LARP_CACHE, by default ~/.cache/larp). AlexNet uses the fetched file.
            net: the network.
            dtype: of the convolutions, and outside autocast of their computation. The fetched file stores float16.

        Raises WeightsMissing, which states where to place the files, and ValueError if a file is not the published one or
        lacks a tensor.
        """
        # Loading must not change the random numbers of a training.
        with torch.random.fork_rng(devices=[]):
            model = cls(net)
        source = SOURCES[net]
        files = source.find() if path is None else (Path(path),)
        if not files:
            raise WeightsMissing(f"LPIPS needs its weights, which were not found. {source.remedy}")
        if len(files) == 2:
            state, model.weights_hash = _authors(model, *files)
        else:
            state, model.weights_hash = source.read(files[0])
        model.load_state_dict({key: _tensor(state, key, like, files[0]) for key, like in model.state_dict().items()})
        model.features.to(dtype)
        return model

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair of clips, a and b (B, 3, T, H, W) in [0, 1]: (B,) float32, mean over frames.

        Convolutions run in the dtype of their weights or of autocast, normalisation and distance in float32. An input
        without gradient stores no activations. Values outside [0, 1] are not clamped, as training needs. Raises
        ValueError for different shapes and for frames smaller than 16x16 (AlexNet: 31x31).
        """
        check_pair(a, b, "lpips")
        smallest = _SMALLEST[self.net]
        if min(a.shape[-2:]) < smallest:
            raise ValueError(f"lpips: frames of {a.shape[-2]}x{a.shape[-1]} are smaller than {smallest}x{smallest}")
        batch, frames = a.shape[0], a.shape[2]
        x, y = (self._normalised(clip) for clip in (a, b))
        total = torch.zeros(len(x), device=x.device)
        heads = iter(self.heads)
        for index, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if index in _TAPS[self.net]:
                difference = (_unit(x.float()) - _unit(y.float())).square()
                total = total + (next(heads).float() * difference).sum(dim=1).mean(dim=(1, 2))
        return total.view(batch, frames).mean(dim=1)

    def _normalised(self, clip: Tensor) -> Tensor:
        images = clip.float().transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return ((images * 2 - 1 - self.shift.float()) / self.scale.float()).to(self.features[0].weight.dtype)


class MeanLpips(nn.Module):
    """The mean of LPIPS with VGG16 and with AlexNet, for training: each alone is fooled in its own way."""

    def __init__(self, *nets: Lpips) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    @classmethod
    def load(cls) -> MeanLpips:
        """Return it with the published weights; errors as of `Lpips.load`."""
        return cls(Lpips.load(net="vgg16"), Lpips.load(net="alexnet"))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair of clips, as `Lpips.forward` does."""
        return torch.stack([net(a, b) for net in self.nets]).mean(dim=0)


def available(net: Net = "vgg16") -> bool:
    """Whether the weights are found. Raises WeightsMissing if an environment variable names a missing file."""
    return bool(SOURCES[net].find())


def _unit(features: Tensor) -> Tensor:
    # vector_norm has gradient 0 at the zero vector; the root of a sum of squares would have an infinite one.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _authors(model: Lpips, vgg16: Path, heads: Path) -> tuple[dict[str, Tensor], str]:
    """Return the state of `model` from torchvision's VGG16 file and the authors' heads, and the SHA-256 of both."""
    hashes = VGG16.verify(vgg16), LPIPS_HEADS.verify(heads)
    backbone, linear = (torch.load(path, map_location="cpu", weights_only=True) for path in (vgg16, heads))
    state = {key: value for key, value in backbone.items() if key.startswith("features")}
    for number, like in enumerate(model.heads):
        state[f"heads.{number}"] = _tensor(linear, f"lin{number}.model.1.weight", like, heads)
    return state, " ".join(hashes)


def _tensor(stored: dict, key: str, like: Tensor, path: Path) -> Tensor:
    if key not in stored or stored[key].shape != like.shape:
        got = tuple(stored[key].shape) if key in stored else "nothing"
        raise ValueError(f"{path}: tensor {key} must have shape {tuple(like.shape)}, the file holds {got}")
    return stored[key].float()
