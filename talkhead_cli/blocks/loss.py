"""Losses over pixels and patches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.blocks.perceptual import perceptual_losses
from talkhead_cli.contracts import Rendered


def ssim(a: Tensor, b: Tensor, *, window: int = 7) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures (B, H, W, 3) in [0, 1] -> (B,).

    Uniform window; used as a training signal on patches, not as the reported metric.
    """
    a, b = a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2)

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / (
        (mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)
    )
    return score.mean((1, 2, 3))


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the pictures' (B, H, W, 3) vertical plus horizontal gradients."""
    terms = [
        ((a[:, 1:] - a[:, :-1]) - (b[:, 1:] - b[:, :-1])).abs().mean(),
        ((a[:, :, 1:] - a[:, :, :-1]) - (b[:, :, 1:] - b[:, :, :-1])).abs().mean(),
    ]
    return torch.stack(terms).sum()


SOLID = frozenset({"matte", "entropy", "spread"})  # names of `solid_losses`
PATCH = frozenset({"ssim", "gradient", "lpips"})  # of `patch_losses`
WHOLE = frozenset({"whole", "whole_matte", *(f"whole_{name}" for name in PATCH)})


def patch_losses(
    made: Tensor, target: Tensor, loss_networks: Iterable[nn.Module], prefix: str = ""
) -> dict[str, Tensor]:
    """Structural losses of pictures (B, H, W, 3) by name: ssim, gradient, and lpips if its network
    is among the frozen networks `loss_networks`."""
    return {
        f"{prefix}ssim": 1 - ssim(made, target).mean(),
        f"{prefix}gradient": gradient_difference(made, target),
        **perceptual_losses(made, target, prefix, loss_networks),
    }


def solid_losses(rendered: Rendered, matte: Tensor, face: Tensor) -> dict[str, Tensor]:
    """Losses on the marched opacity and depth by name; arguments matte, face (R, 1).

    matte: squared error of the opacity against the matte, weighted up where `face` is 1 · entropy:
    of the opacity, pushes it to 0 or 1 · spread: mean variance of depth along rays
    """
    opacity = rendered.opacity.clamp(1e-4, 1 - 1e-4)
    return {
        # The matte is unreliable at its rim but certain inside the face, where a bright background
        # must not show through to fake a highlight.
        "matte": ((0.2 + 0.8 * face) * (opacity - matte).square()).mean(),
        "entropy": -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log()).mean(),
        "spread": rendered.spread.mean(),
    }
