"""S3D-NeRF (Li et al., ECCV 2024): a face whom nobody filmed speaks, from one picture of it.

    x' = x + D(x, a, F)      where a point of the row's face lies in the picture's face
    p  = the place of x' in the picture's camera
    density, colour = decoder(planes(p), ...)     planes: of an encoder of the picture
    film = retouched(marched head, over the picture's shoulders, over the background)

D is told a, what drives the face, and F, what slots of the picture's appearance hear of a by
cross-attention.  All of it learns from pairs of frames of many people; a new face is one forward
pass of the encoder (`enroll`).

The paper's text leaves sizes and much else open (only its outline is known to us).  Where we go
our own way, it is because a handful of people is all that a small training set has:
* What a picture shows is carried, not painted: besides features the first plane holds the
  picture itself, and colours of the field's own have to be asked for (`own`: teeth, lids).
* The depth of the face is the tracked mesh's; learnt is what is to be changed of it.
* a is the mouth's shape, which the speech encoder says and is supervised on directly, against
  the picture's own; and lids, gaze and brows.  Learnt from pixels alone, the link from speech to
  lips is lost.  D is supervised too, where landmarks are: they say what lies where.
* D works in the regions that speak and blink, each in its own measure of length (so that faces
  are alike), and is zero elsewhere; both eyes share one, mirrored.
* Hair is marched with the face, since it turns with it.  Finishing carries the picture itself
  along the marched places, at its full size, and lays it over shoulders that follow `body`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import Avatar, Speaker, StepResult, distance, shaped
from talkhead_cli.blocks.appearance import AppearanceEncoder, CrossModal, Slots
from talkhead_cli.blocks.loss import patch_losses, solid_losses
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.mouth import INNER_LIPS, MOUTH, N_CODES, Mouth, principal_shapes
from talkhead_cli.blocks.planes import RowPlanes, frequencies
from talkhead_cli.blocks.regions import EYES, region_masks
from talkhead_cli.blocks.rigid import shoulders_in_picture
from talkhead_cli.blocks.speech import SpeechEncoder, ridge_by_blocks, ridge_map
from talkhead_cli.blocks.sync import SyncExpert, lip_boxes, lip_crops, runs_of
from talkhead_cli.blocks.upscale import Retoucher
from talkhead_cli.contracts import (
    RELIEF_SIDE,
    Camera,
    Frame,
    Portrait,
    RayBundle,
    Rendered,
    Signals,
)

DEFORMATIONS = ("none", "naive", "concatenated", "cross-modal")
RIDGES = (1e3, 3e3, 1e4, 3e4, 1e5)
LIP_NOISE, EYE_NOISE = 0.1, 0.03  # on what drives, in training
N_HIDDEN = 8  # numbers that the deformation tells the decoder about a point
N_OCTAVES = 5
N_CUES = 2  # see `_between_lips`
UPPER_LIP, LOWER_LIP = [60, 61, 62, 63, 64], [60, 67, 66, 65, 64]  # their inner edges
SOLID = 17.0  # density of what is solid, per face height: most of the light stops within .06
SOFT = 0.02  # face heights over which the face's surface begins
DEPTH = 0.8  # half of the depth that planes cover round the ears, face heights
# What the field says of a point, in the order of its channels.
OWN, SOURCE, SHARE, PLACE = slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 9)
N_FIXED = 9
N_MOUTH_DRIVES, N_EYE_DRIVES = N_CODES + 4, 8


@dataclass(frozen=True)
class _Widths:
    encoder: tuple[int, ...]
    channels: int
    n_scales: int
    slots: tuple[int, int]
    deformation: int
    decoder: int
    features: int
    magnification: int
    retoucher: int
    picture_px: int  # side of the picture that is encoded


SIZES = {
    "tiny": _Widths((24, 32, 48, 64), 8, 3, (8, 48), 48, 48, 8, 1, 24, 128),
    "full": _Widths((64, 128, 256, 512), 32, 3, (16, 128), 128, 64, 32, 4, 64, 256),
}


@dataclass(frozen=True)
class _Face:
    """What pictures say of a person, once for all rows; P pictures.

    planes by picture and scale · seen (P, 6, s, s): colour and labels of face, mouth, hair ·
    picture (P, 3, H, W) · shoulders (P, 4, H, W) premultiplied · camera, marks (P, 68, 3),
    eye, gaze, brow, body: P rows · slots (P, n, width) · relief (1, 2, n, n)
    """

    planes: list[list[RowPlanes]]
    seen: Tensor
    picture: Tensor
    shoulders: Tensor
    signals: Signals
    slots: Tensor
    relief: Tensor
    mouth: Mouth


class Deformation(nn.Module):
    """Where points of a region lie in the picture's face: an hourglass net with skip sums."""

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
        """place (N, 3) in the region's own measure, told (M, n_told), row (N,) into it, cues
        (N, n_cues) -> (N, 3 + N_HIDDEN): displacement in that measure, and what the decoder is
        told."""
        told = self.told(told).index_select(0, row)
        seen = torch.cat([frequencies(0.5 * place, N_OCTAVES), cues], 1)
        wide = (self.first(seen) + told).relu()
        x = self.narrow(wide).relu()
        said: Tensor = self.last((self.wide(x) + wide).relu())
        return said


