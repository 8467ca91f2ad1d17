"""Super-resolution of marched channels, and correction of full-size drafts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Upscaler(nn.Module):
    """Convolutional upscaler: marched channels -> premultiplied colour and alpha at
    `magnification` times the size.

    Predicts a residual, zero at first, on the bilinearly upsampled colour (the first three
    channels) and alpha (the last).
    """

    def __init__(self, n_in: int, width: int, magnification: int) -> None:
        """magnification: a power of two, at least 1."""
        super().__init__()
        assert magnification > 0 and magnification & (magnification - 1) == 0
        self.n_doublings = magnification.bit_length() - 1
        self.first = nn.Conv2d(n_in, width, 3, padding=1, padding_mode="replicate")
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
            for _ in range(1 + self.n_doublings)
        )
        self.last = nn.Conv2d(width, 4, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, marched: Tensor) -> Tensor:
        """(B, C, h, w), colour first, alpha last -> (B, 4, H, W)."""
        picture = torch.cat([marched[:, :3], marched[:, -1:]], 1)
        x = F.leaky_relu(self.first(marched), 0.2)
        for index, conv in enumerate(self.convs):
            if index:
                x, picture = (
                    F.interpolate(t, scale_factor=2, mode="bilinear") for t in (x, picture)
                )
            x = F.leaky_relu(conv(x), 0.2)
        return picture + self.last(x)


class Retoucher(nn.Module):
    """Two-level hourglass network from a full-size draft and the layers it was made of to a
    correction.  The last layer is zero-initialised.
    """

    def __init__(self, n_in: int, width: int, n_out: int) -> None:
        super().__init__()
        self.first = _conv(n_in, width)
        self.deep = nn.ModuleList([_conv(width, 2 * width), _conv(2 * width, 2 * width)])
        self.back = _conv(3 * width, width)
        self.last = nn.Conv2d(width, n_out, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, draft: Tensor) -> Tensor:
        """(B, n_in, H, W), sides even -> (B, n_out, H, W)."""
        wide = F.leaky_relu(self.first(draft), 0.2)
        x = F.avg_pool2d(wide, 2)
        for conv in self.deep:
            x = F.leaky_relu(conv(x), 0.2)
        x = torch.cat([wide, F.interpolate(x, scale_factor=2, mode="bilinear")], 1)
        return self.last(F.leaky_relu(self.back(x), 0.2))


def _conv(n_in: int, n_out: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, padding_mode="replicate")
