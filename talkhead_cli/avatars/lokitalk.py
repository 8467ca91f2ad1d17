"""LokiTalk (Li et al., arXiv 2411.19525): region-specific deformation fields.

Two cascaded fields warp every observed point into one canonical volume that holds head
and torso: the face field listens to lips and eyes, the torso field to the pose.

    a, e, p          lip, eye and pose codes of the row
    A_k(x)           attention of region k (lips, eyes, torso), composited as channels
    dx_face(x)       = F_face(PE(x), A_lips M_a(a), A_eyes M_e(e))
    dx_torso(x')     = A_torso ((T x' - x') + F_torso(PE(x'), M_p(p))),  x' = x + dx_face
    density, colour  of the canonical volume at x' + dx_torso

Where the paper is silent or we differ on purpose:
* T is the measured rigid motion of the shoulders against the head.  In head space a turning
  head swings the whole body; a network should learn the rest, not that.
* Rays are put right before all this (`aim`): trackers err by habit, and a linear map of pose
  and expression undoes most of it, for turns that training never shows too.
* Lips are driven through the mouth's shape in head space, which the speech encoder is
  supervised on directly (`listen`); learnt from pixels alone the link is lost.  The part of
  it that goes with the head's pose is left to the pose.
* The gated codes also reach the colour network: a closed lid or an open mouth shows
  surfaces that no displacement of a canonical volume can bring to light.
* Light stays in the room while the head turns (`Shading`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import StepResult, distance, shaped
from talkhead_cli.avatars.personal import Person, PersonalAvatar
from talkhead_cli.blocks.light import Shading
from talkhead_cli.blocks.loss import patch_losses, solid_losses
from talkhead_cli.blocks.mlp import Mlp, by_row
from talkhead_cli.blocks.mouth import MAX_POSE, N_CODES
from talkhead_cli.blocks.planes import TriPlanes, frequencies, gathered
from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.regions import EYES, LIPS, region_masks
from talkhead_cli.blocks.rigid import moved
from talkhead_cli.blocks.speech import SpeechEncoder
from talkhead_cli.contracts import Frame, RayBundle, Rendered, Signals

MAX_SHIFT = 0.15  # face heights; guards the displacement fields
# Channels that the marcher composites: colour, then auxiliary maps with detached weights.
COLOUR, ATTENTION, SHIFTS = slice(0, 3), slice(3, 6), slice(6, 8)
# Noise on the driving signals in training.  Twenty-odd numbers can name each of a few hundred
# frames; without noise the networks learn the frames by heart.
LIP_NOISE = 0.25  # in standard deviations
EYE_NOISE, GAZE_NOISE, BROW_NOISE = 0.05, 0.01, 0.002
POSE_NOISE = 0.1  # in standard deviations
N_CODE, N_GATE = 16, 12
LOOK_SCALE = 5.0  # a talking head turns by a few degrees: directions hardly differ
REACH = 0.02  # attention under which a region's field is not asked


@dataclass(frozen=True)
class _Widths:
    planes: tuple[int, ...]
    plane_channels: int
    trunk: int
    head: int
    octaves: int


SIZES = {
    "tiny": _Widths((20, 48, 96, 192), 4, 32, 48, 4),
    "full": _Widths((32, 64, 128, 256, 512), 4, 64, 64, 6),
}


class LokiTalk(PersonalAvatar):
    """LokiTalk's avatar."""

    maps = MappingProxyType({
        "attention": ("lips attend", "eyes attend", "torso attends"),
        "shift": ("face moves, face heights", "torso moves, face heights"),
    })  # fmt: skip

    def __init__(
        self, size: Literal["tiny", "full"], *, n_steps: int, n_features: int, n_people: int = 1
    ) -> None:
        super().__init__(
            [Person() for _ in range(n_people)],
            SpeechEncoder.of_windows(n_steps, n_features, N_CODES),
        )
        widths = SIZES[size]
        self.octaves = widths.octaves
        n_position = 3 * (1 + 2 * widths.octaves)
        self.shading = Shading()
        self.lip_code = Mlp(N_CODES, 32, N_CODE)
        self.eye_code = Mlp(2 * 3 + 2 + 2, 32, N_CODE)
        self.pose_code = Mlp(6 + 4, 32, N_CODE)
        self.attention = Mlp(n_position, 32, 3, last_scale=0.1)
        self.face_field = Mlp(n_position, widths.trunk, 3, 3, last_scale=0.01)
        self.torso_field = Mlp(n_position, widths.trunk, 3, 3, last_scale=0.01)
        self.volume = TriPlanes(widths.planes, widths.plane_channels)
        self.density_net = Mlp(self.volume.n_out, widths.head, 1 + 16, 2)
        self.colour_net = Mlp(16 + 3, 32, 3, 2)
        # Codes enter the first layer of the nets they drive, each by its own map; the density's
        # pass a bottleneck, lest a face be drawn by its expression alone.
        n_face, n_density = n_position + 2 * N_CODE, self.volume.n_out + N_GATE
        self.to_face = _two(N_CODE, widths.trunk, of=n_face)
        self.to_gate = _two(N_CODE, N_GATE, of=2 * N_CODE)
        self.gate = _block(N_GATE, widths.head, of=n_density)
        self.to_torso = _block(N_CODE, widths.trunk, of=n_position + N_CODE)

    @classmethod
    def build(
        cls, size: Literal["tiny", "full"], *, n_steps: int, n_features: int, px: int,
        n_people: int = 1,
    ) -> Self:  # fmt: skip
        return cls(size, n_steps=n_steps, n_features=n_features, n_people=n_people)

    def condition(self, signals: Signals) -> LokiField:
        person = self.person(signals)
        shoulders = self.shoulders(signals)
        pose, lips = person.stance(signals), person.mouth.code(signals)
        if self.training:
            signals = _disturbed(signals, self.noise)
            pose = pose + self.noise * POSE_NOISE * torch.randn_like(pose)
            lips = lips + self.noise * LIP_NOISE * torch.randn_like(lips)
        eye = signals.eye
        wave = torch.cat([eye, (torch.pi * eye).sin(), (torch.pi * eye).cos()], 1)
        codes = (
            self.lip_code(lips.clamp(-4, 4)),
            self.eye_code(torch.cat([wave, 4 * signals.gaze, 10 * signals.brow], 1)),
        )
        pose_code = self.pose_code(pose.clamp(-MAX_POSE, MAX_POSE))
        return LokiField(
            self,
            person,
            face=_mapped(self.to_face, codes),
            density=self.gate(_mapped(self.to_gate, codes)),
            torso=self.to_torso(pose_code),
            shoulders=shoulders,
            light=self.shading(pose[:, :6]),
        )

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        rgb = rendered.feature[:, COLOUR] + (1 - rendered.opacity) * plate
        parts = {
            "attention": shaped(rendered.feature[:, ATTENTION], rays),
            "shift": shaped(rendered.feature[:, SHIFTS], rays),
            "spread": shaped(rendered.spread, rays),
        }
        return Frame(
            shaped(rgb, rays), shaped(rendered.opacity, rays), distance(rendered, rays), parts
        )

    # -- losses ------------------------------------------------------------------------------

    def picture_losses(self, result: StepResult) -> dict[str, Tensor]:
        shot, frame, rendered = result.shot, result.frame, result.rendered
        rays = shot.rays
        assert frame is not None and rendered is not None and rays is not None
        assert shot.target is not None and shot.labels is not None
        rgb = frame.rgb.reshape(-1, 3)
        person = 1 - shot.labels[:, 5:6]
        masks = region_masks(shot.signals, rays.pixel, rays.row, shot.labels)
        attention = rendered.feature[:, ATTENTION]
        solid = rendered.opacity.detach()
        moved = rendered.feature[:, SHIFTS]
        losses = solid_losses(rendered, person, shot.labels[:, :1]) | {
            "colour": F.mse_loss(rgb, shot.target),
            # one-sided inside the soft masks would let attention vanish: two-sided, as in 1.4
            "attention": ((attention - masks * solid) * solid).abs().mean(),
            "still": (moved * (1 - masks[:, :2].amax(1, keepdim=True))).mean(),
            "relief": self.person(shot.signals).relief.loss(rendered, rays, person[:, 0]),
            "rough": self.volume.roughness(),
        }
        if rays.layout is not None:
            losses |= patch_losses(frame.rgb, shot.target.view(*rays.layout, 3), self.judges)
        return losses

    # -- parts ---------------------------------------------------------------------------------

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        return {
            "volume": [self.volume],
            "deform": [self.face_field, self.torso_field, self.attention, self.lip_code,
                       self.eye_code, self.pose_code, self.to_face, self.to_torso],
            "static": [self.density_net, self.colour_net, self.to_gate, self.gate, self.shading],
        }  # fmt: skip


