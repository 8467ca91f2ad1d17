"""From a few numbers that say who a person is to the tri-plane of the head.

A small EG3D (Chan et al. 2022): one convolutional net, steered by a style, draws the channels of
all three planes side by side, coarse ones first, and each size adds to what the last one drew
(StyleGAN2's skips).  Where we differ on purpose: no mapping network and no noise.  Styles are
learnt with the people whom they stand for, as in GLO (Bojanowski et al. 2018), and nobody is drawn
at random, so that there is no distribution to be shaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from talkhead_cli.blocks.modulated import ModulatedConv, twice

N_STYLE = 64
SPREAD = 0.1  # of the planes at first


class Latents(nn.Module):
    """Who people are: a style each, N_STYLE numbers by default.

    Of many they count from their mean, so that zero stands for nobody in particular; one who comes
    later begins there.
    """

    def __init__(self, n_people: int, shape: tuple[int, ...] = (N_STYLE,)) -> None:
        super().__init__()
        many = torch.randn(n_people, *shape) if n_people > 1 else torch.zeros(1, *shape)
        self.styles = nn.Parameter(many)

    def forward(self, index: int) -> Tensor:
        """The style of a person, (1, N_STYLE)."""
        styles: Tensor = self.styles
        if len(styles) > 1:
            styles = styles - styles.mean(0)
        return styles[index : index + 1]


class PlaneGenerator(nn.Module):
    """A style -> three planes."""

    def __init__(self, channels: int, size: int, widths: Sequence[int]) -> None:
        """channels, size: of the planes · widths: of the net's levels, the coarsest first; each is
        twice as large as the one before, the last as large as the planes"""
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
