"""LPIPS: the distance of two clips in VGG16 feature space, frame by frame; metric and training loss.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1.
Letters: B clips, T frames, H x W pixels, C channels of one feature map.
"""

from __future__ import annotations

from pathlib import Path

from larp.metrics.frames import check_pair
from larp.metrics.weights import LPIPS_HEADS, VGG16, WeightFile, WeightsMissing

import torch
from torch import Tensor, nn

# Channels of the 13 convolutions; "pool" halves the resolution. Positions in the list expand to torchvision's indices.
_VGG16_LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
# Index in `features` of relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, with the channels there.
_TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
SMALLEST = 16
"""Pixels of the shorter side of a frame that still gives every layer a feature map."""
REMEDY = (
    f"place {VGG16.filename} and {LPIPS_HEADS.filename} in ~/.cache/larp, or set {VGG16.variable} and "
    f"{LPIPS_HEADS.variable} to their paths, or run `python -m larp.metrics.weights` to fetch both"
)
# The normalisation that LPIPS 0.1 applies to images in [-1, 1]: nearly ImageNet's mean and deviation.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def _vgg16_features() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for outputs in _VGG16_LAYERS:
        if outputs == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
            channels = outputs
    return nn.Sequential(*layers)


class Lpips(nn.Module):
    """LPIPS with VGG16; frozen, always in evaluation mode, differentiable in its inputs.

    Built with torch's random weights (tests); `Lpips.load` reads the published ones. State keys: `features.N.weight`
    and `.bias` as in torchvision's VGG16, and `heads.i` (1, C, 1, 1).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = _vgg16_features()
        self.heads = nn.ParameterList(nn.Parameter(torch.full((1, c, 1, 1), 1 / c)) for c in _TAPS.values())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.weights_hash = "random weights"
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode: it is a fixed yardstick, also inside a module that is set to train."""
        return super().train(False)

    @classmethod
    def load(
        cls,
        vgg16: str | Path | None = None,
        heads: str | Path | None = None,
        sources: tuple[WeightFile, WeightFile] = (VGG16, LPIPS_HEADS),
    ) -> Lpips:
        """LPIPS with the published weights: torchvision's VGG16 file and the LPIPS 0.1 heads for it.

        Each is looked for at its path, at LARP_VGG16 / LARP_LPIPS, and in ~/.cache/larp. WeightsMissing names both
        files and where to place them; ValueError if a file's SHA-256 is not that of its source, or a tensor is missing.
        """
        try:
            paths = [source.locate(path) for source, path in zip(sources, (vgg16, heads), strict=True)]
        except WeightsMissing as error:
            raise WeightsMissing(f"LPIPS needs two files, and one is missing: {error} Both: {REMEDY}") from None
        hashes = [source.verify(path) for source, path in zip(sources, paths, strict=True)]
        model = cls()
        backbone, linear = (torch.load(path, map_location="cpu", weights_only=True) for path in paths)
        state = {}
        for key, like in model.state_dict().items():
            kind, _, rest = key.partition(".")
            stored, name, path = (
                (backbone, key, paths[0]) if kind == "features" else (linear, f"lin{rest}.model.1.weight", paths[1])
            )
            state[key] = _tensor(stored, name, like, path)
        model.load_state_dict(state)
        model.weights_hash = " ".join(hashes)
        return model

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair of clips: a, b (B, 3, T, H, W) in [0, 1] -> (B,) float32, mean over frames.

        Values outside [0, 1] are taken as they are (training losses need unclamped outputs). ValueError for shapes that
        differ or frames smaller than 16x16.
        """
        check_pair(a, b, "lpips")
        if min(a.shape[-2:]) < SMALLEST:
            raise ValueError(f"lpips: frames of {a.shape[-2]}x{a.shape[-1]} are smaller than {SMALLEST}x{SMALLEST}")
        batch, frames = a.shape[0], a.shape[2]
        x, y = (self._normalised(clip) for clip in (a, b))
        total = torch.zeros(len(x), device=x.device)
        for index, layer in enumerate(self.features[: max(_TAPS) + 1]):
            x, y = layer(x), layer(y)
            if index in _TAPS:
                head = self.heads[list(_TAPS).index(index)]
                difference = (_unit(x) - _unit(y)).square()
                total = total + (head * difference).sum(dim=1).mean(dim=(1, 2))
        return total.view(batch, frames).mean(dim=1)

    def _normalised(self, clip: Tensor) -> Tensor:
        images = clip.transpose(1, 2).flatten(0, 1)
        return (images * 2 - 1 - self.shift) / self.scale


def available(vgg16: str | Path | None = None, heads: str | Path | None = None) -> bool:
    """Whether both weight files of LPIPS are at hand; WeightsMissing if a path that was given does not exist."""
    return VGG16.find(vgg16) is not None and LPIPS_HEADS.find(heads) is not None


def _unit(features: Tensor) -> Tensor:
    # The root needs a floor: its gradient at an all-zero feature vector is infinite.
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-20).sqrt().clamp(min=1e-10)


def _tensor(stored: dict, key: str, like: Tensor, path: Path) -> Tensor:
    if key not in stored or stored[key].shape != like.shape:
        got = tuple(stored[key].shape) if key in stored else "nothing"
        raise ValueError(f"{path}: tensor {key} must have shape {tuple(like.shape)}, the file holds {got}")
    return stored[key].float()
