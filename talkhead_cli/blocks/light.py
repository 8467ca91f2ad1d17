"""Shading that changes with head pose, because the lights stay fixed while the head turns."""

from __future__ import annotations

from torch import Tensor, nn

LOOK_SCALE = 5.0  # of view directions: a talking head turns by a few degrees, so they hardly differ
SHADE = 0.1  # scale of the learned weights: colour logits per standard deviation of pose


def looking(d: Tensor, row: Tensor, look: Tensor | None) -> Tensor:
    """Return directions d (N, 3) with `look` (T, 3) of their rows (N,) added; points of row -1 take
    any."""
    return d if look is None else d + look.index_select(0, row.clamp_min(0))


class Shading(nn.Module):
    """Change of colour logits with head pose: affine in position, linear in pose.

    A head that turns towards a window gets brighter on that side, like a matt ball.  A few
    parameters capture most of it, and being linear they extrapolate to poses outside the training
    data, where a colour network with a view direction input does not.  Starts at zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 12, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, pose: Tensor) -> Tensor:
        """Standardised pose (T, 6) -> affine maps (T, 3, 4) from head space to colour logits."""
        return SHADE * self.linear(pose).float().view(-1, 3, 4)
