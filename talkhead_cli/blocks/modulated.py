"""Modulated convolutions (StyleGAN2, Karras et al. 2020)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModulatedConv(nn.Module):
    """3x3 convolution whose input channels are scaled by a style, with demodulation."""

    def __init__(self, n_in: int, n_out: int, n_style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 3, 3) / math.sqrt(9 * n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale = nn.Linear(n_style, n_in)
        nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x (B, C, H, W), style (B, S) -> (B, n_out, H, W)."""
        scale = self.scale(style)
        strength = self.weight.square().sum((2, 3)) @ scale.square().T  # (n_out, B)
        y = F.conv2d(x * scale[:, :, None, None], self.weight, padding=1)
        y = y * (strength.T + 1e-8).rsqrt()[:, :, None, None] + self.bias[:, None, None]
        return math.sqrt(2) * F.leaky_relu(y, 0.2)


def twice(x: Tensor) -> Tensor:
    """Upsample maps (B, C, H, W) bilinearly by two."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
