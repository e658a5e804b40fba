"""The sizes that eval/speed_gpu.py measures, and tiny ones to rehearse with."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.head_speed import HeadSize
from larp.models.generator import GeneratorConfig
from larp.models.prior import PriorConfig
from larp.models.tokenizer_config import TokenizerConfig


def box_tokenizer() -> TokenizerConfig:
    """The tokenizer of the recipes that train by the clock: 64x64, 256 codes of 8192."""
    prior = PriorConfig(depth=4, heads=3, width=192, positions=256)
    sides = dict(
        encoder_width=256, encoder_depth=6, encoder_heads=4, decoder_width=256, decoder_depth=8, decoder_heads=4
    )
    return TokenizerConfig(height=64, width=64, num_tokens=256, code_dim=8, prior=prior, **sides)


@dataclass(frozen=True)
class Sizes:
    """What is measured: models, and the batches of each."""

    copy_bytes: int = 2 * 10**9
    matmul: int = 8192
    large: TokenizerConfig = field(default_factory=TokenizerConfig)
    large_inference: tuple[int, ...] = (1, 32)
    large_batches: tuple[int, ...] = (8, 16, 32, 64)
    large_compiled: tuple[int, ...] = (32,)
    box: TokenizerConfig = field(default_factory=box_tokenizer)
    box_batches: tuple[int, ...] = (64, 128, 256, 512)
    box_compiled: tuple[int, ...] = (256, 128, 512)
    generator: GeneratorConfig = field(default_factory=lambda: GeneratorConfig.of_size("LP"))
    sampler_clips: tuple[int, ...] = (1, 8, 64)
    head: HeadSize = field(default_factory=HeadSize)
    seconds: float = 1.0
    """For which one thing is timed."""

    @classmethod
    def tiny(cls) -> Sizes:
        """A few seconds on a CPU."""
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
                 for name, value in (("width", 16), ("depth", 2), ("heads", 2))}  # fmt: skip
        prior = PriorConfig(depth=1, heads=2, width=16, positions=8)
        model = TokenizerConfig(4, 16, 16, (2, 8, 8), num_tokens=8, codebook_size=16, code_dim=4, prior=prior, **sides)
        generator = GeneratorConfig(num_tokens=64, codebook_size=16, depth=2, heads=2, width=16, ffn_multiple=8)
        head = HeadSize(hidden=16, vocab_size=64, codebook_size=8, positions=32, chunk=16)
        return cls(1 << 16, 32, model, (1,), (2, 4), (2,), model, (2,), (2,), generator, (1, 2), head, 0.1)
