"""How well a tokenizer gives clips back: one pass over a set serves training's validation and the evaluator alike.

Shapes: B videos, N tokens, K codebook size.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from larp.data.clips import clip_to_frames, contact_sheet, side_by_side
from larp.data.video import write_video
from larp.metrics.frames import mean_colour, psnr, ssim
from larp.quantizer import usage
from larp.tokenizer import LarpTokenizer

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


@dataclass
class Reconstruction:
    """Figures of a set of clips, and some of the clips themselves.

    metrics: psnr and ssim (means over videos), mean_colour_psnr (the baseline), codes_used and perplexity of the codes, prior_top1
        and prior_top5 (teacher-forced, greedy codes) and prior_bits (per token) if the tokenizer has a prior, num_clips.
    codes: (n, N) int64. originals, reconstructions: uint8 (T, H, W, 3) of clips from all over the set.
    """

    metrics: dict[str, float]
    codes: Tensor
    originals: list[np.ndarray] = field(default_factory=list)
    reconstructions: list[np.ndarray] = field(default_factory=list)

    def write(self, stem: str, fps: float) -> tuple[str, str]:
        """Write `stem`.mp4 (originals left of reconstructions) and `stem`.png (a contact sheet); return both names."""
        pairs = [np.concatenate(pair, axis=2) for pair in zip(self.originals, self.reconstructions, strict=True)]
        write_video(f"{stem}.mp4", side_by_side(self.originals, self.reconstructions), fps)
        contact_sheet(pairs[:8], ["original | reconstruction"] * len(pairs[:8]), f"{stem}.png", columns=4, cell=96)
        return f"{stem}.mp4", f"{stem}.png"


@torch.no_grad()
def reconstruct(model: LarpTokenizer, batches: Collection[dict], keep: int = 8, device="cpu") -> Reconstruction:
    """Encode and decode every clip of `batches` (dicts with `clip`, as `larp.data.loader.iterate_once` yields them).

    Codes are the nearest ones and the output is clamped, as at use. The model is left in the mode it came in.
    """
    training = model.training
    model.eval()
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
        rows = {"psnr": psnr(clip, again), "ssim": ssim(clip, again), "mean_colour_psnr": psnr(clip, mean_colour(clip))}
        if out.prior is not None:
            bits = out.prior.loss / np.log(2)
            each = {"prior_top1": out.prior.top1, "prior_top5": out.prior.top5, "prior_bits": bits}
            rows |= {name: value.float().expand(len(clip)) for name, value in each.items()}
        for name, values in rows.items():
            figures.setdefault(name, []).append(values.cpu())
        codes.append(out.quantized.codes.cpu())
        for i in range(min(len(clip), shown[number])):
            result.originals.append(clip_to_frames(clip[i]))
            result.reconstructions.append(clip_to_frames(again[i]))
    model.train(training)
    if not codes:
        raise ValueError("there is no clip to reconstruct: the set is empty, or none of its videos could be read")
    result.codes = torch.cat(codes)
    result.metrics = {name: torch.cat(values).double().mean().item() for name, values in figures.items()}
    result.metrics |= usage(result.codes, model.codebook_size) | {"num_clips": len(result.codes)}
    return result
