"""LPIPS, the perceptual distance of pictures, as a frozen network and as a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_PX = 64  # smaller pictures are upsampled: AlexNet's strides would leave no features


class Perceptual(nn.Module):
    """LPIPS (Zhang et al. 2018, version 0.1, AlexNet), the implementation of torchmetrics.

    The linear heads come with torchmetrics; the user supplies the backbone's weights.
    """

    def __init__(self, fill: Callable[[nn.Module], None]) -> None:
        """fill: loads weights into torchvision's AlexNet strictly, or raises."""
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS
        from torchvision.models import alexnet

        backbone = alexnet(weights=None)
        fill(backbone)
        self._net: Any = _LPIPS(net="alex", pnet_rand=True)
        for part in self._net.net.children():
            for number, layer in part.named_children():
                layer.load_state_dict(backbone.features[int(number)].state_dict())
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) in [0, 1] -> distance (B,), 0 for the same picture."""
        pair = torch.cat([a, b]).permute(0, 3, 1, 2)
        small = min(pair.shape[2:])
        if small < LEAST_PX:
            pair = F.interpolate(pair, scale_factor=LEAST_PX / small, mode="bilinear")
        found: Tensor = self._net(*pair.chunk(2), normalize=True)
        return found.flatten()


def perceptual_losses(
    made: Tensor, target: Tensor, prefix: str, loss_networks: Iterable[nn.Module]
) -> dict[str, Tensor]:
    """Return {prefix + "lpips": LPIPS} of pictures (B, H, W, 3); empty without a `Perceptual`."""
    for judge in loss_networks:
        if isinstance(judge, Perceptual):
            return {f"{prefix}lpips": judge(made, target).mean()}
    return {}
