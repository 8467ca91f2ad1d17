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
* Lips are driven through the mouth's shape in head space, which the speech encoder is
  supervised on directly (`listen`); learnt from pixels alone the link is lost.
* The gated codes also reach the colour network: a closed lid or an open mouth shows
  surfaces that no displacement of a canonical volume can bring to light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import Avatar, StepResult, gathered, shaped
from talkhead_cli.blocks.loss import gradient_difference, ssim
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.planes import TriPlanes, frequencies
from talkhead_cli.blocks.speech import SpeechEncoder, ridge_by_blocks
from talkhead_cli.contracts import Frame, RayBundle, Rendered, Signals

MOUTH = torch.tensor([*range(4, 13), *range(48, 68)])  # jaw and lips of the 68
LIPS = slice(48, 68)
EYES = (slice(36, 42), slice(42, 48))
N_LIP_CODES = 8
RIDGES = (3e2, 1e3, 3e3, 1e4, 3e4)
SPREAD = 0.8  # share of the true spread of a mouth code that heard codes are given
MAX_SHIFT = 0.15  # face heights; guards the displacement fields
# Channels that the marcher composites: colour, then auxiliary maps with detached weights.
COLOUR, ATTENTION, SHIFTS = slice(0, 3), slice(3, 6), slice(6, 8)
# Noise on the driving signals in training.  Twenty-odd numbers can name each of a few hundred
# frames; without noise the networks learn the frames by heart.
LIP_NOISE = 0.25  # in standard deviations
EYE_NOISE, GAZE_NOISE, BROW_NOISE = 0.05, 0.01, 0.002
POSE_NOISE = 0.1  # in standard deviations
RELIEF = 128  # side of the face's depth map
RELIEF_HINT = 0.1  # trust in its depth beside the face
LOOK_SCALE = 5.0  # a talking head turns by a few degrees: directions hardly differ
GATHER = 1.6  # how much more room the planes give the face than the picture's rim
REACH = 0.02  # attention under which a region's field is not asked


@dataclass(frozen=True)
class _Widths:
    planes: tuple[int, ...]
    plane_channels: int
    trunk: int
    head: int
    octaves: int


SIZES = {
    "tiny": _Widths((16, 32, 64, 128, 256), 4, 32, 48, 4),
    "full": _Widths((32, 64, 128, 256, 512), 4, 64, 64, 6),
}