class LokiField:
    """LokiTalk's field, closed over T rows of codes.

    face (2 T, trunk), density (2 T, head), torso (T, trunk): what a row's lip and eye codes, and
    its pose code, add to the first layers of the three nets · shoulders (T, 3, 4) ·
    light (T, 3, 4) what the row's light adds to the logits of the head's colour, by place
    """

    channels = 8
    n_detached = 5

    def __init__(
        self, avatar: LokiTalk, person: Person, *, face: Tensor, density: Tensor, torso: Tensor,
        shoulders: Tensor, light: Tensor,
    ) -> None:  # fmt: skip
        self.avatar, self.aabb, self.n_rows = avatar, avatar.aabb, len(torso)
        self._face, self._density, self._torso = face, density, torso
        self._shoulders, self._light = shoulders, light
        low, high = avatar.aabb[:3], avatar.aabb[3:]
        self._middle, self._half = (low + high) / 2, (high - low) / 2 * 1.1
        self._reach = torch.maximum(-low, high) * 1.1  # the planes keep the face in their middle
        self._prior_weight, self._prior_bias = _prior(person.mouth.neutral)

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        return self._static(x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        density, hidden, attention, shifts = self._static(x, row)
        logits = self.avatar.colour_net(torch.cat([hidden, LOOK_SCALE * d], 1))
        # shoulders do not turn with the head
        head = 1 - attention[:, 2:].detach()
        colour = (logits + head * moved(x, self._light, row)).sigmoid()
        return density, torch.cat([colour, attention, shifts], 1)

    def _static(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), hidden (N, 16), attention (N, 3), shifts (N, 2)."""
        avatar = self.avatar
        # Where a point lies is learnt (`aim`) from what the canonical volume shows there: how
        # attention and displacements change with it is slight, and a twentieth of a step.
        here = x.detach()
        encoded = frequencies((here - self._middle) / self._half, avatar.octaves)
        attention = (avatar.attention(encoded).float() + self._prior(here)).sigmoid()
        driven = by_row(attention[:, :2], row, self.n_rows)  # (N, 2 T)

        x, face_shift = self._moved_by_face(x, encoded, driven, attention[:, :2].sum(1))
        x, torso_shift = self._moved_by_torso(x, attention[:, 2:], row)

        features = avatar.volume(gathered(x, self._reach))
        hidden = avatar.density_net(features, (driven, self._density))
        density = (hidden[:, 0] - 1.5).clamp(max=7.0).exp()
        return density, hidden[:, 1:], attention, torch.cat([face_shift, torso_shift], 1)

    def _moved_by_face(
        self, x: Tensor, encoded: Tensor, driven: Tensor, reach: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Points after the face field, (N, 3), and how far they went, (N, 1)."""
        near = (reach.detach() > REACH).nonzero().squeeze(1)
        raw = self.avatar.face_field(
            encoded.index_select(0, near), (driven.index_select(0, near), self._face)
        )
        shift = MAX_SHIFT * (raw.float() / MAX_SHIFT).tanh()
        # a single camera hardly sees depth: motion along it would only be noise from the side
        shift = shift * shift.new_tensor([1.0, 1.0, 0.3])
        shift = shift * reach.index_select(0, near).clamp(max=1)[:, None]
        length = x.new_zeros(len(x), 1).index_add(0, near, shift.abs().sum(1, keepdim=True))
        return x.index_add(0, near, shift), length

    def _moved_by_torso(self, x: Tensor, torso: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Points after the torso field, (N, 3), and how far they went, (N, 1)."""
        near = (torso.detach().squeeze(1) > REACH).nonzero().squeeze(1)
        point, weight = x.index_select(0, near), torso.index_select(0, near)
        rows = row.index_select(0, near)
        there = (point.detach() - self._middle) / self._half
        encoded = frequencies(there, self.avatar.octaves)
        own = by_row(torch.ones_like(weight), rows, self.n_rows)
        raw = self.avatar.torso_field(encoded, (own, self._torso))
        carried = moved(point, self._shoulders, rows)
        shift = weight * (carried - point + MAX_SHIFT * (raw.float() / MAX_SHIFT).tanh())
        length = x.new_zeros(len(x), 1).index_add(0, near, shift.abs().sum(1, keepdim=True))
        return x.index_add(0, near, shift), length

    @exact
    def _prior(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of lips, eyes and torso by place alone: where attention starts from."""
        lips, left, right, torso = torch.addmm(
            self._prior_bias, torch.cat([x, x * x], 1), self._prior_weight
        ).unbind(1)
        return torch.stack([lips, torch.maximum(left, right), torso], 1).clamp(-6, 6)


def _prior(neutral: Tensor) -> tuple[Tensor, Tensor]:
    """Ellipsoids round lips and both eyes, and the half-space under the chin.

    Weight (6, 4) and bias (4,) that map x, x^2 to logits: an ellipsoid is a quadratic form.
    """
    mouth = (neutral[LIPS].mean(0) * 2 + neutral[8]) / 3
    weight, bias = neutral.new_zeros(6, 4), neutral.new_zeros(4)
    for column, (centre, radius) in enumerate([
        (mouth, neutral.new_tensor([0.28, 0.28, 0.35])),
        *((neutral[eye].mean(0), neutral.new_tensor([0.16, 0.12, 0.3])) for eye in EYES),
    ]):  # fmt: skip
        # 3 - 4 |(x - centre) / radius|^2
        weight[:3, column], weight[3:, column] = 8 * centre / radius**2, -4 / radius**2
        bias[column] = 3 - 4 * (centre / radius).square().sum()
    weight[1, 3], bias[3] = 1 / 0.05, -(neutral[8, 1] + 0.12) / 0.05
    return weight, bias


def _block(n_in: int, n_out: int, *, of: int) -> nn.Linear:
    """A linear map that starts as the columns of `n_in` inputs in a layer that has `of`."""
    block = nn.Linear(n_in, n_out, bias=False)
    block.weight.data.mul_((n_in / of) ** 0.5)
    return block


def _two(n_in: int, n_out: int, *, of: int) -> nn.ModuleList:
    """One map for the lips, one for the eyes."""
    return nn.ModuleList(_block(n_in, n_out, of=of) for _ in range(2))


def _mapped(maps: nn.ModuleList, codes: tuple[Tensor, Tensor]) -> Tensor:
    """Codes (T, N_CODE) of lips and eyes, each through its map -> (2 T, n_out), row by row."""
    return torch.stack([m(c) for m, c in zip(maps, codes, strict=True)], 1).flatten(0, 1)


def _disturbed(signals: Signals, noise: float) -> Signals:
    """Eyes, gaze and brows with a little noise."""

    def noisy(x: Tensor, size: float) -> Tensor:
        return x + noise * size * torch.randn_like(x)

    return signals.with_(
        eye=noisy(signals.eye, EYE_NOISE),
        gaze=noisy(signals.gaze, GAZE_NOISE),
        brow=noisy(signals.brow, BROW_NOISE),
    )
