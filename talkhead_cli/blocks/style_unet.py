"""Style-modulated U-Net over wavelet bands that completes a rendered head with its torso.

After the torso network of GtsTalkNeRF's release, in turn a StyleGAN2 decoder (Karras et al.
2020) on wavelets (SWAGAN, Gal et al. 2021).  Deliberate differences:
* no noise inputs, which would make video shimmer;
* alpha in input and output, so that any background can be composited;
* the torso is a learned canvas, a picture that is warped by the shoulders' motion and composited
  behind the head; the network outputs a correction.  Without it, the network would have to
  synthesise a moving torso from its weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.blocks.modulated import ModulatedConv, twice
from talkhead_cli.blocks.precision import exact

PAINT = 4.0  # factor on the canvas parameter, so that it learns faster than the network


def haar(x: Tensor) -> Tensor:
    """Pictures (B, C, H, W) of even size -> the four Haar bands (B, 4 C, H/2, W/2), orthonormal."""
    a, b = x[:, :, ::2, ::2], x[:, :, ::2, 1::2]
    c, d = x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2


def unhaar(bands: Tensor) -> Tensor:
    """The inverse of `haar`."""
    low, across, down, both = bands.chunk(4, 1)
    a, b = low + across + down + both, low - across + down - both
    c, d = low + across - down - both, low - across - down + both
    n, channels, h, w = low.shape
    rows = torch.stack([torch.stack([a, b], -1), torch.stack([c, d], -1)], -3)
    return rows.reshape(n, channels, 2 * h, 2 * w) / 2


class StyleUNet(nn.Module):
    """Premultiplied picture of a head (4 channels) -> of head and torso, modulated by a style.

    Starts as the identity: the canvas is transparent and the output layers are zero.
    """

    def __init__(
        self, widths: Sequence[int], n_signals: int, *, px: int, n_style: int = 64
    ) -> None:
        """widths: channels of the levels, the first at half the picture's size · n_signals: inputs
        of the style network · px: side of the canvas"""
        super().__init__()
        bands = 4 * 4
        self.canvas = nn.Parameter(torch.zeros(1, 4, px, px))
        self.style = nn.Sequential(nn.Linear(n_signals, n_style), _PixelNorm())
        for _ in range(3):
            self.style.extend([nn.Linear(n_style, n_style), nn.LeakyReLU(0.1)])
        self.take = nn.ModuleList(
            nn.Conv2d(2 * bands if level == 0 else bands, w, 1) for level, w in enumerate(widths)
        )
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(w if level == 0 else w + widths[level - 1], w, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(w, w, 3, padding=1),
                nn.LeakyReLU(0.2),
            )
            for level, w in enumerate(widths)
        )
        deep = list(reversed(list(enumerate(widths))))
        self.up = nn.ModuleList(
            nn.ModuleList(
                [
                    ModulatedConv(w if i == 0 else w + deep[i - 1][1], w, n_style),
                    ModulatedConv(w, w, n_style),
                ]
            )
            for i, (_, w) in enumerate(deep)
        )
        self.tell = nn.ModuleList(_silent(nn.Conv2d(w, bands, 1)) for _, w in deep)

    def forward(self, head: Tensor, signals: Tensor, carry: Tensor) -> Tensor:
        """head (B, 4, H, W) premultiplied colour and alpha · signals (B, n_signals) standardised ·
        carry (B, 2, 3) affine map from picture to canvas coordinates, both in [-1, 1]
        -> (B, 4, H, W), premultiplied."""
        style = self.style(signals)
        canvas = F.grid_sample(
            PAINT * self.canvas.expand(len(head), -1, -1, -1),
            _places(carry, head),
            padding_mode="border",
            align_corners=False,
        )
        kept: list[Tensor] = []
        x, bands = head.new_zeros(0), haar(head)
        for level, (take, down) in enumerate(zip(self.take, self.down, strict=True)):
            if level:
                bands = haar(F.avg_pool2d(unhaar(bands), 2))
                taken = take(bands)
                x = torch.cat([taken, F.avg_pool2d(x, 2)], 1)
            else:
                x = take(torch.cat([bands, haar(canvas)], 1))
            x = down(x)
            kept.append(x)
        told: Tensor | None = None
        for i, (pair, tell) in enumerate(zip(self.up, self.tell, strict=True)):
            assert isinstance(pair, nn.ModuleList)
            if i:
                x = torch.cat([twice(x), kept[-1 - i]], 1)
            for conv in pair:
                x = conv(x, style)
            told = tell(x) if told is None else tell(x) + haar(twice(unhaar(told)))
        assert told is not None
        return head + (1 - head[:, 3:]) * canvas + unhaar(told)


@exact
def _places(carry: Tensor, head: Tensor) -> Tensor:
    """Return the canvas coordinates (B, H, W, 2) of the pixels of `head` (B, C, H, W)."""
    return F.affine_grid(carry.float(), [len(head), 1, *head.shape[2:]], align_corners=False)


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class _PixelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
