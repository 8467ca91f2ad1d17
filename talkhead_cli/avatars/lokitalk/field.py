"""LokiTalk's field: two displacements of a point, then the canonical volume at the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from talkhead_cli.avatars.personal import Person
from talkhead_cli.blocks.light import LOOK_SCALE, looking
from talkhead_cli.blocks.mlp import by_row, density_of
from talkhead_cli.blocks.planes import frequencies, warped, why_no_triton
from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.remember import constant, remembered
from talkhead_cli.blocks.rigid import CHIN_GAP, CHIN_SOFT, moved
from talkhead_cli.contracts import CHIN, EYES, LIPS

if TYPE_CHECKING:
    from talkhead_cli.avatars.lokitalk.method import LokiTalk

MAX_SHIFT = 0.15  # face heights; guards the displacement fields
DEPTH = 0.3  # of the face's z displacement, hardly constrained by one camera: noise in side views
REACH = 0.02  # attention up to which a region's field is not evaluated


class LokiField:
    """LokiTalk's field for T rows of codes.

    face (2 T, trunk), density (2 T, head), torso (T, trunk): terms that the rows' codes (lips and
    eyes interleaved; pose for the torso) add in the first layers of the three nets · shoulders
    (T, 3, 4) motion to the rest pose · light (T, 3, 4) affine in position, added to the head's
    colour logits · look (T, 3) or None, added to directions (`Person.to_known_view`) · skips:
    whether points may have row -1, which are ignored (density 0)
    """

    channels = 8
    n_detached = 5
    skips = False

    def __init__(
        self,
        avatar: LokiTalk,
        person: Person,
        *,
        face: Tensor,
        density: Tensor,
        torso: Tensor,
        shoulders: Tensor,
        light: Tensor,
        look: Tensor | None,
    ) -> None:
        self._look = look
        self.avatar, self.aabb, self.n_rows = avatar, avatar.aabb, len(torso)
        self._codes = self._face, self._density, self._torso = face, density, torso
        self._shoulders, self._light = shoulders, light
        # Networks see points in the shared face's space, normalised by `frame` (with 10 % margin).
        low, high = avatar.frame[:3], avatar.frame[3:]
        middle, half = (low + high) / 2, (high - low) / 2 * 1.1
        self._shared = avatar.shared(person)
        self._framed = (
            torch.cat([self._shared[..., :3], self._shared[..., 3:] - middle[:, None]], 2)
            / half[:, None]
        )
        self._reach = avatar.reach
        neutral = person.mouth.neutral
        self._prior_weight, self._prior_bias = remembered(
            person, "attention", [neutral], lambda: _prior(neutral)
        )
        # Without gradients on a GPU, fused kernels evaluate the whole field.
        if neutral.is_cuda and not torch.is_grad_enabled() and why_no_triton() == "":
            from talkhead_cli.avatars.lokitalk import field_triton as kernel

            self.skips, self._kernel = True, kernel.fused_field(self)

    def kernel_inputs(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the kernel's inputs besides weights: constants of all points (55,), shoulders and
        light of each row (T, 24), and the rows' codes."""
        everywhere = torch.cat(
            [
                self._framed.flatten(),
                self._shared.flatten(),
                self._prior_weight.flatten(),
                self._prior_bias,
                self._reach,
            ]
        )
        rows = torch.cat([self._shoulders.flatten(1), self._light.flatten(1)], 1)
        return everywhere.float(), rows.float(), self._codes

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        if self.skips:
            return self._kernel(x, x, row)[0]
        return self._static(x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        d = looking(d, row, self._look)
        if self.skips:
            return self._kernel(x, d, row)
        density, hidden, attention, shifts = self._static(x, row)
        logits = self.avatar.colour_net(torch.cat([hidden, LOOK_SCALE * d], 1))
        # shading follows the head's pose, with which the shoulders do not turn
        head = 1 - attention[:, 2:].detach()
        colour = (logits + head * moved(x, self._light, row)).sigmoid()
        return density, torch.cat([colour, attention, shifts], 1)

    def _static(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), hidden (N, 16), attention (N, 3), shifts (N, 2)."""
        avatar = self.avatar
        # Pose correction (`aim`) gets its gradient through the canonical volume.  The gradient
        # through attention and displacement inputs is slight and a twentieth of a step's time.
        here = x.detach()
        encoded = frequencies(moved(here, self._framed, row), avatar.octaves)
        attention = (avatar.attention(encoded).float() + self._prior(here)).sigmoid()
        driven = by_row(attention[:, :2], row, self.n_rows)  # (N, 2 T)

        x, face_shift = self._moved_by_face(x, encoded, driven, attention[:, :2].sum(1))
        x, torso_shift = self._moved_by_torso(x, attention[:, 2:], row)

        features = avatar.volume(warped(moved(x, self._shared, row), self._reach))
        hidden = avatar.density_net(features, (driven, self._density))
        density = density_of(hidden[:, 0])
        return density, hidden[:, 1:], attention, torch.cat([face_shift, torso_shift], 1)

    def _moved_by_face(
        self, x: Tensor, encoded: Tensor, driven: Tensor, reach: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return points displaced by the face field, (N, 3), and L1 shift lengths, (N, 1)."""

        def shift(encoded: Tensor, driven: Tensor, reach: Tensor) -> Tensor:
            raw = self.avatar.face_field(encoded, (driven, self._face))
            found = MAX_SHIFT * (raw.float() / MAX_SHIFT).tanh()
            found = found * constant(1.0, 1.0, DEPTH, device=x.device)
            return found * reach.clamp(max=1)[:, None]

        return _shifted(x, reach.detach() > REACH, shift, encoded, driven, reach)

    def _moved_by_torso(self, x: Tensor, torso: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return points displaced by the torso field, (N, 3), and L1 shift lengths, (N, 1)."""

        def shift(point: Tensor, weight: Tensor, row: Tensor) -> Tensor:
            encoded = frequencies(moved(point.detach(), self._framed, row), self.avatar.octaves)
            own = by_row(torch.ones_like(weight), row, self.n_rows)
            raw = self.avatar.torso_field(encoded, (own, self._torso))
            carried = moved(point, self._shoulders, row)
            return weight * (carried - point + MAX_SHIFT * (raw.float() / MAX_SHIFT).tanh())

        return _shifted(x, torso.detach().squeeze(1) > REACH, shift, x, torso, row)

    @exact
    def _prior(self, x: Tensor) -> Tensor:
        """Return position-only logits (N, 3) of lips, eyes, torso, refined by the attention net."""
        squares = torch.cat([x, x * x], 1)
        if x.is_cuda:  # where a matrix product with so few columns takes ten times as long
            found = (squares[:, None] * self._prior_weight.T).sum(2) + self._prior_bias
        else:
            found = torch.addmm(self._prior_bias, squares, self._prior_weight)
        lips, left, right, torso = found.unbind(1)
        return torch.stack([lips, torch.maximum(left, right), torso], 1).clamp(-6, 6)


def _shifted(
    x: Tensor, near: Tensor, shift: Callable[..., Tensor], *told: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x (N, 3) with the points that are `near` (N,) shifted, and L1 shift lengths (N, 1).

    On a CPU the field is evaluated at near points only; on a GPU at all points, since selecting
    the near ones would need a host sync.
    """
    if x.is_cuda:
        shifts = shift(*told) * near[:, None]
        return x + shifts, shifts.abs().sum(1, keepdim=True)
    at = near.nonzero().squeeze(1)
    shifts = shift(*(t.index_select(0, at) for t in told))
    length = x.new_zeros(len(x), 1).index_add(0, at, shifts.abs().sum(1, keepdim=True))
    return x.index_add(0, at, shifts), length


def _prior(neutral: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (6, 4) and bias (4,) that map x, x^2 to logits of lips, two eyes and torso.

    Lips and eyes are ellipsoids (quadratic forms), the torso is the half-space below the chin.
    """
    mouth = (neutral[LIPS].mean(0) * 2 + neutral[CHIN]) / 3
    weight, bias = neutral.new_zeros(6, 4), neutral.new_zeros(4)
    for column, (centre, radius) in enumerate(
        [
            (mouth, neutral.new_tensor([0.28, 0.28, 0.35])),
            *((neutral[eye].mean(0), neutral.new_tensor([0.16, 0.12, 0.3])) for eye in EYES),
        ]
    ):
        # 3 - 4 |(x - centre) / radius|^2
        weight[:3, column], weight[3:, column] = 8 * centre / radius**2, -4 / radius**2
        bias[column] = 3 - 4 * (centre / radius).square().sum()
    weight[1, 3], bias[3] = 1 / CHIN_SOFT, -(neutral[CHIN, 1] + CHIN_GAP) / CHIN_SOFT
    return weight, bias