class S3D(Avatar):
    """The network that draws whom it is shown.  For comparisons: `deformation`, one of
    DEFORMATIONS (naive: told what drives alone; concatenated: and what the picture looks like)."""

    needs_portrait = True
    maps: Mapping[str, tuple[str, ...]] = MappingProxyType({"own": ("colour of its own",)})
    box = (-1.0, -1.1, -0.75, 1.0, 1.1, 0.45)
    common = ("",)  # nothing is a single person's
    mouth_basis: Tensor
    mouth_scale: Tensor
    mouth_rest: Tensor
    mouth_gain: Tensor

    def __init__(
        self, size: Literal["tiny", "full"], *, n_steps: int, n_features: int, n_people: int = 1
    ) -> None:
        super().__init__()
        widths = SIZES[size]
        self.aabb.copy_(torch.tensor(self.box))
        self.magnification, self.picture_px = widths.magnification, widths.picture_px
        self.n_features = widths.features
        self.deformation = DEFORMATIONS[-1]
        for name, shape in {
            "mouth_basis": (3 * len(MOUTH), N_CODES), "mouth_scale": (N_CODES,),
            "mouth_rest": (), "mouth_gain": (),
        }.items():  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))
        self.mouths = [Mouth() for _ in range(n_people)]  # measured, and not part of the state
        self._gains: list[Tensor] = []
        self.speech = SpeechEncoder.of_windows(n_steps, n_features, N_CODES)
        self.encoder = AppearanceEncoder(8, widths.encoder, widths.channels, widths.n_scales)
        n_slots, n_slot = widths.slots
        self.slots = Slots(self.encoder.n_deep, n_slots, n_slot)
        n_drives = N_MOUTH_DRIVES + 2 * N_EYE_DRIVES
        self.cross = CrossModal(n_drives, n_slots, n_slot, n_slot)
        self.mouth_net = Deformation(widths.deformation, N_MOUTH_DRIVES + n_slot, N_CUES)
        self.eye_net = Deformation(widths.deformation // 2, N_EYE_DRIVES + n_slot)
        n_in = self.encoder.n_out + 6 + 2 + N_HIDDEN + N_CUES
        # depth, strength, share of its own colour, that colour, features
        self.decoder = Mlp(n_in, widths.decoder, 2 + 1 + 3 + widths.features, 3, last_scale=0.3)
        n_draft = N_FIXED - 2 + 1 + widths.features + 3 + 4
        self.retoucher = Retoucher(n_draft, widths.retoucher, 4)

    @classmethod
    def build(
        cls, size: Literal["tiny", "full"], *, n_steps: int, n_features: int, px: int,
        n_people: int = 1,
    ) -> Self:  # fmt: skip
        return cls(size, n_steps=n_steps, n_features=n_features, n_people=n_people)

    # -- what is measured ------------------------------------------------------------------

    @torch.no_grad()
    def survey(self, people: Sequence[Signals]) -> None:
        """Shapes of mouths, how far they go and how wide they stand on average; the linear map
        of speech, of all people together."""
        self.mouth_basis.copy_(principal_shapes(people))
        self.mouths = [Mouth().to(s.pose.device) for s in people]
        for mouth, signals in zip(self.mouths, people, strict=True):
            mouth.measure(signals, self.mouth_basis)
        self.mouth_scale.copy_(torch.stack([m.scale for m in self.mouths]).median(0).values)
        nothing = torch.zeros(1, N_CODES).to(self.mouth_basis)
        rests = torch.stack([m.opening(nothing)[0] for m in self.mouths])
        self.mouth_rest.copy_(rests.median())
        self.mouth_gain.fill_(1.0)
        audio = torch.cat([s.audio.flatten(1) for s in people])
        said = torch.cat([m.to_say(s) for m, s in zip(self.mouths, people, strict=True)])
        every = -(-len(audio) // 3000)
        audio, said = audio[::every], said[::every]
        ridge, _ = ridge_by_blocks(audio, said, RIDGES)
        weight, bias = ridge_map(audio, said, ridge)
        self.speech.linear.weight.copy_(weight.T)
        self.speech.linear.bias.copy_(bias)

    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Nothing: all that is known of a person is in the portrait."""

    @torch.no_grad()
    def settle(self, kept: Signals) -> None:
        """The gain of heard mouths: what suits people in the middle."""
        mouth = self._mouth(kept)
        mouth.settle(kept, self.speech(kept))
        self._gains.append(mouth.gain.clone())
        self.mouth_gain.copy_(torch.stack(self._gains).median())

    def _mouth(self, signals: Signals) -> Mouth:
        return self.mouths[int(signals.person[0]) if len(self.mouths) > 1 else 0]

    def listen(self, signals: Signals) -> Signals:
        """Landmarks of one of the people that it learns from."""
        return self._mouth(signals).heard(signals, self.speech(signals))

    # -- a person --------------------------------------------------------------------------

    def enroll(self, portrait: Portrait | None) -> Speaker:
        assert portrait is not None, "s3d draws whom it is shown"
        size = (portrait.pictures.shape[1],) * 2
        picture = portrait.pictures.permute(0, 3, 1, 2)
        labels = F.interpolate(portrait.labels, size=size, mode="bilinear")
        head = labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
        shoulders = _behind_the_head(picture, labels, portrait.signals)
        # pixels of the rim are half background: the head's own colour is that of its inside
        person = 1 - labels[:, 5:6]
        sure = (10 * (person - 0.9)).clamp_min(0) * (5 * (head - 0.2)).clamp(0, 1)
        inside = filled(picture, sure)
        colour = torch.lerp(inside, picture, sure)
        seen = torch.cat([colour, labels[:, :3]], 1)
        small = F.interpolate(seen, size=(self.picture_px,) * 2, mode="area")
        placed = torch.cat([small[:, :3] * small[:, 3:].sum(1, keepdim=True), small[:, 3:],
                            _places(portrait.signals, self.picture_px)], 1)  # fmt: skip
        planes, deep = self.encoder(placed)
        mouth = Mouth().to(picture.device)
        mouth.presume(portrait.signals.landmarks[0], self.mouth_basis, self.mouth_scale,
                      self.mouth_rest, self.mouth_gain)  # fmt: skip
        face = _Face(
            planes=[[RowPlanes(level[p : p + 1]) for level in planes]
                    for p in range(len(portrait))],
            seen=small, picture=colour, shoulders=shoulders, signals=portrait.signals,
            slots=self.slots(deep), relief=portrait.relief.permute(2, 0, 1)[None], mouth=mouth,
        )  # fmt: skip
        return S3DSpeaker(self, face)

    # -- losses ----------------------------------------------------------------------------

    def losses(self, results: list[StepResult]) -> dict[str, Tensor]:
        terms: dict[str, list[Tensor]] = {}
        for result in results:
            found = self._speech_losses if result.rendered is None else self._picture_losses
            for name, value in found(result).items():
                terms.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def _speech_losses(self, result: StepResult) -> dict[str, Tensor]:
        signals = result.shot.signals
        told = self._mouth(signals).to_say(signals)
        votes = self.speech.votes(signals)
        return {"speech": F.smooth_l1_loss(votes, told.expand_as(votes))}

    def _picture_losses(self, result: StepResult) -> dict[str, Tensor]:
        shot, frame, rendered = result.shot, result.frame, result.rendered
        field, rays = result.field, shot.rays
        assert frame is not None and rendered is not None and rays is not None
        assert isinstance(field, S3DField)
        assert shot.target is not None and shot.labels is not None and shot.plate is not None
        losses = field.losses(shot.signals)
        whole = rays.whole
        labels, target, plate = shot.labels, shot.target, shot.plate
        if whole and self.magnification > 1:
            labels, target, plate = (
                _smaller(x, rays.layout, self.magnification) for x in (labels, target, plate)
            )
        head = labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
        marched = rendered.feature[:, OWN] + rendered.feature[:, SOURCE]
        over = marched + (1 - rendered.opacity) * plate
        alive = region_masks(shot.signals, rays.pixel, rays.row, labels)[:, :2].amax(1)
        losses |= solid_losses(rendered, head, labels[:, :1]) | {
            "colour": F.mse_loss(over, head * target + (1 - head) * plate),
            "own": ((1 - alive) * rendered.feature[:, SHARE.start]).mean(),
        }
        if whole:
            losses |= self._whole_losses(result)
        return losses

    def _whole_losses(self, result: StepResult) -> dict[str, Tensor]:
        shot, frame = result.shot, result.frame
        assert frame is not None and shot.target is not None and shot.labels is not None
        shape = frame.rgb.shape
        truth, labels = shot.target.view(shape), shot.labels.view(*shape[:3], -1)
        error = F.smooth_l1_loss(frame.rgb, truth, beta=0.1, reduction="none").mean(-1)
        row, line, column = torch.meshgrid(
            *(torch.arange(n, device=error.device) for n in shape[:3]), indexing="ij"
        )
        at = torch.stack([column, line], -1).view(-1, 2) + 0.5
        alive = region_masks(shot.signals, at, row.flatten(), labels.flatten(0, 2))[:, :2]
        alive = alive.amax(1).view_as(error)
        return (
            self._sync_losses(result)
            | {
                "whole": error.mean(),
                "mouth": (error * alive).sum() / alive.sum().clamp_min(1),
                "whole_matte": (frame.alpha - (1 - labels[..., 5:6])).square().mean(),
            }
            | patch_losses(frame.rgb, truth, "whole_")
        )

    def _sync_losses(self, result: StepResult) -> dict[str, Tensor]:
        """1 - cosine of drawn lips and their sound, as a lip-sync expert sees and hears them."""
        signals, frame = result.shot.signals, result.frame
        assert frame is not None
        judges = [judge for judge in self.judges if isinstance(judge, SyncExpert)]
        crops = lip_crops(frame.rgb.float(), lip_boxes(signals.landmarks_px))
        runs, middle = runs_of(crops, signals.moment)
        if not judges or not len(runs):
            return {}
        heard = [(j.seen(runs) * j.heard(signals.audio[middle])).sum(1) for j in judges]
        return {"sync": 1 - torch.stack(heard).mean()}

    # -- parts -----------------------------------------------------------------------------

    def _parts(self) -> dict[str, list[nn.Module]]:
        return {
            "speech": [self.speech.nets],
            "encoder": [self.encoder],
            "deformation": [self.slots, self.cross, self.mouth_net, self.eye_net],
            "decoder": [self.decoder],
            "retoucher": [self.retoucher],
        }

    def parts(self) -> list[str]:
        return list(self._parts())

    def part(self, name: str) -> list[nn.Parameter]:
        return [p for module in self._parts()[name] for p in module.parameters()]


class S3DSpeaker:
    """A person as a portrait shows them, drawn by the network."""

    past = 0
    maps = S3D.maps

    def __init__(self, avatar: S3D, face: _Face) -> None:
        self.avatar, self.face = avatar, face
        self.aabb, self.magnification = avatar.aabb, avatar.magnification

    @property
    def neutral(self) -> Tensor:
        return self.face.mouth.neutral

    def listen(self, signals: Signals) -> Signals:
        return self.face.mouth.heard(signals, self.avatar.speech(signals))

    def aim(self, signals: Signals, rays: RayBundle) -> RayBundle:
        return rays

    def condition(self, signals: Signals) -> S3DField:
        return S3DField(self.avatar, self.face, signals)

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        """The head over the plate; where rays are whole pictures, shoulders too, retouched."""
        depth = distance(rendered, rays)
        own = shaped(rendered.feature[:, SHARE], rays)
        if not rays.whole:
            colour = rendered.feature[:, OWN] + rendered.feature[:, SOURCE]
            rgb = colour + (1 - rendered.opacity) * plate
            return Frame(shaped(rgb, rays), shaped(rendered.opacity, rays), depth, {"own": own})
        times = self.magnification
        marched = shaped(torch.cat([rendered.feature, rendered.opacity], 1).float(), rays)
        raw = F.interpolate(marched.permute(0, 3, 1, 2), scale_factor=times, mode="bilinear") \
            if times > 1 else marched.permute(0, 3, 1, 2)  # fmt: skip
        opacity = raw[:, -1:]
        place = (raw[:, PLACE] / opacity.clamp_min(1e-2)).permute(0, 2, 3, 1)
        n = len(place)
        carried = F.grid_sample(
            self.face.picture[:1].expand(n, -1, -1, -1), place, padding_mode="border",
            align_corners=False,
        )  # fmt: skip
        shoulders = self._shoulders(signals, place.shape[1])
        head = raw[:, OWN] + (opacity - raw[:, SHARE]).clamp_min(0) * carried
        picture = head + (1 - opacity) * shoulders[:, :3]
        alpha = opacity + (1 - opacity) * shoulders[:, 3:]
        draft = torch.cat([raw[:, :7], raw[:, N_FIXED:], carried, shoulders], 1)
        change = self.avatar.retoucher(draft)
        alpha = (alpha + change[:, 3:]).permute(0, 2, 3, 1)
        behind = plate.view(*alpha.shape[:3], 3)
        rgb = (picture + change[:, :3]).permute(0, 2, 3, 1) + (1 - alpha) * behind
        depth, own = (
            x.repeat_interleave(times, 1).repeat_interleave(times, 2) for x in (depth, own)
        )
        return Frame(rgb, alpha.clamp(0, 1), depth, {"own": own})

    def _shoulders(self, signals: Signals, px: int) -> Tensor:
        """The picture's shoulders where rows show them (T, 4, px, px), premultiplied."""
        home = self.face.signals
        moved_by = signals.body - home.body[:1]
        carry = shoulders_in_picture(moved_by, signals.camera, home.pose[0])
        grid = F.affine_grid(carry, [len(carry), 1, px, px], align_corners=False)
        return F.grid_sample(
            self.face.shoulders[:1].expand(len(carry), -1, -1, -1), grid, padding_mode="border",
            align_corners=False,
        )  # fmt: skip


class S3DField:
    """The field of one person, closed over T rows."""

    n_detached = 0

    def __init__(self, avatar: S3D, face: _Face, signals: Signals) -> None:
        self.avatar, self.face, self.n_rows = avatar, face, len(signals)
        self.aabb = avatar.aabb
        self.channels = N_FIXED + avatar.n_features
        marks = face.signals.landmarks[0]
        # each region's middle, unit of length and radii (in that unit)
        nose, chin, jaw = marks[33], marks[8], (marks[4] - marks[12]).norm()
        self._mouth = (nose + chin) / 2, (chin - nose).norm()
        self._mouth_radii = torch.stack([0.5 * jaw / self._mouth[1], 0.7 + 0 * jaw])
        self._eyes = [(marks[eye].mean(0), (marks[eye][0] - marks[eye][3]).norm())
                      for eye in EYES]  # fmt: skip
        self._told_mouth, self._told_eyes = self._told(signals)
        self._lips = signals.landmarks[:, [UPPER_LIP, LOWER_LIP], :2]  # (T, 2, 5, 2)

    def _told(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """What regions are told of each row: (T, n), and (2 T, n) of both eyes, mirrored."""
        avatar, home = self.avatar, self.face.signals[:1]
        drives = self._mouth_drives(signals.landmarks, home.landmarks)
        eyes = torch.stack([_eye_drives(signals, home, side) for side in (0, 1)])
        if avatar.training:
            drives = drives + avatar.noise * LIP_NOISE * torch.randn_like(drives)
            eyes = eyes + avatar.noise * EYE_NOISE * torch.randn_like(eyes)
        n, slots = len(signals), self.face.slots[0]
        if avatar.deformation == "cross-modal":
            heard = avatar.cross(slots, torch.cat([drives, *eyes], 1))
        elif avatar.deformation == "concatenated":
            heard = slots.mean(0).expand(n, -1)
        else:
            heard = slots.new_zeros(n, slots.shape[1])
        mouth = torch.cat([drives, heard], 1)
        return mouth, torch.cat([eyes, heard.expand(2, -1, -1)], 2).flatten(0, 1)

    def _mouth_drives(self, marks: Tensor, home: Tensor) -> Tensor:
        """The mouth against the picture's, in shapes; opening and width of both: (T, n)."""
        avatar = self.avatar
        shift = (marks - home)[:, MOUTH].flatten(1) @ avatar.mouth_basis
        scale = avatar.mouth_scale.clamp_min(1e-4)

        def opened(m: Tensor) -> Tensor:
            upper, lower = m[:, INNER_LIPS, 1].unbind(1)
            return torch.stack([10 * (lower - upper), 5 * (m[:, 54] - m[:, 48]).norm(dim=1)], 1)

        there = opened(home).expand(len(marks), -1)
        return torch.cat([(shift / scale).clamp(-6, 6), opened(marks), there], 1)

    # -- the field -------------------------------------------------------------------------

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        return self._decoded(x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        density, said, seen, place = self._decoded(x, row)
        share = (said[:, :1] - 3.0).sigmoid()
        own = share * said[:, 1:4].sigmoid()
        source = (1 - share) * seen[:, :3]
        return density, torch.cat([own, source, share, place, said[:, 4:]], 1)

    def displaced(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Points (N, 3) of rows (N,) -> where they lie in the picture's face (N, 3), and what the
        decoder is told of them (N, N_HIDDEN + N_CUES)."""
        avatar = self.avatar
        shift = x.new_zeros(len(x), 3 + N_HIDDEN + N_CUES)
        if avatar.deformation == "none":
            return x, shift[:, 3:]
        middle, unit = self._mouth
        shift = self._region(avatar.mouth_net, shift, (x - middle) / unit, self._mouth_radii,
                             self._told_mouth, row, unit, x, self._lips)  # fmt: skip
        radii = x.new_tensor([0.9, 0.9])
        for side, (middle, unit) in enumerate(self._eyes):
            mirror = x.new_tensor([1.0 if side == 0 else -1.0, 1.0, 1.0])
            local = mirror * (x - middle) / unit
            shift = self._region(avatar.eye_net, shift, local, radii, self._told_eyes,
                                 row + side * self.n_rows, unit * mirror, x)  # fmt: skip
        return x + shift[:, :3], shift[:, 3:]

    @staticmethod
    def _region(
        net: nn.Module, shift: Tensor, local: Tensor, radii: Tensor, told: Tensor, row: Tensor,
        unit: Tensor, x: Tensor, lips: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Add what a net says of the points (N,) that lie in its region to `shift` (N, ...)."""
        off = ((local[:, :2] / radii).square().sum(1).sqrt() - 1).clamp_min(0)
        weight = (-30 * off.square()).exp()
        near = (weight > 0.01).nonzero().squeeze(1)
        cues = (
            x.new_zeros(len(near), 0) if lips is None else _between_lips(x[near], lips, row[near])
        )
        said = net(local[near], told, row[near], cues).float()
        rest = cues if lips is not None else said.new_zeros(len(near), N_CUES)
        said = torch.cat([0.3 * said[:, :3] * unit.expand(3), said[:, 3:], rest], 1)
        said = said * weight[near, None]
        return shift.index_add(0, near, said)

    def _decoded(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), share and own colour and features (N, 4 + F), what
        the picture shows (N, 6), the place in the picture (N, 2) in [-1, 1]."""
        face = self.face
        at, hidden = self.displaced(x, row)
        place = _projected(at, face.signals.camera)
        read = torch.cat([plane(place, torch.zeros_like(row)) for plane in face.planes[0]], 1)
        seen = F.grid_sample(
            face.seen[:1], place[None, :, None, :2], padding_mode="border", align_corners=False
        )[0, :, :, 0].T
        relief = F.grid_sample(
            face.relief, at[None, :, None, :2] / RELIEF_SIDE, padding_mode="border",
            align_corners=True,
        )[0, 0, :, 0]  # fmt: skip
        behind = at[:, 2] - relief
        head = seen[:, 3:].sum(1).clamp(0, 1)
        depth = torch.stack([(behind / 0.1).clamp(-3, 3), head], 1)
        said = self.avatar.decoder(torch.cat([read, seen, depth, hidden], 1)).float()
        surface = ((behind + 0.1 * said[:, 0].tanh()) / SOFT).sigmoid()
        # a ray that runs through what is solid loses as much light as the picture's matte says
        thick = -(1 - 0.999 * head).log() / 0.4
        density = surface * thick.clamp_max(SOLID) * (0.5 * said[:, 1].tanh()).exp()
        return density, said[:, 2:], seen, place[:, :2]

    def losses(self, signals: Signals) -> dict[str, Tensor]:
        """How far landmarks are carried from where the picture has them (anchor), in face heights
        times ten; size of the displacements there (deform)."""
        home = self.face.signals.landmarks[0]
        marks = torch.cat([MOUTH, torch.arange(36, 48)])
        x = signals.landmarks[:, marks]
        row = torch.arange(len(x), device=x.device).repeat_interleave(len(marks))
        at, _ = self.displaced(x.flatten(0, 1), row)
        gap = 10 * (at.view_as(x) - home[marks])
        return {
            "anchor": F.smooth_l1_loss(gap, torch.zeros_like(gap), beta=0.1),
            "deform": (at.view_as(x) - x).square().sum(-1).mean(),
        }


def _eye_drives(signals: Signals, home: Signals, side: int) -> Tensor:
    """What drives an eye (T, N_EYE_DRIVES), as if it were the picture's left one."""
    there = home.eye[:, side : side + 1].expand(len(signals), 1)
    eye = signals.eye[:, side : side + 1]
    mirror = signals.gaze.new_tensor([1.0 if side == 0 else -1.0, 1.0])
    gaze = 4 * (signals.gaze - home.gaze) * mirror
    brow = 10 * (signals.brow - home.brow)[:, side : side + 1]
    return torch.cat([eye, (torch.pi * eye).sin(), (torch.pi * eye).cos(), there, eye - there,
                      gaze, brow], 1)  # fmt: skip


def _between_lips(x: Tensor, lips: Tensor, row: Tensor) -> Tensor:
    """How far points x (N, 3) lie between the inner edges of the lips of their rows (N,), twenty
    to the face height and negative outside; and where along the mouth, from -1 to 1: (N, 2).

    lips (T, 2, 5, 2): x, y of either edge from corner to corner, taken as evenly spaced
    """
    left, right = lips[:, 0, 0, 0], lips[:, 0, 4, 0]
    along = 4 * (x[:, 0] - left[row]) / (right - left).clamp_min(1e-3)[row]
    at = along.clamp(0, 4 - 1e-4)
    knot = at.long()
    edges = lips[..., 1].flatten(0, 1)  # (2 T, 5)
    upper, lower = (
        torch.lerp(edges[2 * row + k, knot], edges[2 * row + k, knot + 1], at - knot)
        for k in (0, 1)
    )
    beyond = (along - at).abs() * (right - left)[row] / 4
    inside = torch.minimum(x[:, 1] - upper, lower - x[:, 1]) - beyond
    return torch.stack([(20 * inside).clamp(-3, 3), (along / 2 - 1).clamp(-2, 2)], 1)


def _projected(x: Tensor, camera: Camera) -> Tensor:
    """Head space (N, 3) -> the first picture's place in [-1, 1] and depth round the ears over
    DEPTH, (N, 3)."""
    c2w, k = camera.c2w[0], camera.k[0]
    seen = (x - c2w[:3, 3]) @ c2w[:3, :3]
    pixel = seen[:, :2] / seen[:, 2:] * torch.stack([k[0, 0], k[1, 1]]) + k[:2, 2]
    ears = (-c2w[:3, 3]) @ c2w[:3, 2]
    return torch.cat([2 * pixel / camera.size_px - 1, (seen[:, 2:] - ears) / DEPTH], 1)


def _places(signals: Signals, px: int) -> Tensor:
    """Where pixels lie against the face (P, 2, px, px): from between the eyes, in eye distances."""
    marks = 2 * signals.landmarks_px - 1
    left, right = (marks[:, eye].mean(1) for eye in EYES)
    middle, unit = (left + right) / 2, (right - left).norm(dim=1)
    line = (torch.arange(px, device=marks.device) + 0.5) * 2 / px - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([x, y]) - middle[:, :, None, None]
    return (at / unit[:, None, None, None] / 2).clamp(-3, 3)


def _behind_the_head(picture: Tensor, labels: Tensor, signals: Signals) -> Tensor:
    """Shoulders and neck (P, 4, H, W), premultiplied, going on beneath chin and hair."""
    body = labels[:, 3:5].sum(1, keepdim=True).clamp(0, 1)
    head = labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
    marks = signals.landmarks_px
    height = (marks[:, 8, 1] - marks[:, 27, 1]).clamp_min(1e-3)  # from the chin to the eyes
    px = picture.shape[-1]
    line = (torch.arange(px, device=picture.device) + 0.5) / px
    y, x = torch.meshgrid(line, line, indexing="ij")
    wide = (marks[:, 12, 0] - marks[:, 4, 0]).abs()
    beside = (x - marks[:, 8, 0, None, None]).abs() / wide[:, None, None]
    below = (y - marks[:, 8, 1, None, None]) / height[:, None, None] + 0.35
    throat = (8 * (0.5 - beside)).sigmoid() * (16 * below).sigmoid()
    # lying behind a head that lets some of it through, together they are as solid as the person
    alpha = torch.maximum((body / (1 - head).clamp_min(0.05)).clamp_max(1), throat[:, None])
    alpha = alpha * (body + head).clamp(0, 1)
    sure = (10 * (body + head - 0.9)).clamp(0, 1) * (5 * (body - 0.2)).clamp(0, 1)
    colour = torch.lerp(filled(picture, sure), picture, sure)
    return torch.cat([alpha * colour, alpha], 1)


def filled(picture: Tensor, sure: Tensor) -> Tensor:
    """Colours (P, C, H, W) where they are sure (P, 1, H, W), and elsewhere those of the nearest
    sure places, ever coarser (push and pull over a pyramid)."""
    if picture.shape[-1] <= 2:
        mean = (picture * sure).sum((2, 3), True) / sure.sum((2, 3), True).clamp_min(1e-4)
        return torch.lerp(mean.expand_as(picture), picture, sure)
    taken, weight = F.avg_pool2d(picture * sure, 2), F.avg_pool2d(sure, 2)
    below = filled(taken / weight.clamp_min(1e-4), (4 * weight).clamp_max(1))
    below = F.interpolate(below, size=picture.shape[2:], mode="bilinear")
    return torch.lerp(below, picture, sure)


def _smaller(values: Tensor, layout: tuple[int, int, int] | None, times: int) -> Tensor:
    """Pixels (B H W, C) of finished pictures -> of marched ones of `layout`."""
    assert layout is not None
    b, h, w = layout
    pictures = values.view(b, h * times, w * times, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(pictures, times).permute(0, 2, 3, 1).flatten(0, 2)
