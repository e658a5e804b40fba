"""A small convolutional network after the decoder, which gives decoded frames the detail that a row of patches lacks.

Shapes: B batch, T frames, H, W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTH = 3


class _Block(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Refiner(nn.Module):
    """Refines clips (B, 3, T, H, W), H and W even: a change of each frame, made of the frame and its neighbours. Not clamped.

    Convolutions work on squares of 2x2 pixels. A new one changes nothing.
    """

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(3 * 3 * 4, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(DEPTH)))
        self.last = nn.Conv2d(width, 3 * 4, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, clip: Tensor) -> Tensor:
        """Return the refined clip (B, 3, T, H, W)."""
        around = torch.cat([clip[:, :, :1], clip, clip[:, :, -1:]], dim=2)
        frames = torch.cat([around[:, :, :-2], clip, around[:, :, 2:]], dim=1).transpose(1, 2).flatten(0, 1)
        x = self.blocks(self.first(F.pixel_unshuffle(frames - 0.5, 2)))
        change = F.pixel_shuffle(self.last(F.silu(x)), 2)
        return clip + change.unflatten(0, (-1, clip.shape[2])).transpose(1, 2)
