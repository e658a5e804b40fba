"""How well a tokenizer gives clips back: one pass over a set serves training's validation and the evaluator alike.

Shapes: B videos, N tokens, K codebook size.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from larp.data.clips import clip_to_frames
from larp.data.contact_sheet import contact_sheet, side_by_side
from larp.data.video import movies_are_written, write_video
from larp.metrics import lpips
from larp.metrics.frechet import Moments, frechet_distance, real_floor
from larp.metrics.i3d import PUBLISHED_NAME, ClipFeatures, PublishedI3D
from larp.metrics.psnr_ssim import mean_colour, ssim
from larp.metrics.sources import I3D_KINETICS, LPIPS
from larp.models.losses import psnr
from larp.models.quantizer import usage
from larp.models.tokenizer import LarpTokenizer, TokenizerOutput

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


@dataclass
class Reconstruction:
    """Figures of a set of clips, and some of the clips themselves.

    metrics: psnr and ssim (means over videos), mean_colour_psnr (the baseline), codes_used and perplexity of the codes, prior_top1
        and prior_top5 (teacher-forced, greedy codes) and prior_bits (per token) if the tokenizer has a prior, num_clips, and what
        a `ValidationMetrics` adds.
    codes: (n, N) int64. originals, reconstructions: uint8 (T, H, W, 3) of clips from all over the set.
    """

    metrics: dict[str, float]
    codes: Tensor
    originals: list[np.ndarray] = field(default_factory=list)
    reconstructions: list[np.ndarray] = field(default_factory=list)

    def write(self, stem: str, fps: float) -> tuple[str, ...]:
        """Write `stem`.mp4 (originals left of reconstructions; not without PyAV) and `stem`.png (a contact sheet); return the names."""
        pairs = [np.concatenate(pair, axis=2) for pair in zip(self.originals, self.reconstructions, strict=True)]
        contact_sheet(pairs[:8], ["original | reconstruction"] * len(pairs[:8]), f"{stem}.png", columns=4, cell=96)
        if not movies_are_written():
            return (f"{stem}.png",)
        write_video(f"{stem}.mp4", side_by_side(self.originals, self.reconstructions), fps)
        return f"{stem}.mp4", f"{stem}.png"


class ValidationMetrics:
    """Looks on while clips are reconstructed: LPIPS, and the features of a Frechet distance.

    Args:
        features: of real and of decoded clips; None leaves them out.
        perceptual: None leaves LPIPS out.

    real, decoded: features of each batch, (b, D). distances: LPIPS of each batch, (b,). All are of the last pass.
    notes: what is not measured, and why; a sentence each.
    """

    def __init__(self, features: ClipFeatures | None = None, perceptual: lpips.Lpips | None = None):
        self.features, self.perceptual = features, perceptual
        self.notes: list[str] = []
        self.start()

    @classmethod
    def at_hand(
        cls, clip_shape: tuple[int, int, int], device="cpu", perceptual: lpips.Lpips | None = None
    ) -> "ValidationMetrics":
        """What validation can measure here of clips (T, H, W): LPIPS and rFVD, each where its published weights are at hand.

        `perceptual` is an LPIPS that is loaded already. Raises ValueError for a weight file that is not the published one.
        """
        notes = []
        if min(clip_shape[1:]) < lpips.SMALLEST:
            perceptual = None
            notes.append(f"validation without LPIPS, which needs frames of {lpips.SMALLEST} pixels")
        elif perceptual is None and lpips.available():
            perceptual = lpips.Lpips.load().to(device)
        elif perceptual is None:
            notes.append(f"validation without LPIPS: its weights are not at hand. {LPIPS.remedy}")
        features = None
        if clip_shape[0] < PublishedI3D.min_frames:
            notes.append(f"validation without rFVD, which needs clips of {PublishedI3D.min_frames} frames")
        elif not I3D_KINETICS.find():
            notes.append(f"validation without rFVD: its weights are not at hand. {I3D_KINETICS.remedy}")
        else:
            features = PublishedI3D(device=device)
        watch = cls(features, perceptual)
        watch.notes = notes
        return watch

    def start(self) -> None:
        """Forget the last pass."""
        self.real, self.decoded, self.distances = [], [], []

    def see(self, clip: Tensor, again: Tensor) -> None:
        """Take in a batch of clips (B, 3, T, H, W) and its reconstructions, both in [0, 1]."""
        if self.features is not None:
            self.real.append(self.features(clip))
            self.decoded.append(self.features(again))
        if self.perceptual is not None:
            self.distances.append(self.perceptual(clip, again).cpu())

    def metrics(self) -> dict[str, float]:
        """Return what the pass gave: lpips; rfvd, and rfvd_floor, which real clips in place of decoded ones would score.

        rFVD needs the published features and four clips. Its floor comes from halves of the set and falls as 1 / clips.
        """
        figures = {"lpips": torch.cat(self.distances).double().mean().item()} if self.distances else {}
        if self.features is None or self.features.name != PUBLISHED_NAME or sum(map(len, self.real)) < 4:
            return figures
        real, decoded = torch.cat(self.real), torch.cat(self.decoded)
        floor, size = real_floor(real, len(real), seed=0)
        return figures | {
            "rfvd": frechet_distance(Moments.of(real), Moments.of(decoded)),
            "rfvd_floor": floor * size / len(real),
        }


@torch.no_grad()
def reconstruct(
    model: LarpTokenizer, batches: Collection[dict], keep: int = 8, device="cpu", watch: ValidationMetrics | None = None
) -> Reconstruction:
    """Encode and decode every clip of `batches` (dicts with `clip`, as `larp.data.loader.iterate_once` yields them).

    Codes are the nearest ones and the output is clamped, as at use; figures are computed in float32, also under autocast. `watch`
    sees every batch, and its metrics join the others. The model is left in the mode it came in.
    """
    training = model.training
    model.eval()
    watch = watch or ValidationMetrics()
    watch.start()
    figures: dict[str, list[Tensor]] = {}
    result = Reconstruction({}, torch.empty(0, model.num_tokens, dtype=torch.int64))
    codes = []
    # From all over the pass: a set sorted by class then shows every class.
    shown = Counter(round(place * (len(batches) - 1) / max(1, keep - 1)) for place in range(keep))
    bar = tqdm(batches, desc="reconstructing", unit="batch", delay=2, leave=False)
    for number, batch in enumerate(bar):
        clip = batch["clip"].to(device)
        out = model(clip)
        again = out.reconstruction.float().clamp(0, 1)
        with torch.autocast(clip.device.type, enabled=False):
            for name, values in figures_of(clip, again, out).items():
                figures.setdefault(name, []).append(values.cpu())
            watch.see(clip, again)
        codes.append(out.quantized.codes.cpu())
        for i in range(min(len(clip), shown[number])):
            result.originals.append(clip_to_frames(clip[i]))
            result.reconstructions.append(clip_to_frames(again[i]))
    model.train(training)
    if not codes:
        raise ValueError("there is no clip to reconstruct: the set is empty, or none of its videos could be read")
    result.codes = torch.cat(codes)
    result.metrics = {name: torch.cat(values).double().mean().item() for name, values in figures.items()}
    result.metrics |= usage(result.codes, model.codebook_size) | {"num_clips": len(result.codes)} | watch.metrics()
    return result


def figures_of(clip: Tensor, again: Tensor, out: TokenizerOutput) -> dict[str, Tensor]:
    """The figures of each clip of a batch (B,): its likeness to its reconstruction, and how the prior did."""
    rows = {"psnr": psnr(clip, again), "ssim": ssim(clip, again), "mean_colour_psnr": psnr(clip, mean_colour(clip))}
    if out.prior is not None:
        bits = out.prior.loss / np.log(2)
        each = {"prior_top1": out.prior.top1, "prior_top5": out.prior.top5, "prior_bits": bits}
        rows |= {name: value.float().expand(len(clip)) for name, value in each.items()}
    return rows
