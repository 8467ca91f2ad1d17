"""A person enrolled from pictures, ready to be rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from talkhead_cli.avatars.base import distance, shaped
from talkhead_cli.avatars.s3d.face import Face
from talkhead_cli.avatars.s3d.field import N_COLOURS, N_PLACE, OWN, SHARE, SOURCE, S3DField
from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.rigid import shoulders_in_picture
from talkhead_cli.contracts import Frame, RayBundle, Rendered, Signals

if TYPE_CHECKING:
    from talkhead_cli.avatars.s3d.method import S3D

MAPS = MappingProxyType({"own": ("colour of its own",)})


class S3DSpeaker:
    """A `Speaker` built from a portrait; shares the avatar's networks."""

    past = 0
    has_kernel = False
    lids_in_landmarks = False
    maps: Mapping[str, tuple[str, ...]] = MAPS

    def __init__(self, avatar: S3D, faces: Sequence[Face]) -> None:
        """faces: one per picture of the person; the first is the main one."""
        self.avatar, self.faces, self.main = avatar, faces, faces[0]
        self.aabb, self.magnification = avatar.aabb, avatar.magnification

    @property
    def neutral(self) -> Tensor:
        return self.main.mouth.neutral

    def listen(self, signals: Signals) -> Signals:
        return self.main.mouth.driven_by_speech(signals, self.avatar.speech(signals))

    def at_rest(self, signals: Signals) -> Signals:
        return self.main.mouth.at_rest(signals)

    def aim(self, signals: Signals, rays: RayBundle) -> RayBundle:
        return rays

    def condition(self, signals: Signals) -> S3DField:
        return S3DField(self.avatar, self.faces, signals)

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        """Composite the head over the plate; with whole pictures, add shoulders and retouch."""
        depth = distance(rendered, rays)
        own = shaped(rendered.feature[:, SHARE], rays)
        if not rays.whole:
            colour = rendered.feature[:, OWN] + rendered.feature[:, SOURCE]
            rgb = colour + (1 - rendered.opacity) * plate
            return Frame(shaped(rgb, rays), shaped(rendered.opacity, rays), depth, {"own": own})
        times = self.magnification
        marched = shaped(torch.cat([rendered.feature, rendered.opacity], 1).float(), rays)
        raw = (
            F.interpolate(marched.permute(0, 3, 1, 2), scale_factor=times, mode="bilinear")
            if times > 1
            else marched.permute(0, 3, 1, 2)
        )
        opacity = raw[:, -1:]
        carried = self._carried(raw[:, N_COLOURS + self.avatar.n_features : -1])
        shoulders = self._shoulders(signals, raw.shape[-1])
        head = raw[:, OWN] + (opacity - raw[:, SHARE]).clamp_min(0) * carried
        picture = head + (1 - opacity) * shoulders[:, :3]
        alpha = opacity + (1 - opacity) * shoulders[:, 3:]
        own_word = raw[:, : N_COLOURS + self.avatar.n_features]
        draft = torch.cat([own_word, opacity, carried, shoulders], 1)
        change = self.avatar.retoucher(draft)
        alpha = (alpha + change[:, 3:]).permute(0, 2, 3, 1)
        behind = plate.view(*alpha.shape[:3], 3)
        rgb = (picture + change[:, :3]).permute(0, 2, 3, 1) + (1 - alpha) * behind
        depth, own = (
            x.repeat_interleave(times, 1).repeat_interleave(times, 2) for x in (depth, own)
        )
        return Frame(rgb, alpha.clamp(0, 1), depth, {"own": own})

    def _carried(self, told: Tensor) -> Tensor:
        """Return the source pictures warped by the marched coordinates, blended.

        told (B, P N_PLACE, H, W): weight of each picture, and weight times picture coordinates
        """
        carried, weight = [], []
        for face, (part, *place) in zip(
            self.faces, (p.unbind(1) for p in told.split(N_PLACE, 1)), strict=True
        ):
            at = torch.stack(place, -1) / part.clamp_min(1e-2)[..., None]
            picture = face.picture.expand(len(at), -1, -1, -1)
            carried.append(F.grid_sample(picture, at, padding_mode="border", align_corners=False))
            weight.append(part[:, None])
        if len(carried) == 1:
            return carried[0]
        mixed = sum(w * c for w, c in zip(weight, carried, strict=True))
        return mixed / sum(weight).clamp_min(1e-2)

    def _shoulders(self, signals: Signals, px: int) -> Tensor:
        """Return the main picture's shoulders moved to each row (T, 4, px, px), premultiplied."""
        home = self.main.signals
        moved_by = signals.body - home.body
        carry = shoulders_in_picture(moved_by, signals.camera, home.pose[0])
        grid = _grid(carry, px)
        return F.grid_sample(
            self.main.shoulders.expand(len(carry), -1, -1, -1),
            grid,
            padding_mode="border",
            align_corners=False,
        )


@exact
def _grid(carry: Tensor, px: int) -> Tensor:
    return F.affine_grid(carry, [len(carry), 1, px, px], align_corners=False)
