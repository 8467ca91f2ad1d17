"""ID-aware knowledge transfer: person-specific parameters from pictures (LokiTalk, Fig. 2).

People share the networks, the canonical volume and this encoder.  Five items are specific to a
person; each is a change of otherwise common parameters:

    dynamic      first biases of the nets of lip, eye and pose codes
    geometry     first bias of the density net
    appearance   first bias of the colour net
    hyper        last layers of both displacement fields
    offset       of the canonical volume

LokiTalk's field therefore works the same with and without transfer: a person is the common
parameters plus the five changes, which `LokiTalk.meet` turns into ordinary parameters.

The paper feeds pictures to a CNN and cameras and poses to an MLP.  Here pictures are first warped
into the layout of the volume's front plane, by camera, pose and relief of the face, so that pixels
of the encoder's feature map are aligned with the texels they predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.blocks.appearance import AppearanceEncoder
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.planes import TriPlanes, unwarped
from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.rigid import below_chin
from talkhead_cli.contracts import RELIEF_SIDE, Camera, Portrait, Signals

N_SEEN = 3 + 6 + 1  # colours, labels, whether the texel lies inside the picture
N_TOLD = 6 + 4 + 1  # pose, shoulders, focal length
N_CODE = 64
SCALE = 0.1  # factor from the encoder's outputs to parameter changes
VECTORS = {
    "dynamic": ("lip_code.0.bias", "eye_code.0.bias", "pose_code.0.bias"),
    "geometry": ("density_net.0.bias",),
    "appearance": ("colour_net.0.bias",),
    "hyper": (
        "face_field.4.weight",
        "face_field.4.bias",
        "torso_field.4.weight",
        "torso_field.4.bias",
    ),
}


class Transfer(nn.Module):
    """The ID-encoder."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], volume: TriPlanes, widths: Sequence[int]
    ) -> None:
        """shapes: of the parameters named in VECTORS · widths: of the encoder's levels, at least
        one for each of the volume's but its finest."""
        super().__init__()
        self.shapes = {item: {n: shapes[n] for n in names} for item, names in VECTORS.items()}
        self.sizes = [level.shape[-1] for level in volume.levels]  # ascending
        n_scales = len(self.sizes) - 1
        self.encoder = AppearanceEncoder(N_SEEN, widths, volume.channels, n_scales)
        # Each texel of the front plane's two finest levels also sees its own pixel directly.
        self.details = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(N_SEEN, 16, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, volume.channels, 1)
            )
            for _ in range(2)
        )
        self.told = Mlp(N_TOLD, 32, 32)
        self.code = Mlp(self.encoder.n_deep + 32, N_CODE, N_CODE)
        self.items = nn.ModuleDict(
            {
                item: nn.Linear(N_CODE, sum(s.numel() for s in of.values()))
                for item, of in self.shapes.items()
            }
        )
        for parameter in self.items["hyper"].parameters():
            nn.init.zeros_(parameter)  # so that displacements start near zero

    @property
    def px(self) -> int:
        """Side of the encoder's input pictures: that of the volume's finest level."""
        return self.sizes[-1]

    def forward(self, seen: Tensor, told: Tensor) -> dict[str, Tensor]:
        """seen (P, N_SEEN, px, px) from `in_plane_layout`, told (P, N_TOLD) from `pose_inputs`
        ->
        changes of LokiTalk's parameters by name, averaged over the P pictures."""
        half = F.avg_pool2d(seen, 2)
        planes, deep = self.encoder(half)
        code = self.code(torch.cat([deep.mean(1), self.told(told)], 1)).mean(0)
        changes = {}
        for item, shapes in self.shapes.items():
            parts = self.items[item](code).split([s.numel() for s in shapes.values()])
            for (name, shape), part in zip(shapes.items(), parts, strict=True):
                changes[name] = SCALE * part.view(shape)
        means = [level.mean(0) for level in planes]  # (3, C, s, s), the finest first
        finest_first = [*enumerate(self.sizes)][::-1]
        for (index, size), nearest in zip(finest_first, [means[0], *means], strict=True):
            change = F.interpolate(nearest, size=(size, size), mode="bilinear")
            if (depth := len(self.sizes) - 1 - index) < len(self.details):
                shown = F.interpolate(seen, size=(size, size), mode="area")
                front = self.details[depth](shown).mean(0)
                change = change + F.pad(front[None], (0, 0, 0, 0, 0, 0, 0, 2))
            changes[f"volume.levels.{index}"] = SCALE * change
        return changes


