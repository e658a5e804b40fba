"""The clip discriminator: a ViT with a learned cls token (arXiv 2410.21264, appendix).

Shapes: B batch, T frames, H, W pixels, P patches, D width.
"""

from dataclasses import dataclass

from larp.config import check_positive, check_types
from larp.hub import LarpModel
from larp.layers import Stack, embed_patches, init_xavier
from larp.positions import sincos_3d

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator; clip shape and patches are those of the tokenizer."""

    num_frames: int = 16
    height: int = 128
    width: int = 128
    patch_size: tuple[int, int, int] = (4, 8, 8)
    hidden: int = 512
    """Width of the transformer."""
    depth: int = 12
    heads: int = 8

    def __post_init__(self):
        check_types(self)
        check_positive(self, "num_frames", "height", "width", "hidden", "depth", "heads", where="discriminator: ")
        if self.hidden % self.heads or self.hidden % 4:
            raise ValueError(
                f"discriminator: hidden = {self.hidden} must be a multiple of 4 and of heads = {self.heads}"
            )
        for axis, part in zip(("num_frames", "height", "width"), self.patch_size, strict=True):
            if part < 1 or getattr(self, axis) % part:
                raise ValueError(
                    f"discriminator: {axis} = {getattr(self, axis)} is not a multiple of its patch, {part}"
                )


class Discriminator(LarpModel):
    """Scores clips (B, 3, T, H, W), expected in [0, 1] but not clamped, with one logit each, (B, 1): high means real."""

    model_type = "larp-discriminator"
    config_class = DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = c = config
        grid = tuple(a // b for a, b in zip((c.num_frames, c.height, c.width), c.patch_size, strict=True))
        self.x_embedder = nn.Conv3d(3, c.hidden, c.patch_size, stride=c.patch_size)
        self.encoder = Stack(c.hidden, c.heads, c.depth)
        self.norm_final = nn.LayerNorm(c.hidden, eps=1e-6)
        self.fc = nn.Linear(c.hidden, 1)
        init_xavier(self)
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.hidden) * 0.02)
        self.register_buffer("positions", sincos_3d(grid, c.hidden)[None])

    def forward(self, clip: Tensor) -> Tensor:
        """Map clips (B, 3, T, H, W) to logits (B, 1)."""
        x = embed_patches(self.x_embedder, clip)
        x = x + self.positions[:, : x.shape[1]].to(x)
        # Full attention does not mind the order: the cls token goes last, where the stack keeps only what is asked for.
        x = self.encoder(torch.cat([x, self.cls_token.to(x).expand(len(x), -1, -1)], dim=1), last=1)
        return self.fc(self.norm_final(x[:, 0]))

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[DiscriminatorConfig, dict[str, Tensor]]:
        """Translate the published layout; see `larp.hub`."""
        from larp.published import discriminator_from_published

        return discriminator_from_published(config, tensors)