class LokiTalk(Avatar):
    """One person's LokiTalk avatar.

    Measured of the person (`calibrate`): neutral (68, 3) mean landmarks · lip_basis (87, K),
    lip_scale (K,) principal shapes of mouth and jaw · lip_trust (K,) how well speech tells each,
    lip_gain (K,) that heard codes are widened by ·
    pose_mean, pose_scale (10,) of pose and shoulders · rest_pose (6,) in which head and
    shoulders are canonical · relief (RELIEF, RELIEF, 2) depth of the face, and trust in it
    """

    neutral: Tensor
    lip_basis: Tensor
    lip_scale: Tensor
    lip_trust: Tensor
    lip_gain: Tensor
    pose_mean: Tensor
    pose_scale: Tensor
    rest_pose: Tensor
    relief: Tensor

    def __init__(self, size: Literal["tiny", "full"], *, n_steps: int, n_features: int) -> None:
        super().__init__()
        widths = SIZES[size]
        self.octaves = widths.octaves
        n_position, n_code = 3 * (1 + 2 * widths.octaves), 16
        self.speech = SpeechEncoder(n_steps, n_features, N_LIP_CODES)
        self.lip_code = Mlp(N_LIP_CODES, 32, n_code)
        self.eye_code = Mlp(2 * 3 + 2 + 2, 32, n_code)
        self.pose_code = Mlp(6 + 4, 32, n_code)
        self.attention = Mlp(n_position, 32, 3, last_scale=0.1)
        self.face_field = Mlp(n_position + 2 * n_code, widths.trunk, 3, 3, last_scale=0.01)
        self.torso_field = Mlp(n_position + n_code, widths.trunk, 3, 3, last_scale=0.01)
        self.volume = TriPlanes(widths.planes, widths.plane_channels)
        self.gate = nn.Linear(2 * n_code, 12)
        self.density_net = Mlp(self.volume.n_out + 12, widths.head, 1 + 16, 2)
        self.colour_net = Mlp(16 + 3, 32, 3, 2)
        for name, shape in {
            "neutral": (68, 3),  # mean landmarks of the person
            "lip_basis": (len(MOUTH) * 3, N_LIP_CODES),
            "lip_scale": (N_LIP_CODES,),
            "lip_trust": (N_LIP_CODES,),
            "lip_gain": (N_LIP_CODES,),
            "pose_mean": (10,),
            "pose_scale": (10,),
            "rest_pose": (6,),
            "relief": (RELIEF, RELIEF, 2),
        }.items():
            self.register_buffer(name, torch.zeros(shape))

    @classmethod
    def build(
        cls, size: Literal["tiny", "full"], *, n_steps: int, n_features: int, px: int
    ) -> Self:
        return cls(size, n_steps=n_steps, n_features=n_features)

    # -- what is measured ------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Neutral face, mouth basis, linear speech map and its gain, pose statistics."""
        self.aabb.copy_(aabb)
        self.neutral.copy_(signals.landmarks.mean(0))
        mouth = (signals.landmarks - self.neutral)[:, MOUTH].flatten(1)
        _, _, basis = torch.linalg.svd(mouth.double(), full_matrices=False)
        self.lip_basis.copy_(basis[:N_LIP_CODES].T)
        self.lip_scale.copy_((mouth @ self.lip_basis).std(0).clamp_min(1e-4))
        code = self.lips_of(signals)
        ridge, guess = ridge_by_blocks(signals.audio.flatten(1), code, RIDGES)
        self.speech.solve(signals.audio, code, ridge)
        self.lip_trust.copy_(_agreement(code, guess))
        self.lip_gain.fill_(1.0)
        pose = torch.cat([signals.pose, signals.body], 1)
        self.pose_mean.copy_(pose.mean(0))
        self.pose_scale.copy_(pose.std(0).clamp_min(1e-2))
        self.rest_pose.copy_(signals.pose.mean(0))
        self.relief.copy_(relief_of(mesh, float(aabb[[0, 1, 3, 4]].abs().max())))

    @torch.no_grad()
    def settle(self, kept: Signals) -> None:
        """Set the gain of codes heard in speech, on rows that the encoder was not trained on.

        A regression says the mean of what may be meant, which mumbles.  Codes that speech does
        tell are widened to SPREAD of their true spread; of the others, no more is kept than
        lowers the error.
        """
        code, said = self.lips_of(kept), self.speech(kept.audio)
        # block cross-validation of the linear map saw every row, the nets these few: a code that
        # either of them tells is told
        trust = torch.maximum(self.lip_trust, _agreement(code, said)).clamp(0, 1)
        share = torch.where(trust > 0.35, SPREAD, trust)
        self.lip_gain.copy_((share * code.std(0) / said.std(0).clamp_min(1e-6)).clamp(0, 2))

    def lips_of(self, signals: Signals) -> Tensor:
        """Standardised mouth code (T, K) of the landmarks."""
        mouth = (signals.landmarks - self.neutral)[:, MOUTH].flatten(1)
        return mouth @ self.lip_basis / self.lip_scale

    def listen(self, signals: Signals) -> Signals:
        """Mouth landmarks as speech says; the rest of the face is neutral."""
        code = self.speech(signals.audio) * self.lip_gain
        mouth = (code * self.lip_scale) @ self.lip_basis.T
        landmarks = self.neutral.expand(len(code), -1, -1).clone()
        landmarks[:, MOUTH] += mouth.view(len(code), -1, 3)
        return signals.with_(landmarks=landmarks)

    # -- hop 8: signals to field ---------------------------------------------------------------

    def condition(self, signals: Signals) -> LokiField:
        if self.training:
            signals = _disturbed(signals)
        eye = signals.eye
        wave = torch.cat([eye, (torch.pi * eye).sin(), (torch.pi * eye).cos()], 1)
        eye_code = self.eye_code(torch.cat([wave, 4 * signals.gaze, 10 * signals.brow], 1))
        pose = torch.cat([signals.pose, signals.body], 1)
        pose = (pose - self.pose_mean) / self.pose_scale
        if self.training:
            pose = pose + POSE_NOISE * torch.randn_like(pose)
        pose_code = self.pose_code(pose.clamp(-2.5, 2.5))
        lips = self.lips_of(signals)
        if self.training:
            lips = lips + LIP_NOISE * torch.randn_like(lips)
        lip_code = self.lip_code(lips.clamp(-4, 4))
        shoulders = shoulders_in_head(signals.pose, signals.body, self.rest_pose)
        return LokiField(self, lip_code, eye_code, pose_code, shoulders)

    def compose(self, rendered: Rendered, rays: RayBundle, plate: Tensor) -> Frame:
        rgb = rendered.feature[:, COLOUR] + (1 - rendered.opacity) * plate
        parts = {
            "attention": shaped(rendered.feature[:, ATTENTION], rays),
            "shift": shaped(rendered.feature[:, SHIFTS], rays),
            "spread": shaped(rendered.spread, rays),
        }
        return Frame(
            shaped(rgb, rays), shaped(rendered.opacity, rays), shaped(rendered.depth, rays), parts
        )

    # -- losses ------------------------------------------------------------------------------

    def losses(self, results: list[StepResult]) -> dict[str, Tensor]:
        terms: dict[str, list[Tensor]] = {}
        for result in results:
            found = self._speech_losses if result.rendered is None else self._picture_losses
            for name, value in found(result).items():
                terms.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def _speech_losses(self, result: StepResult) -> dict[str, Tensor]:
        signals = result.shot.signals
        code = self.lips_of(signals)
        if self.training:
            return {"speech": F.smooth_l1_loss(*_paired(self.speech.votes(signals.audio), code))}
        return {"speech": F.smooth_l1_loss(self.speech(signals.audio), code)}

    def _picture_losses(self, result: StepResult) -> dict[str, Tensor]:
        shot, frame, rendered = result.shot, result.frame, result.rendered
        rays = shot.rays
        assert frame is not None and rendered is not None and rays is not None
        assert shot.target is not None and shot.labels is not None
        rgb = frame.rgb.reshape(-1, 3)
        person = 1 - shot.labels[:, 5:6]
        opacity = rendered.opacity.clamp(1e-4, 1 - 1e-4)
        masks = region_masks(shot.signals, rays, shot.labels)
        attention = rendered.feature[:, ATTENTION]
        solid = rendered.opacity.detach()
        moved = rendered.feature[:, SHIFTS]
        losses = {
            "colour": F.mse_loss(rgb, shot.target),
            # the matte's rim is a guess; inside the face there is no doubt, and no highlight may
            # be painted by letting a bright wall shine through
            "matte": ((0.2 + 0.8 * shot.labels[:, :1]) * (opacity - person).square()).mean(),
            "entropy": -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log()).mean(),
            "spread": rendered.spread.mean(),
            # one-sided inside the soft masks would let attention vanish: two-sided, as in 1.4
            "attention": ((attention - masks * solid) * solid).abs().mean(),
            "still": (moved * (1 - masks[:, :2].amax(1, keepdim=True))).mean(),
            "relief": self._relief_loss(rendered, rays, shot.labels),
            "rough": self.volume.roughness(),
        }
        if rays.layout is not None:
            target = shot.target.view(*rays.layout, 3)
            losses["ssim"] = 1 - ssim(frame.rgb, target).mean()
            losses["gradient"] = gradient_difference(frame.rgb, target)
        return losses

    def _relief_loss(self, rendered: Rendered, rays: RayBundle, labels: Tensor) -> Tensor:
        """How far the rendered face lies from the tracked face's depth, face heights.

        One camera and a head that turns by a few degrees leave depth open; the mesh knows it.
        """
        distance = rendered.depth / rendered.opacity.clamp_min(1e-3)
        point = rays.origins + distance * rays.directions
        found = F.grid_sample(
            self.relief.permute(2, 0, 1)[None],
            point[None, None, :, :2].detach() / self.aabb[[0, 1, 3, 4]].abs().max(),
            align_corners=True,
        )[0, :, 0]
        sure = found[1] * (1 - labels[:, 5]) * rendered.opacity.detach()[:, 0]
        return (sure * F.smooth_l1_loss(point[:, 2], found[0], reduction="none", beta=0.03)).mean()

    # -- parts ---------------------------------------------------------------------------------

    def _parts(self) -> dict[str, list[nn.Module]]:
        return {
            "speech": [self.speech.nets],
            "volume": [self.volume],
            "deform": [self.face_field, self.torso_field, self.attention, self.lip_code,
                       self.eye_code, self.pose_code],
            "static": [self.gate, self.density_net, self.colour_net],
        }  # fmt: skip

    def parts(self) -> list[str]:
        return list(self._parts())

    def part(self, name: str) -> list[nn.Parameter]:
        return [p for module in self._parts()[name] for p in module.parameters()]


