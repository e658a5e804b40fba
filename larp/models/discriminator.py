"""The clip discriminator, a ViT with a learned cls token (arXiv 2410.21264, appendix), and its published layout.

Shapes: B batch, T frames, H, W pixels, P patches, D width.
"""

from dataclasses import dataclass

from larp.config import check_positive, check_types
from larp.hub import CheckpointError, LarpModel
from larp.models.layers import Stack, embed_patches, init_xavier, sincos_3d
from larp.models.published_fields import (
    add_temporal_axis,
    check_fixed,
    not_representable,
    read_int,
    remove_temporal_axis,
    rename_prefix,
    warn_of_unknown,
)

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; clip shape and patch size equal the tokenizer's."""

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
        for axis, patch in zip(("num_frames", "height", "width"), self.patch_size, strict=True):
            if patch < 1 or getattr(self, axis) % patch:
                raise ValueError(
                    f"discriminator: {axis} = {getattr(self, axis)} is not a multiple of its patch size, {patch}"
                )


class Discriminator(LarpModel):
    """Maps clips (B, 3, T, H, W), in [0, 1] but not clamped, to one logit each, (B, 1): high means real."""

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
        # Full attention ignores the order. The cls token goes last, because the stack returns the last positions.
        x = self.encoder(torch.cat([x, self.cls_token.to(x).expand(len(x), -1, -1)], dim=1), last=1)
        return self.fc(self.norm_final(x[:, 0]))

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[DiscriminatorConfig, dict[str, Tensor]]:
        """Convert from the published layout; see `larp.hub`."""
        return discriminator_from_published(config, tensors)


_RENAMED = {
    "transformer_encoder": "encoder",
    "x_embedder.proj": "x_embedder",
    "encoder_pos_embed": "positions",
}


def discriminator_from_published(
    config: dict, tensors: dict[str, Tensor]
) -> tuple[DiscriminatorConfig, dict[str, Tensor]]:
    """Convert a published discriminator to our layout; CheckpointError names a missing or invalid field."""
    warn_of_unknown(config, discriminator_settings(DiscriminatorConfig()))
    check_fixed(config, {"in_channels": 3})
    renamed = {rename_prefix(name, _RENAMED): tensor for name, tensor in tensors.items()}
    try:
        patch, size = read_int(config, "patch_size"), read_int(config, "input_size")
        settings = DiscriminatorConfig(
            num_frames=read_int(config, "frame_num"),
            height=size,
            width=size,
            patch_size=(read_int(config, "temporal_patch_size"), patch, patch),
            hidden=read_int(config, "hidden_size"),
            depth=read_int(config, "n_layers"),
            heads=read_int(config, "n_heads"),
        )
    except KeyError as error:
        raise CheckpointError(f"not a LARP discriminator checkpoint: {error.args[0]!r} is missing") from error
    return settings, add_temporal_axis(renamed)


def discriminator_to_published(
    config: DiscriminatorConfig, tensors: dict[str, Tensor]
) -> tuple[dict, dict[str, Tensor]]:
    """Convert a discriminator to the published layout; CheckpointError names a field that it cannot represent."""
    back = {new: old for old, new in _RENAMED.items()}
    renamed = {rename_prefix(name, back): tensor for name, tensor in tensors.items()}
    return discriminator_settings(config), remove_temporal_axis(renamed)


def discriminator_settings(config: DiscriminatorConfig) -> dict:
    """Return the published config of a discriminator; CheckpointError as in `discriminator_to_published`."""
    c = config
    for name, (rows, columns) in {"height": (c.height, c.width), "patch_size": c.patch_size[1:]}.items():
        if rows != columns:
            raise not_representable(name, f"{rows} rows and {columns} columns", "only squares")
    published = {"hidden_size": c.hidden, "n_heads": c.heads, "n_layers": c.depth, "input_size": c.height}
    published |= {"temporal_patch_size": c.patch_size[0], "patch_size": c.patch_size[1], "in_channels": 3}
    return published | {"frame_num": c.num_frames}
