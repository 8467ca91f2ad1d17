"""S3D-NeRF's field of one person: deform points into the pictures, then decode features there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.avatars.s3d.face import Face
from talkhead_cli.blocks.mouth import INNER_LIPS, MOUTH, N_CODES
from talkhead_cli.blocks.planes import frequencies
from talkhead_cli.blocks.precision import exact
from talkhead_cli.contracts import CHIN, EYES, NOSE, RELIEF_SIDE, Camera, Signals

if TYPE_CHECKING:
    from talkhead_cli.avatars.s3d.method import S3D

LIP_NOISE, EYE_NOISE = 0.1, 0.03  # on mouth and eye drives, in training
N_HIDDEN = 8  # features per point that the deformation passes to the decoder
N_OCTAVES = 5
N_CUES = 2  # outputs of `between`, for the mouth and for the eyes each
UPPER_EDGE, LOWER_EDGE = [60, 61, 62, 63, 64], [60, 67, 66, 65, 64]  # inside the lips
# Lids from corner to corner: the picture's left eye, then its right eye, mirrored.
UPPER_LID, LOWER_LID = ([36, 37, 38, 39], [45, 44, 43, 42]), ([36, 41, 40, 39], [45, 46, 47, 42])
LIP_CUE, LID_CUE = 20.0, 20.0 / 4  # scale of cues, per face height and per eye width
ANCHORS = torch.cat([MOUTH, torch.arange(36, 48)])  # landmarks that supervise the deformation
MOUTH_REACH, EYE_REACH = (0.5, 0.7), (0.9, 0.9)  # radii, see `_View`
FADE = 30.0  # sharpness of a region's fall-off beyond its radii
MOVED = 0.3  # displacement per unit of network output, in the region's unit of length
SOLID = 17.0  # maximal density before the decoder's factor: most light stops within .06
SOFT = 0.02  # face heights over which density rises at the surface
DEPTH = 0.8  # half of the depth range that planes cover around the ears, face heights
NEAR_POSE, NEAR_MOUTH = 0.1, 0.05  # scales of `likeness`: radians, face heights
N_MOUTH_DRIVES, N_EYE_DRIVES = N_CODES + 4, 8
# Channels of the field: own colour, source colour and share of own colour; then features; then,
# for each picture, its weight and weight times picture coordinates (N_PLACE channels).
OWN, SOURCE, SHARE = slice(0, 3), slice(3, 6), slice(6, 7)
N_COLOURS, N_PLACE = 7, 3


class Deformation(nn.Module):
    """Displacement of points of a region into the picture's face: an hourglass MLP with skips."""

    def __init__(self, width: int, n_told: int, n_cues: int = 0) -> None:
        super().__init__()
        n_in = 3 * (1 + 2 * N_OCTAVES) + n_cues
        self.first, self.told = nn.Linear(n_in, width), nn.Linear(n_told, width, bias=False)
        self.narrow = nn.Linear(width, width // 2)
        self.wide = nn.Linear(width // 2, width)
        self.last = nn.Linear(width, 3 + N_HIDDEN)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, place: Tensor, told: Tensor, row: Tensor, cues: Tensor) -> Tensor:
        """place (N, 3) in the region's unit of length, told (M, n_told), row (N,) into told, cues
        (N, n_cues) -> (N, 3 + N_HIDDEN): displacement in MOVED times that unit, and features for
        the decoder."""
        told = self.told(told).index_select(0, row)
        seen = torch.cat([frequencies(0.5 * place, N_OCTAVES), cues], 1)
        wide = (self.first(seen) + told).relu()
        x = self.narrow(wide).relu()
        return self.last((self.wide(x) + wide).relu())


class S3DField:
    """The field of one person for T rows; several pictures are blended, weighted by their
    likeness to the row."""

    n_detached = 0

    def __init__(self, avatar: S3D, faces: Sequence[Face], signals: Signals) -> None:
        self.aabb, self.n_rows = avatar.aabb, len(signals)
        self.channels = N_COLOURS + avatar.n_features + N_PLACE * len(faces)
        rest = faces[0].mouth.neutral
        self.views = [
            # another picture's face rests elsewhere: move the landmarks there
            _View(
                avatar,
                face,
                signals.with_(landmarks=signals.landmarks + face.mouth.neutral - rest)
                if i
                else signals,
            )
            for i, face in enumerate(faces)
        ]
        self.likeness = likeness(signals, faces)

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        parts = [view.decoded(x, row)[0] for view in self.views]
        if len(parts) == 1:
            return parts[0]
        return (torch.stack(parts, 1) * self.likeness[row]).sum(1)

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        densities, colours, places = zip(
            *(view.coloured(x, row) for view in self.views), strict=True
        )
        if len(densities) == 1:
            one = torch.ones_like(densities[0])[:, None]
            return densities[0], torch.cat([colours[0], one, places[0]], 1)
        each = torch.stack(densities, 1) * self.likeness[row]
        density = each.sum(1)
        part = each / density.clamp_min(1e-6)[:, None]
        mixed = (part[..., None] * torch.stack(colours, 1)).sum(1)
        told = torch.cat([part[..., None], part[..., None] * torch.stack(places, 1)], 2)
        return density, torch.cat([mixed, told.flatten(1)], 1)

    def losses(self, signals: Signals) -> dict[str, Tensor]:
        """Return anchor, the smooth L1 error of deformed landmarks against the main picture's in
        tenths of a face height, and deform, their mean squared displacement."""
        view = self.views[0]
        home = view.face.signals.landmarks[0, ANCHORS]
        x = signals.landmarks[:, ANCHORS]
        row = torch.arange(len(x), device=x.device).repeat_interleave(len(ANCHORS))
        at, _ = view.displaced(x.flatten(0, 1), row)
        gap = 10 * (at.view_as(x) - home)
        return {
            "anchor": F.smooth_l1_loss(gap, torch.zeros_like(gap), beta=0.1),
            "deform": (at.view_as(x) - x).square().sum(-1).mean(),
        }


def likeness(signals: Signals, faces: Sequence[Face]) -> Tensor:
    """Return the weight of each picture in each row, (T, P), summing to 1, by similarity of the
    view of the head and of mouth opening."""
    far = []
    for face in faces:
        # camera axis in head space: it depends on head and camera motion alike
        ahead, there = (s.camera.c2w[:, :3, 2] for s in (signals, face.signals))
        turn = (ahead - there).norm(dim=1) / NEAR_POSE
        mouths = [s.lip_gap for s in (signals, face.signals)]
        far.append(turn + (mouths[0] - mouths[1]).abs() / NEAR_MOUTH)
    return (-torch.stack(far, 1)).softmax(1)


class _View:
    """The field of one picture for the points of T rows."""

    def __init__(self, avatar: S3D, face: Face, signals: Signals) -> None:
        self.avatar, self.face, self.n_rows = avatar, face, len(signals)
        marks = face.signals.landmarks[0]
        # Centre and unit of length of each region.  Radii are in that unit, except that
        # MOUTH_REACH gives the horizontal one in jaw widths.
        nose, chin, jaw = marks[NOSE], marks[CHIN], (marks[4] - marks[12]).norm()
        self._mouth = (nose + chin) / 2, (chin - nose).norm()
        across, down = MOUTH_REACH
        self._mouth_radii = torch.stack([across * jaw / self._mouth[1], down + 0 * jaw])
        self._eyes = [(marks[eye].mean(0), (marks[eye][0] - marks[eye][3]).norm()) for eye in EYES]
        self._told_mouth, self._told_eyes = self._conditioning(signals)
        self._lips = signals.landmarks[:, [UPPER_EDGE, LOWER_EDGE], :2]  # (T, 2, 5, 2)
        self._lids = torch.cat([self._lids_of(signals, side) for side in (0, 1)])  # (2 T, 2, 4, 2)

    def _lids_of(self, signals: Signals, side: int) -> Tensor:
        """Return an eye's lids in each row in its local frame, from its openness relative to the
        picture's: (T, 2, 4, 2)."""
        home, (middle, unit) = self.face.signals, self._eyes[side]
        mirror = middle.new_tensor([1.0 if side == 0 else -1.0, 1.0])
        seen = home.landmarks[0, [UPPER_LID[side], LOWER_LID[side]], :2]
        upper, lower = mirror * (seen - middle[:2]) / unit
        share = signals.eye[:, side] / home.eye[0, side].clamp_min(0.3)
        drawn = lower + share.clamp(0, 1.3)[:, None, None] * (upper - lower)
        return torch.stack([drawn, lower.expand_as(drawn)], 1)

    def _conditioning(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Return conditioning of the mouth net (T, n), and of the eye net (2 T, n), left eyes
        first, right eyes mirrored."""
        avatar, home = self.avatar, self.face.signals
        drives = self._mouth_drives(signals.landmarks, home.landmarks)
        eyes = torch.stack([_eye_drives(signals, home, side) for side in (0, 1)])
        if avatar.training:
            drives = drives + avatar.noise * LIP_NOISE * torch.randn_like(drives)
            eyes = eyes + avatar.noise * EYE_NOISE * torch.randn_like(eyes)
        n, slots = len(signals), self.face.slots
        if avatar.deformation == "cross-modal":
            heard = avatar.cross(slots, torch.cat([drives, *eyes], 1))
        elif avatar.deformation == "concatenated":
            heard = slots.mean(0).expand(n, -1)
        else:
            heard = slots.new_zeros(n, slots.shape[1])
        mouth = torch.cat([drives, heard], 1)
        return mouth, torch.cat([eyes, heard.expand(2, -1, -1)], 2).flatten(0, 1)

    def _mouth_drives(self, marks: Tensor, home: Tensor) -> Tensor:
        """Return mouth shape relative to the picture's, and opening and width of both: (T, n)."""
        avatar = self.avatar
        shift = (marks - home)[:, MOUTH].flatten(1) @ avatar.mouth_basis
        scale = avatar.mouth_scale.clamp_min(1e-4)

        def opened(m: Tensor) -> Tensor:
            upper, lower = m[:, INNER_LIPS, 1].unbind(1)
            return torch.stack([10 * (lower - upper), 5 * (m[:, 54] - m[:, 48]).norm(dim=1)], 1)

        there = opened(home).expand(len(marks), -1)
        return torch.cat([(shift / scale).clamp(-6, 6), opened(marks), there], 1)

    def coloured(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), colours and features (N, N_COLOURS + F), picture
        coordinates (N, 2)."""
        density, said, seen, place = self.decoded(x, row)
        share = (said[:, :1] - 3.0).sigmoid()  # of own colours: begins at a twentieth
        # relative to the skin, since teeth and lids are lit like the face
        own = share * (2 * self.face.skin * said[:, 1:4].sigmoid())
        source = (1 - share) * seen[:, :3]
        return density, torch.cat([own, source, share, said[:, 4:]], 1), place

    def displaced(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Points (N, 3), rows (N,) -> points in the picture's face (N, 3), and features for the
        decoder (N, N_HIDDEN + 2 N_CUES)."""
        avatar = self.avatar
        shift = x.new_zeros(len(x), 3 + N_HIDDEN + 2 * N_CUES)
        if avatar.deformation == "none":
            return x, shift[:, 3:]
        middle, unit = self._mouth
        cues = partial(between, x, self._lips, scale=LIP_CUE)
        shift = self._region(avatar.mouth_net, shift, (x - middle) / unit, self._mouth_radii,
                             self._told_mouth, row, unit, cues, 0)  # fmt: skip
        radii = x.new_tensor(EYE_REACH)
        for side, (middle, unit) in enumerate(self._eyes):
            mirror = x.new_tensor([1.0 if side == 0 else -1.0, 1.0, 1.0])
            local = mirror * (x - middle) / unit
            cues = partial(between, local, self._lids, scale=LID_CUE)
            shift = self._region(avatar.eye_net, shift, local, radii, self._told_eyes,
                                 row + side * self.n_rows, unit * mirror, cues, N_CUES)  # fmt: skip
        return x + shift[:, :3], shift[:, 3:]

    @staticmethod
    def _region(
        net: nn.Module,
        shift: Tensor,
        local: Tensor,
        radii: Tensor,
        told: Tensor,
        row: Tensor,
        unit: Tensor,
        cues: Callable[[Tensor, Tensor], Tensor],
        place: int,
    ) -> Tensor:
        """Evaluate a net on the points (N,) inside its region; return shift (N, ...) plus its
        output and the region's cues, written from column `place` of the cues."""
        off = ((local[:, :2] / radii).square().sum(1).sqrt() - 1).clamp_min(0)
        weight = (-FADE * off.square()).exp()
        near = (weight > 0.01).nonzero().squeeze(1)
        cue = cues(near, row[near])
        said = net(local[near], told, row[near], cue).float()
        told_of = F.pad(cue, (place, N_CUES - place))
        said = torch.cat([MOVED * said[:, :3] * unit.expand(3), said[:, 3:], told_of], 1)
        return shift.index_add(0, near, said * weight[near, None])

    def decoded(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), share and own colour, raw, and features (N, 4 + F),
        `Face.seen` there (N, 6), picture coordinates (N, 2) in [-1, 1]."""
        face = self.face
        at, hidden = self.displaced(x, row)
        place = _projected(at, face.signals.camera)
        read = torch.cat([plane(place, torch.zeros_like(row)) for plane in face.planes], 1)
        seen = F.grid_sample(
            face.seen, place[None, :, None, :2], padding_mode="border", align_corners=False
        )[0, :, :, 0].T
        relief = F.grid_sample(
            face.relief,
            at[None, :, None, :2] / RELIEF_SIDE,
            padding_mode="border",
            align_corners=True,
        )[0, 0, :, 0]
        behind = at[:, 2] - relief
        head = seen[:, 3:].sum(1).clamp(0, 1)
        depth = torch.stack([(behind / 0.1).clamp(-3, 3), head], 1)
        said = self.avatar.decoder(torch.cat([read, seen, depth, hidden], 1)).float()
        surface = ((behind + 0.1 * said[:, 0].tanh()) / SOFT).sigmoid()
        # density with which 0.4 face heights of the head are as opaque as in the picture's labels
        thick = -(1 - 0.999 * head).log() / 0.4
        density = surface * thick.clamp_max(SOLID) * (0.5 * said[:, 1].tanh()).exp()
        return density, said[:, 2:], seen, place[:, :2]


def _eye_drives(signals: Signals, home: Signals, side: int) -> Tensor:
    """Return driving signals of an eye (T, N_EYE_DRIVES), mirrored to the picture's left one."""
    there = home.eye[:, side : side + 1].expand(len(signals), 1)
    eye = signals.eye[:, side : side + 1]
    mirror = signals.gaze.new_tensor([1.0 if side == 0 else -1.0, 1.0])
    gaze = 4 * (signals.gaze - home.gaze) * mirror
    brow = 10 * (signals.brow - home.brow)[:, side : side + 1]
    return torch.cat(
        [eye, (torch.pi * eye).sin(), (torch.pi * eye).cos(), there, eye - there, gaze, brow], 1
    )


@exact
def between(x: Tensor, edges: Tensor, near: Tensor, row: Tensor, *, scale: float) -> Tensor:
    """Return cues (M, 2) of the points x[near], near (M,), of rows (M,): depth inside the gap
    between upper and lower edge, times scale, negative outside; -1 to 1 from corner to corner.

    x (N, 2 or 3) · edges (T, 2, K, 2): x, y from corner to corner, assumed evenly spaced in x
    """
    x, last = x[near], edges.shape[2] - 1
    left, right = edges[:, 0, 0, 0], edges[:, 0, last, 0]
    along = last * (x[:, 0] - left[row]) / (right - left).clamp_min(1e-3)[row]
    at = along.clamp(0, last - 1e-4)
    knot = at.long()
    lines = edges[..., 1].flatten(0, 1)  # (2 T, K)
    upper, lower = (
        torch.lerp(lines[2 * row + k, knot], lines[2 * row + k, knot + 1], at - knot)
        for k in (0, 1)
    )
    beyond = (along - at).abs() * (right - left)[row] / last
    inside = torch.minimum(x[:, 1] - upper, lower - x[:, 1]) - beyond
    where = (2 * along / last - 1).clamp(-2, 2)
    return torch.stack([(scale * inside).clamp(-3, 3), where], 1)


@exact
def _projected(x: Tensor, camera: Camera) -> Tensor:
    """Head space (N, 3) -> coordinates in the camera's first row: picture x, y in [-1, 1], and
    depth relative to the ears over DEPTH, (N, 3)."""
    c2w, k = camera.c2w[0], camera.k[0]
    seen = (x - c2w[:3, 3]) @ c2w[:3, :3]
    pixel = seen[:, :2] / seen[:, 2:] * torch.stack([k[0, 0], k[1, 1]]) + k[:2, 2]
    ears = (-c2w[:3, 3]) @ c2w[:3, 2]
    return torch.cat([2 * pixel / camera.size_px - 1, (seen[:, 2:] - ears) / DEPTH], 1)
