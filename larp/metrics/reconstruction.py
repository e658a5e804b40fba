"""Reconstruction metrics of a tokenizer, for validation in training and for evaluation.

Shapes: B videos, T frames, H x W pixels, N codes of a clip, n clips in all, D feature width.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from larp.data.clips import clip_to_frames
from larp.data.contact_sheet import contact_sheet, side_by_side
from larp.data.video import movies_are_written, write_video
from larp.metrics import lpips
from larp.metrics.frechet import Moments, frechet_distance, real_floor
from larp.metrics.i3d import FVD_NAMES, ClipFeatures, PublishedI3D, TfHubI3D
from larp.metrics.psnr_ssim import mean_colour, ssim
from larp.metrics.weights import I3D_KINETICS, LPIPS
from larp.models.losses import psnr
from larp.models.quantizer import usage
from larp.models.tokenizer import LarpTokenizer, TokenizerOutput

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


@dataclass
class Reconstruction:
    """Metrics of a set of clips, and examples."""

    metrics: dict[str, float]
    """psnr in dB and ssim (means over videos), mean_colour_psnr (the baseline), codes_used and perplexity of the codes,
    num_clips; with a prior its prior_top1 and prior_top5 (teacher-forced) and prior_bits per code; and those of
    `ValidationMetrics`."""
    codes: Tensor
    """(n, N) int64."""
    originals: list[np.ndarray] = field(default_factory=list)
    """uint8 (T, H, W, 3) of clips spaced evenly over the set."""
    reconstructions: list[np.ndarray] = field(default_factory=list)
    """uint8 (T, H, W, 3) of the same clips."""

    def write(self, stem: str, fps: float) -> tuple[str, ...]:
        """Write `stem`.png, a contact sheet, and with PyAV `stem`.mp4, originals left of reconstructions; return the names."""
        pairs = [np.concatenate(pair, axis=2) for pair in zip(self.originals, self.reconstructions, strict=True)]
        contact_sheet(pairs[:8], ["original | reconstruction"] * len(pairs[:8]), f"{stem}.png", columns=4, cell=96)
        if not movies_are_written():
            return (f"{stem}.png",)
        write_video(f"{stem}.mp4", side_by_side(self.originals, self.reconstructions), fps)
        return f"{stem}.mp4", f"{stem}.png"


class ValidationMetrics:
    """LPIPS and the features of a Frechet distance, accumulated over batches.

    Args:
        features: feature extractor, or None.
        perceptual: LPIPS, or None.

    Attributes:
        real, decoded: features (B, D) of each batch since `reset`.
        distances: LPIPS (B,) of each batch since `reset`.
        notes: the metrics that are not measured, and why, one sentence each.
    """

    def __init__(self, features: ClipFeatures | None = None, perceptual: lpips.Lpips | None = None):
        self.features, self.perceptual = features, perceptual
        self.notes: list[str] = []
        self.reset()

    @classmethod
    def with_available_weights(
        cls, clip_shape: tuple[int, int, int], device="cpu", perceptual: lpips.Lpips | None = None
    ) -> "ValidationMetrics":
        """Return the metrics for clips of shape (T, H, W) whose published weights are found.

        `perceptual` is an LPIPS that is already loaded. Raises ValueError for a weight file that is not the published one.
        """
        notes = []
        if min(clip_shape[1:]) < lpips.SMALLEST:
            perceptual = None
            notes.append(f"validation without LPIPS, which needs frames of {lpips.SMALLEST} pixels")
        elif perceptual is None and lpips.available():
            perceptual = lpips.Lpips.load().to(device)
        elif perceptual is None:
            notes.append(f"validation without LPIPS: its weights were not found. {LPIPS.remedy}")
        features = None
        if clip_shape[0] < PublishedI3D.min_frames:
            notes.append(f"validation without rFVD, which needs clips of {PublishedI3D.min_frames} frames")
        elif not (found := I3D_KINETICS.find()):
            notes.append(f"validation without rFVD: its weights were not found. {I3D_KINETICS.remedy}")
        elif found != (I3D_KINETICS.converted,):
            features = PublishedI3D(device=device)
        elif torch.device(device).type == "cpu":
            notes.append(
                "validation without rFVD, whose features take a second a clip on a CPU: eval/ucf_rfvd.py measures it"
            )
        else:
            features = TfHubI3D(device=device)
        metrics = cls(features, perceptual)
        metrics.notes = notes
        return metrics

    def reset(self) -> None:
        """Discard all batches."""
        self.real, self.decoded, self.distances = [], [], []

    def update(self, clip: Tensor, reconstruction: Tensor) -> None:
        """Add a batch of clips (B, 3, T, H, W) and its reconstructions, both in [0, 1]."""
        if self.features is not None:
            self.real.append(self.features(clip))
            self.decoded.append(self.features(reconstruction))
        if self.perceptual is not None:
            self.distances.append(self.perceptual(clip, reconstruction).cpu())

    def compute(self) -> dict[str, float]:
        """Return lpips, rfvd, and rfvd_floor, the expected score of real clips in place of decoded ones.

        rFVD needs the published features and at least four clips. Its floor is measured between halves of the set and
        extrapolated to its size as 1 / n.
        """
        figures = {"lpips": torch.cat(self.distances).double().mean().item()} if self.distances else {}
        if self.features is None or self.features.name not in FVD_NAMES or sum(map(len, self.real)) < 4:
            return figures
        real, decoded = torch.cat(self.real), torch.cat(self.decoded)
        floor, size = real_floor(real, len(real), seed=0)
        return figures | {
            "rfvd": frechet_distance(Moments.of(real), Moments.of(decoded)),
            "rfvd_floor": floor * size / len(real),
        }


@torch.no_grad()
def reconstruct(
    model: LarpTokenizer,
    batches: Collection[dict],
    examples: int = 8,
    device="cpu",
    metrics: ValidationMetrics | None = None,
) -> Reconstruction:
    """Encode and decode every clip of `batches` with the nearest codes, and compare the clamped output.

    The model is in evaluation mode meanwhile. Metrics are computed in float32, also under autocast.

    Args:
        model: the tokenizer.
        batches: dicts with `clip`, as from `larp.data.loader.iterate_once`.
        examples: number of clips to return.
        device: of the model.
        metrics: further metrics; reset first.

    Raises ValueError if there is no clip.
    """
    training = model.training
    model.eval()
    metrics = metrics or ValidationMetrics()
    metrics.reset()
    columns: dict[str, list[Tensor]] = {}
    result = Reconstruction({}, torch.empty(0, model.num_tokens, dtype=torch.int64))
    codes = []
    # Evenly spaced batches, so that the examples of a set sorted by class show many classes.
    shown = Counter(round(place * (len(batches) - 1) / max(1, examples - 1)) for place in range(examples))
    bar = tqdm(batches, desc="reconstructing", unit="batch", delay=2, leave=False)
    for number, batch in enumerate(bar):
        clip = batch["clip"].to(device)
        out = model(clip)
        decoded = out.reconstruction.float().clamp(0, 1)
        with torch.autocast(clip.device.type, enabled=False):
            for name, values in clip_metrics(clip, decoded, out).items():
                columns.setdefault(name, []).append(values.cpu())
            metrics.update(clip, decoded)
        codes.append(out.quantized.codes.cpu())
        for i in range(min(len(clip), shown[number])):
            result.originals.append(clip_to_frames(clip[i]))
            result.reconstructions.append(clip_to_frames(decoded[i]))
    model.train(training)
    if not codes:
        raise ValueError("there is no clip to reconstruct: the set is empty, or none of its videos could be read")
    result.codes = torch.cat(codes)
    result.metrics = {name: torch.cat(values).double().mean().item() for name, values in columns.items()}
    result.metrics |= usage(result.codes, model.codebook_size) | {"num_clips": len(result.codes)} | metrics.compute()
    return result


def clip_metrics(clip: Tensor, decoded: Tensor, out: TokenizerOutput) -> dict[str, Tensor]:
    """Return the metrics of each clip of a batch, (B,): its similarity to `decoded`, and the accuracy of the prior."""
    rows = {"psnr": psnr(clip, decoded), "ssim": ssim(clip, decoded), "mean_colour_psnr": psnr(clip, mean_colour(clip))}
    if out.prior is not None:
        bits = out.prior.loss / np.log(2)
        each = {"prior_top1": out.prior.top1, "prior_top5": out.prior.top5, "prior_bits": bits}
        rows |= {name: value.float().expand(len(clip)) for name, value in each.items()}
    return rows
