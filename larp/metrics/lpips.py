"""LPIPS: the distance of two clips in the feature space of VGG16 or AlexNet, frame by frame; metric and training loss.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1.
Letters: B clips, T frames, H x W pixels, C channels of one feature map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from larp.metrics.sources import LPIPS, LPIPS_ALEXNET
from larp.metrics.weights import LPIPS_HEADS, VGG16, WeightsMissing
from larp.models.losses import check_pair

import torch
from torch import Tensor, nn

Net = Literal["vgg16", "alexnet"]
SOURCES = {"vgg16": LPIPS, "alexnet": LPIPS_ALEXNET}
"""The rows of `larp.metrics.sources` that hold the published weights of each network."""
# Channels of the 13 convolutions; "pool" halves the resolution. Positions in the list expand to torchvision's indices.
_VGG16_LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
# Index in `features` of the five feature maps that are compared, with the channels there.
_TAPS = {
    "vgg16": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
    "alexnet": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
}
SMALLEST = 16
"""Pixels of the shorter side of a frame that still gives every layer of VGG16 a feature map."""
_SMALLEST = {"vgg16": SMALLEST, "alexnet": 31}
# The normalisation that LPIPS 0.1 applies to images in [-1, 1]: nearly ImageNet's mean and deviation.
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

    Built with torch's random weights (tests); `Lpips.load` reads the published ones. State keys: `features.N.weight`
    and `.bias` as in torchvision's networks, and `heads.i` (1, C, 1, 1).
    """

    def __init__(self, net: Net = "vgg16") -> None:
        super().__init__()
        if net not in SOURCES:
            raise ValueError(f"LPIPS has no network '{net}': choose vgg16 or alexnet")
        self.net = net
        # cuDNN's and oneDNN's 16-bit convolutions want the channels last.
        features = _vgg16() if net == "vgg16" else _alexnet()
        self.features = features.to(memory_format=torch.channels_last)
        self.heads = nn.ParameterList(nn.Parameter(torch.full((1, c, 1, 1), 1 / c)) for c in _TAPS[net].values())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.weights_hash = "random weights"
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode: it is a fixed yardstick, also inside a module that is set to train."""
        return super().train(False)

    @classmethod
    def load(cls, path: str | Path | None = None, net: Net = "vgg16", dtype: torch.dtype = torch.float32) -> Lpips:
        """LPIPS with the published weights.

        Args:
            path: a safetensors file of `larp-mllm fetch`. Without it, VGG16 takes the authors' two files where both are at
                hand (LARP_VGG16 and LARP_LPIPS, else the cache folder), else the fetched file in the cache folder
                (~/.cache/larp, or LARP_CACHE); AlexNet takes the fetched one.
            dtype: of the convolutions, and of their products outside autocast. The stored float16 is no limit here.

        WeightsMissing names the files and where to place them; ValueError if a file is not the published one, or a tensor
        is missing.
        """
        # Whether the weights are at hand must not change what a training samples afterwards.
        with torch.random.fork_rng(devices=[]):
            model = cls(net)
        source = SOURCES[net]
        files = source.find() if path is None else (Path(path),)
        if not files:
            raise WeightsMissing(f"LPIPS needs its weights, and they are not at hand. {source.remedy}")
        if len(files) == 2:
            state, model.weights_hash = _authors(model, *files)
        else:
            state, model.weights_hash = source.read(files[0])
        model.load_state_dict({key: _tensor(state, key, like, files[0]) for key, like in model.state_dict().items()})
        model.features.to(dtype)
        return model

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair of clips: a, b (B, 3, T, H, W) in [0, 1] -> (B,) float32, mean over frames.

        Convolutions run in the type of their weights, or in autocast's; normalisation and distance in float32. Nothing
        is kept for the gradient of a side that asks for none. Values outside [0, 1] are taken as they are (training
        losses need unclamped outputs). ValueError for shapes that differ or frames smaller than 16x16 (AlexNet: 31x31).
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


def available(net: Net = "vgg16") -> bool:
    """Whether the weights of LPIPS are at hand; WeightsMissing if an environment variable names a file that does not exist."""
    return bool(SOURCES[net].find())


def _unit(features: Tensor) -> Tensor:
    # The gradient of this norm at an all-zero vector is zero; of the root of a sum of squares it would be infinite.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _authors(model: Lpips, vgg16: Path, heads: Path) -> tuple[dict[str, Tensor], str]:
    """The state of `model` from torchvision's VGG16 file and the authors' heads for it, and the SHA-256 of both."""
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
