"""Tri-plane generator: from a person's style vector to the three planes of the head.

A small EG3D (Chan et al. 2022): one convolutional network, modulated by a style, outputs the
channels of all three planes side by side, from coarse to fine, and each size adds to the upsampled
sum of the coarser ones (StyleGAN2's skips).  Deliberate differences: no mapping network and no
noise.  Each person's style is learned, as in GLO (Bojanowski et al. 2018); styles are never
sampled, so no latent distribution needs shaping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from talkhead_cli.blocks.modulated import ModulatedConv, twice

N_STYLE = 64
SPREAD = 0.1  # scale of the initial planes


class Latents(nn.Module):
    """Learned style of each person, N_STYLE numbers by default.

    Styles of several people are relative to their mean, so that zero is the average person; a new
    person starts from it.
    """

    def __init__(self, n_people: int, shape: tuple[int, ...] = (N_STYLE,)) -> None:
        super().__init__()
        many = torch.randn(n_people, *shape) if n_people > 1 else torch.zeros(1, *shape)
        self.styles = nn.Parameter(many)

    def forward(self, index: int) -> Tensor:
        """Return a person's style (1, N_STYLE), or (1, *shape)."""
        styles: Tensor = self.styles
        if len(styles) > 1:
            styles = styles - styles.mean(0)
        return styles[index : index + 1]


class PlaneGenerator(nn.Module):
    """Style-modulated convolutional network: a style -> three planes."""

    def __init__(self, channels: int, size: int, widths: Sequence[int]) -> None:
        """channels, size: of the planes · widths: channels of the levels, the coarsest first; each
        level doubles the size, and the last one has the size of the planes"""
        super().__init__()
        self.channels = channels
        first = size >> (len(widths) - 1)
        self.start = nn.Parameter(torch.randn(1, widths[0], first, first))
        ins = (widths[0], *widths[:-1])
        self.convs = nn.ModuleList(
            nn.ModuleList([ModulatedConv(a, b, N_STYLE), ModulatedConv(b, b, N_STYLE)])
            for a, b in zip(ins, widths, strict=True)
        )
        self.draw = nn.ModuleList(nn.Conv2d(b, 3 * channels, 1) for b in widths)
        for layer in self.draw:
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.normal_(layer.weight, std=SPREAD / math.sqrt(layer.in_channels))
            nn.init.zeros_(layer.bias)

    def forward(self, style: Tensor) -> Tensor:
        """style (1, N_STYLE) -> planes (3, channels, size, size)."""
        x: Tensor = self.start
        planes: Tensor | None = None
        for index, (convs, draw) in enumerate(zip(self.convs, self.draw, strict=True)):
            assert isinstance(convs, nn.ModuleList)
            if index:
                x = twice(x)
            for conv in convs:
                x = conv(x, style)
            planes = draw(x) if planes is None else draw(x) + twice(planes)
        assert planes is not None
        return planes.unflatten(1, (3, self.channels))[0]