def pose_inputs(signals: Signals) -> Tensor:
    """Return pose, shoulders and focal length of pictures for the encoder: (P, N_TOLD)."""
    camera = signals.camera
    focal = camera.k[:, :1, 0] / camera.size_px
    away = signals.pose[:, 5:] - 5  # heads are some five face heights away
    return torch.cat([signals.pose[:, :5], away, signals.body, focal], 1)


@torch.no_grad()
def in_plane_layout(
    portrait: Portrait,
    *,
    px: int,
    reach: Tensor,
    shared: Tensor,
    aimed: Tensor,
    shoulders: Tensor,
    chin: float,
) -> Tensor:
    """Warp pictures into the layout of the canonical volume's front plane: (P, N_SEEN, px, px).

    reach (3,) half-size of the volume's planes · shared (1, 3, 4) from the person's head space to
    the shared face's · aimed (P, 3, 4) correction of each row's head pose · shoulders (P, 3, 4)
    from each row to the rest pose · chin: its height in head space
    """
    line = (torch.arange(px, device=reach.device) + 0.5) * 2 / px - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    place = unwarped(torch.stack([x, y, torch.zeros_like(x)], -1).view(-1, 3), reach)
    own = _through(_inverse(shared), place[None])[0]  # (N, 3)
    at = (own[:, :2] / RELIEF_SIDE).expand(len(portrait), 1, -1, -1)
    depth = F.grid_sample(
        portrait.relief[:, None, ..., 0], at, padding_mode="border", align_corners=True
    )[:, 0, 0]
    point = torch.cat([own[:, :2].expand(len(portrait), -1, -1), depth[..., None]], 2)
    carried = _through(_inverse(shoulders), point)
    point = torch.lerp(point, carried, below_chin(point[..., 1:2], chin))
    point = _through(_inverse(aimed), point)
    grid = _in_picture(point, portrait.signals.camera).view(len(portrait), px, px, 2)
    picture = portrait.pictures.permute(0, 3, 1, 2)
    labels = F.interpolate(portrait.labels, size=picture.shape[2:], mode="bilinear")
    shown = torch.cat([2 * picture - 1, labels, torch.ones_like(labels[:, :1])], 1)
    return F.grid_sample(shown, grid, align_corners=False)


@exact
def _in_picture(point: Tensor, camera: Camera) -> Tensor:
    """Project points (P, N, 3) of head space to picture coordinates in [-1, 1]: (P, N, 2)."""
    seen = (point - camera.c2w[:, None, :3, 3]) @ camera.c2w[:, :3, :3]
    pixel = seen @ camera.k.transpose(1, 2)
    return 2 * pixel[..., :2] / pixel[..., 2:].clamp_min(1e-3) / camera.size_px - 1


@exact
def _through(motion: Tensor, point: Tensor) -> Tensor:
    """Apply affine maps (P, 3, 4) to points (P, N, 3)."""
    return point @ motion[:, :, :3].transpose(1, 2) + motion[:, None, :, 3]


@exact
def _inverse(motion: Tensor) -> Tensor:
    """Return the inverse of affine maps (P, 3, 4)."""
    back = torch.linalg.inv(motion[:, :, :3])
    return torch.cat([back, -back @ motion[:, :, 3:]], 2)
