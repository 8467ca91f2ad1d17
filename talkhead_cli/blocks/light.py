"""Light that stays in the room while the head turns."""

from __future__ import annotations

from torch import Tensor, nn

SHADE = 0.1  # the scale on which light is learnt, logits of colour per standard deviation of pose


class Shading(nn.Module):
    """How light on the head changes with the head's pose: affine in place, linear in pose.

    A head that turns towards a window brightens on that side, as a matt ball would.  A few
    numbers say most of it; being linear, they hold for turns that training never shows, where
    a colour network that sees the direction of view has nothing to say.  It starts as no
    change at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 12, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, pose: Tensor) -> Tensor:
        """Standardised pose (T, 6) -> maps (T, 3, 4) from places in head space to colour logits."""
        return SHADE * self.linear(pose).float().view(-1, 3, 4)
