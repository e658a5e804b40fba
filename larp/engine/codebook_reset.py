"""The codes of a tokenizer in training: how many are in use, and new places for those that are not, alike in every process.

Shapes: B clips, N codes of a clip, K codebook size, d length of a code.
"""

from larp.engine.backend import Engine
from larp.engine.distributed import gather, reduce_sum
from larp.models.quantizer import add_counts, usage_of_counts
from larp.models.tokenizer import TokenizerOutput

import torch
import torch.nn.functional as F
from torch import Tensor


class CodebookResetter:
    """Counts the use of codes, stores recent latents, and resets unused codes to stored latents.

    An option of the small recipes, off in the published one: in a short training most codes never leave their initial position.
    The caller gathers codes and latents over all processes first, so that every process makes the same choice.

    Args:
        codebook_size: K.
        memory: number of recent latents to store; by default 8 K, at least 16384.
    """

    def __init__(self, codebook_size: int, memory: int | None = None):
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.memory = memory or max(16384, 8 * codebook_size)
        self.latents = torch.empty(0)

    def observe(self, latents: Tensor, codes: Tensor | None) -> None:
        """Store normalised latents (B, N, d) and count their codes (B, N), unless None."""
        fresh = latents.detach().float().flatten(0, -2)
        self.latents = torch.cat([self.latents.to(fresh).reshape(-1, fresh.shape[-1]), fresh])[-self.memory :]
        if codes is not None:
            self.counts = add_counts(self.counts.to(codes.device), codes)

    def cluster(self, iterations: int = 10, seed: int = 0) -> Tensor:
        """Return a new codebook (K, d) by spherical k-means over the stored latents, and reset the counts."""
        generator = torch.Generator().manual_seed(seed)
        size = len(self.counts)
        centres = self.latents[torch.randint(len(self.latents), (size,), generator=generator)]
        for _ in range(iterations):
            nearest = (self.latents @ centres.T).argmax(-1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, self.latents)
            empty = (torch.bincount(nearest, minlength=size) == 0)[:, None]
            sums = torch.where(
                empty, self.latents[torch.randint(len(self.latents), (size,), generator=generator)], sums
            )
            centres = F.normalize(sums, dim=-1)
        self.counts.zero_()
        return centres

    def idle(self) -> Tensor:
        """Return the codes not used since the counts were last reset, (M,) int64."""
        return (self.counts == 0).nonzero().squeeze(-1)

    def resample(self, codebook: Tensor, codes: Tensor, seed: int) -> Tensor:
        """Return a copy of the codebook (K, d) whose rows `codes` (M,) are stored latents, and reset the counts."""
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(self.latents), (len(codes),), generator=generator)
        # The noise separates codes that got the same latent.
        rows = self.latents[picks]
        rows = rows + 0.01 * torch.randn(rows.shape, generator=generator).to(rows)
        renewed = codebook.detach().clone()
        renewed[codes.to(renewed.device)] = F.normalize(rows, dim=-1).to(renewed)
        self.counts.zero_()
        return renewed

    def state_dict(self) -> dict:
        """Return the counts and the stored latents, on the CPU."""
        return {"counts": self.counts.cpu().clone(), "latents": self.latents.cpu()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state of `state_dict`."""
        self.counts, self.latents = state["counts"].clone(), state["latents"]


_RESETTER = "keeper"  # the name in checkpoints, which those of earlier versions have as well


class CodebookTracker:
    """Counts the codes that a tokenizer samples, and resets unused ones to recent latents.

    Args:
        engine: of the `LarpTokenizer`, at zero_stage 0 to 2.
        resets: whether codes will be reset; latents are kept for that.
        seed: of the places that codes get.
    """

    def __init__(self, engine: Engine, resets: bool, seed: int):
        self.engine, self.seed = engine, seed
        size = engine.module.config.codebook_size
        self.resetter = CodebookResetter(size) if resets else None
        # Of this process, since the last `usage`.
        self.counts = torch.zeros(size, dtype=torch.int64, device=engine.ranks.device)

    def observe(self, out: TokenizerOutput) -> None:
        """Count the codes of a micro batch, and show the resetter the latents and codes of all processes. Collective."""
        codes = None if out.quantized is None else out.quantized.codes
        if codes is not None:
            add_counts(self.counts, codes)
        if self.resetter is not None:
            # Of a step that is skipped latents may not be finite, and codes are placed on them later.
            latents = gather(F.normalize(out.latents.detach().float(), dim=-1).nan_to_num(0.0))
            self.resetter.observe(latents, None if codes is None else gather(codes))

    def usage(self) -> dict[str, float]:
        """Return the share of the codebook in use and the perplexity of all codes since the last call. Collective.

        Empty if there were none, as before the first step with the quantizer.
        """
        counts = reduce_sum(self.counts)
        self.counts.zero_()
        return usage_of_counts(counts) if counts.sum() else {}

    def reset(self, all_codes: bool) -> None:
        """Reset all codes to the centres of recent latents, or those unused since the last reset to some of these latents."""
        quantizer, average = self.engine.module.quantizer, self.engine.average
        seed = self.seed + self.engine.step_count
        moved = torch.arange(len(self.counts)) if all_codes else self.resetter.idle()
        if all_codes:
            renewed = self.resetter.cluster(seed=seed)
        else:
            renewed = self.resetter.resample(quantizer.codebook(), moved, seed)
        self.engine.overwrite(quantizer.embedding.weight, renewed)
        if average is not None:
            # A code in a new place is another code: the average of the two places would be neither.
            table = average.module.quantizer.embedding.weight
            table[moved] = renewed[moved].to(table)

    def state_dict(self) -> dict:
        """Return what a checkpoint holds of the codes, the counts of all processes summed. Collective."""
        resetter = {} if self.resetter is None else self.resetter.state_dict()
        return {_RESETTER: resetter, "counts": reduce_sum(self.counts).cpu()}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned; the first process takes the counts of all."""
        if self.engine.ranks.is_main:
            self.counts.copy_(state["counts"])
        if self.resetter is not None:
            self.resetter.load_state_dict(state[_RESETTER])