class LokiField:
    """LokiTalk's field, closed over T rows of codes."""

    channels = 8
    n_detached = 5

    def __init__(
        self, avatar: LokiTalk, lips: Tensor, eyes: Tensor, pose: Tensor, shoulders: Tensor
    ) -> None:
        self.avatar, self.lips, self.eyes, self.pose = avatar, lips, eyes, pose
        self.shoulders = shoulders  # (T, 3, 4)
        self.aabb = avatar.aabb
        self.n_rows = len(lips)
        low, high = avatar.aabb[:3], avatar.aabb[3:]
        self._middle, self._half = (low + high) / 2, (high - low) / 2 * 1.1
        self._reach = torch.maximum(-low, high) * 1.1  # the planes keep the face in their middle
        self._landmarks = _region_anchors(avatar.neutral)

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        return self._static(x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        density, hidden, attention, shifts = self._static(x, row)
        colour = self.avatar.colour_net(torch.cat([hidden, LOOK_SCALE * d], 1)).sigmoid()
        return density, torch.cat([colour, attention, shifts], 1)

    def _static(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), hidden (N, 16), attention (N, 3), shifts (N, 2)."""
        avatar = self.avatar
        encoded = frequencies((x - self._middle) / self._half, avatar.octaves)
        attention = (avatar.attention(encoded) + self._prior(x)).sigmoid()
        lips, eyes, torso = attention.split(1, 1)
        lip_code, eye_code = gathered(self.lips, row) * lips, gathered(self.eyes, row) * eyes
        codes = torch.cat([lip_code, eye_code], 1)

        moved, face_shift = self._moved_by_face(x, encoded, codes, lips + eyes)
        canonical, torso_shift = self._moved_by_torso(moved, torso, row)

        features = avatar.volume(self._gathered(canonical))
        hidden = avatar.density_net(torch.cat([features, avatar.gate(codes)], 1))
        density = (hidden[:, 0] - 1.5).clamp(max=7.0).exp()
        return density, hidden[:, 1:], attention, torch.cat([face_shift, torso_shift], 1)

    def _gathered(self, x: Tensor) -> Tensor:
        """Head space (N, 3) -> the planes' [-1, 1], stretched round the face."""
        return (GATHER * x / self._reach).asinh() / math.asinh(GATHER)

    def _moved_by_face(
        self, x: Tensor, encoded: Tensor, codes: Tensor, reach: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Points after the face field, (N, 3), and how far they went, (N, 1)."""
        near = (reach.detach().squeeze(1) > REACH).nonzero().squeeze(1)
        raw = self.avatar.face_field(
            torch.cat([encoded.index_select(0, near), codes.index_select(0, near)], 1)
        )
        shift = MAX_SHIFT * (raw / MAX_SHIFT).tanh() * reach.index_select(0, near).clamp(max=1)
        # a single camera hardly sees depth: motion along it would only be noise from the side
        shift = shift * shift.new_tensor([1.0, 1.0, 0.3])
        length = x.new_zeros(len(x), 1).index_add(0, near, shift.abs().sum(1, keepdim=True))
        return x.index_add(0, near, shift), length

    def _moved_by_torso(self, x: Tensor, torso: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Points after the torso field, (N, 3), and how far they went, (N, 1)."""
        near = (torso.detach().squeeze(1) > REACH).nonzero().squeeze(1)
        point, weight = x.index_select(0, near), torso.index_select(0, near)
        rows = row.index_select(0, near)
        motion = gathered(self.shoulders, rows)
        carried = (motion[:, :, :3] * point[:, None]).sum(-1) + motion[:, :, 3]
        encoded = frequencies((point - self._middle) / self._half, self.avatar.octaves)
        raw = self.avatar.torso_field(torch.cat([encoded, gathered(self.pose, rows)], 1))
        shift = weight * (carried - point + MAX_SHIFT * (raw / MAX_SHIFT).tanh())
        length = x.new_zeros(len(x), 1).index_add(0, near, shift.abs().sum(1, keepdim=True))
        return x.index_add(0, near, shift), length

    def _prior(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of lips, eyes and torso by place alone: where attention starts from."""
        mouth, eyes, chin = self._landmarks
        lips = 3 - 4 * (((x - mouth) / x.new_tensor([0.28, 0.28, 0.35])) ** 2).sum(1)
        side = ((x[:, None] - eyes) / x.new_tensor([0.16, 0.12, 0.3])) ** 2
        lids = 3 - 4 * side.sum(-1).amin(1)
        torso = (x[:, 1] - chin[1] - 0.12) / 0.05
        return torch.stack([lips, lids, torso], 1).clamp(-6, 6)


def _disturbed(signals: Signals) -> Signals:
    """Eyes, gaze and brows with a little noise."""

    def noisy(x: Tensor, size: float) -> Tensor:
        return x + size * torch.randn_like(x)

    return signals.with_(
        eye=noisy(signals.eye, EYE_NOISE),
        gaze=noisy(signals.gaze, GAZE_NOISE),
        brow=noisy(signals.brow, BROW_NOISE),
    )


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the columns of (T, K) and (T, K) -> (K,)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).mean(0) / (a.std(0) * b.std(0)).clamp_min(1e-6)


def _paired(votes: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    return votes, code.expand_as(votes)


def _region_anchors(neutral: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Middle of lips and chin (3,), of the eyes (2, 3), and the chin (3,)."""
    mouth = (neutral[LIPS].mean(0) * 2 + neutral[8]) / 3
    return mouth, torch.stack([neutral[eye].mean(0) for eye in EYES]), neutral[8]


def region_masks(signals: Signals, rays: RayBundle, labels: Tensor) -> Tensor:
    """Soft masks (R, 3) of lips, eyes and torso in the picture.

    Ellipses around the landmarks of the ray's row, fading like a Gaussian; the lips' one
    reaches from under the nose to the chin, since the jaw speaks too.  Torso: shoulders 1,
    neck 0.7, the rest 0.
    """
    size = signals.camera.size_px
    marks = signals.landmarks_px * size
    at = rays.pixel
    lips, chin, nose = marks[:, LIPS], marks[:, 8], marks[:, 33]
    centre = (nose + chin) / 2
    wide = (lips[..., 0].amax(1) - lips[..., 0].amin(1)) * 0.85
    tall = (chin - nose).norm(dim=1) * 0.62
    mouth = _ellipse(at, centre[rays.row], torch.stack([wide, tall], 1)[rays.row])
    eyes = at.new_zeros(len(at))
    for eye in EYES:
        corner = marks[:, eye]
        width = (corner[..., 0].amax(1) - corner[..., 0].amin(1)).clamp_min(2)
        radius = torch.stack([0.9 * width, 0.75 * width], 1)
        middle = corner.mean(1) - torch.stack([torch.zeros_like(width), 0.1 * width], 1)
        eyes = torch.maximum(eyes, _ellipse(at, middle[rays.row], radius[rays.row]))
    torso = labels[:, 4] + 0.7 * labels[:, 3]
    return torch.stack([mouth, eyes, torso], 1)


def _ellipse(at: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """1 inside the ellipse, falling off like a Gaussian outside, (R,)."""
    distance = ((at - centre) / radius).square().sum(1).sqrt()
    return (-4 * (distance - 1).clamp_min(0).square()).exp()


def rotations(vector: Tensor) -> Tensor:
    """Rotation vectors (T, 3) -> matrices (T, 3, 3), by Rodrigues' formula."""
    angle = vector.norm(dim=1).clamp_min(1e-8)[:, None, None]
    x, y, z = (vector / angle[:, :, 0]).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    one = torch.eye(3, device=vector.device)
    return one + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


def relief_of(mesh: Tensor, side: float) -> Tensor:
    """Rigid face mesh (n, 3) in head space -> depth over a grid of x, y in [-side, side].

    (RELIEF, RELIEF, 2) of z and the trust in it.  Inside the face, z is a thin-plate spline
    through the mesh (Bookstein 1989) and sure; outside it is the plane between the ears, where
    hair, neck and shoulders lie on average, and little more than a hint.
    """
    flat, z = mesh[:, :2].double(), mesh[:, 2].double()

    def bend(a: Tensor, b: Tensor) -> Tensor:
        square = torch.cdist(a, b).square()
        return square * (square + 1e-12).log()

    n = len(flat)
    affine = torch.cat([torch.ones_like(flat[:, :1]), flat], 1)
    system = flat.new_zeros(n + 3, n + 3)
    system[:n, :n] = bend(flat, flat) + 1e-3 * torch.eye(n).to(flat)
    system[:n, n:], system[n:, :n] = affine, affine.T
    solution = torch.linalg.solve(system, F.pad(z, (0, 3)))
    line = torch.linspace(-side, side, RELIEF).to(flat)
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([x, y], -1).view(-1, 2)
    depth = bend(at, flat) @ solution[:n] + solution[n] + at @ solution[n + 1 :]
    inside = (1 - (torch.cdist(at, flat).amin(1) - 0.03).clamp_min(0) / 0.05).clamp_min(0)
    trust = RELIEF_HINT + (1 - RELIEF_HINT) * inside
    return torch.stack([inside * depth, trust], -1).view(RELIEF, RELIEF, 2).float()


def shoulders_in_head(pose: Tensor, body: Tensor, rest: Tensor) -> Tensor:
    """Carry points of the shoulders from where a row shows them to where they rest.

    pose (T, 6), body (T, 4), rest (6,) the pose in which head and shoulders are canonical ->
    (T, 3, 4): head space at the row -> camera -> undo the shoulders' motion -> head space at
    rest.
    """
    turn, move = rotations(pose[:, :3]), pose[:, 3:]
    home_turn, home = rotations(rest[None, :3])[0], rest[3:]
    roll = rotations(F.pad(body[:, 2:3], (2, 0)))
    # The shoulders roll about a pivot half a face height under the chin.
    pivot = home + home_turn @ home.new_tensor([0.0, 1.1, 0.0])
    still = roll.transpose(1, 2) @ turn
    offset = move - pivot - F.pad(body[:, :2], (0, 1))
    at_rest = (roll.transpose(1, 2) @ offset[..., None])[..., 0] + pivot - home
    back = home_turn.T
    return torch.cat([back @ still, (at_rest @ back.T)[..., None]], 2)
