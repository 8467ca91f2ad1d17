"""LokiTalk (Li et al., arXiv 2411.19525): region-specific deformation fields.

Two cascaded fields warp every observed point into one canonical volume that holds head
and torso: the face field is driven by lips and eyes, the torso field by the pose.

    a, e, p          lip, eye and pose codes of the row
    A_k(x)           attention of region k (lips, eyes, torso), composited as channels
    dx_face(x)       = min(A_lips + A_eyes, 1) F_face(PE(x), A_lips M_a(a), A_eyes M_e(e))
    dx_torso(x')     = A_torso ((T x' - x') + F_torso(PE(x'), M_p(p))),  x' = x + dx_face
    density, colour  of the canonical volume at x' + dx_torso

Knowledge transfer between people is in transfer.py.  Where the paper does not say, or we differ on
purpose:
* T is the measured rigid motion of the shoulders relative to the head.  In head space a turning
  head swings the whole body; the network only has to learn the residual.
* Rays are corrected first (`aim`): tracking errors are mostly systematic, and a linear map of
  pose and expression removes most of them, also in poses not seen in training.
* Lips are driven by the mouth's shape in head space, on which the speech encoder is supervised
  directly (`listen`); learned from pixels alone, the link from speech to lips is lost.  The part
  of the shape that correlates with head pose is predicted from the pose.
* The gated codes also enter the density net, and through it colour: a closed lid or an open mouth
  shows surfaces that no displacement of a canonical volume can reveal.
* Networks see points in the space of a shared face (`alignment`, one affine map from landmarks at
  rest); mouth codes use the shapes and scale that people share.  For one person without a prior
  all of these are the person's own.
* The target of attention to the torso is zero outside the torso.
* Light is fixed in the room while the head turns (`Shading`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import PictureResult, Speaker, distance, shaped
from talkhead_cli.avatars.lokitalk.field import LokiField
from talkhead_cli.avatars.lokitalk.transfer import Transfer, in_plane_layout, pose_inputs
from talkhead_cli.avatars.personal import (
    LIP_NOISE,
    N_EYES,
    POSE_NOISE,
    Person,
    SharedAvatar,
    disturbed,
    eyes_told,
    noisy,
)
from talkhead_cli.blocks.loss import PATCH, SOLID, patch_losses, solid_losses
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.mouth import MAX_POSE, N_CODES
from talkhead_cli.blocks.planes import TriPlanes
from talkhead_cli.blocks.regions import region_masks
from talkhead_cli.blocks.speech import SpeechEncoder
from talkhead_cli.blocks.variant import variant
from talkhead_cli.contracts import CHIN, Frame, Portrait, RayBundle, Rendered, Signals, Size

# Channels of the field: colour, then auxiliary maps composited with detached weights.
COLOUR, ATTENTION, SHIFTS = slice(0, 3), slice(3, 6), slice(6, 8)
MAX_LIPS = 4.0  # standard deviations at which lip codes are clamped
N_CODE, N_GATE = 16, 12


@dataclass(frozen=True)
class _Widths:
    planes: tuple[int, ...]
    plane_channels: int
    trunk: int
    head: int
    octaves: int
    encoder: tuple[int, ...]


SIZES = {
    "tiny": _Widths((20, 48, 96, 192), 4, 32, 48, 4, (16, 24, 32, 48)),
    "small": _Widths((24, 64, 160, 320), 4, 32, 48, 5, (16, 24, 32, 48)),
    "full": _Widths((32, 64, 128, 256, 512), 4, 64, 64, 6, (32, 64, 128, 128, 128)),
}


class LokiTalk(SharedAvatar):
    """LokiTalk's avatar; for several people, it also has the ID-encoder (`transfer`)."""

    common = (
        *SharedAvatar.common, "mouth_scale", "lip_code.", "eye_code.", "pose_code.", "attention.",
        "face_field.", "torso_field.", "to_", "gate.", "volume.", "density_net.", "colour_net.",
        "transfer.",
    )  # fmt: skip
    loss_names = SOLID | PATCH | {"speech", "colour", "attention", "still", "relief", "rough"}
    own_shapes = False  # the common networks that render mouths use the shared shapes
    has_kernel = True
    transfer: Transfer | None
    maps: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {
            "attention": ("lips attend", "eyes attend", "torso attends"),
            "shift": ("face moves, face heights", "torso moves, face heights"),
        }
    )

    def __init__(self, size: Size, *, n_steps: int, n_features: int, n_people: int = 1) -> None:
        super().__init__(
            [Person() for _ in range(n_people)],
            SpeechEncoder.of_windows(n_steps, n_features, N_CODES),
        )
        widths = self.widths = SIZES[size]
        self.octaves = widths.octaves
        n_position = 3 * (1 + 2 * widths.octaves)
        self.lip_code = Mlp(N_CODES, 32, N_CODE)
        self.eye_code = Mlp(N_EYES, 32, N_CODE)
        self.pose_code = Mlp(6 + 4, 32, N_CODE)
        self.attention = Mlp(n_position, 32, 3, last_scale=0.1)
        self.face_field = Mlp(n_position, widths.trunk, 3, 3, last_scale=0.01)
        self.torso_field = Mlp(n_position, widths.trunk, 3, 3, last_scale=0.01)
        self.volume = TriPlanes(widths.planes, widths.plane_channels)
        self.density_net = Mlp(self.volume.n_out, widths.head, 1 + 16, 2)
        self.colour_net = Mlp(16 + 3, 32, 3, 2)
        # Each code has its own map into the first layer of the net it drives; those of the density
        # net pass a bottleneck, so that the face is not rendered from its expression alone.
        n_face, n_density = n_position + 2 * N_CODE, self.volume.n_out + N_GATE
        self.to_face = _two(N_CODE, widths.trunk, of=n_face)
        self.to_gate = _two(N_CODE, N_GATE, of=2 * N_CODE)
        self.gate = _block(N_GATE, widths.head, of=n_density)
        self.to_torso = _block(N_CODE, widths.trunk, of=n_position + N_CODE)
        self.transfer = self._encoder() if n_people > 1 else None

    @classmethod
    def build(
        cls, size: Size, *, n_steps: int, n_features: int, px: int, n_people: int = 1
    ) -> Self:
        return cls(size, n_steps=n_steps, n_features=n_features, n_people=n_people)

    # -- identity ----------------------------------------------------------------------------

    @property
    def takes_portrait(self) -> bool:
        return self.transfer is not None

    def enroll(self, portrait: Portrait | None) -> Speaker:
        if self.transfer is None or portrait is None:
            return super().enroll(portrait)
        return variant(self, self._own(portrait))

    @torch.no_grad()
    def meet(self, portrait: Portrait) -> None:
        if self.transfer is not None:
            for name, change in self._own(portrait).items():
                self.get_parameter(name).add_(change)
            self.transfer = None

    def take_common(self, tensors: Mapping[str, Tensor]) -> None:
        if self.transfer is None:
            self.transfer = self._encoder().to(self.aabb.device)
        super().take_common(tensors)

    def _encoder(self) -> Transfer:
        shapes = {name: p.shape for name, p in self.named_parameters()}
        return Transfer(shapes, self.volume, self.widths.encoder)

    def _own(self, portrait: Portrait) -> dict[str, Tensor]:
        """Return the person-specific changes of parameters, predicted from pictures."""
        assert self.transfer is not None
        signals = portrait.signals
        person = self.person(signals)
        seen = in_plane_layout(
            portrait,
            px=self.transfer.px,
            reach=self.reach,
            shared=self.shared(person),
            aimed=self.correction(signals),
            shoulders=self.shoulders(signals),
            chin=float(person.mouth.neutral[CHIN, 1]),
        )
        return self.transfer(seen, pose_inputs(signals))

    # -- rendering ---------------------------------------------------------------------------

    def condition(self, signals: Signals) -> LokiField:
        person = self.person(signals)
        shoulders = self.shoulders(signals)
        pose, lips = person.stance(signals), person.mouth.code(signals)
        relative_extent = person.mouth.relative_extent
        if self.training:
            signals = disturbed(signals, self.noise)
            pose = noisy(pose, self.noise * POSE_NOISE)
            lips = noisy(lips, self.noise * LIP_NOISE * relative_extent)
        far = MAX_LIPS * relative_extent.clamp_min(1)
        codes = (
            self.lip_code(lips.clamp(-far, far)),
            self.eye_code(eyes_told(signals)),
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
            look=None if self.training else person.to_known_view(signals),
        )

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        rgb = rendered.feature[:, COLOUR] + (1 - rendered.opacity) * plate
        parts = {
            "attention": shaped(rendered.feature[:, ATTENTION], rays),
            "shift": shaped(rendered.feature[:, SHIFTS], rays),
        }
        return Frame(
            shaped(rgb, rays), shaped(rendered.opacity, rays), distance(rendered, rays), parts
        )

    # -- losses ------------------------------------------------------------------------------

    def picture_losses(self, result: PictureResult) -> dict[str, Tensor]:
        signals, rays, truth = result.signals, result.rays, result.truth
        rendered = result.rendered
        assert isinstance(result.field, LokiField)
        rgb = result.frame.rgb.reshape(-1, 3)
        person = 1 - truth.labels[:, 5:6]
        masks = region_masks(signals, rays.pixel, rays.row, truth.labels)
        attention = rendered.feature[:, ATTENTION]
        solid = rendered.opacity.detach()
        moved = rendered.feature[:, SHIFTS]
        # where each field may move points: the face field at lips and eyes, the other at the torso
        regions = torch.stack([masks[:, :2].amax(1), masks[:, 2]], 1)
        losses = solid_losses(rendered, person, truth.labels[:, :1]) | {
            "colour": F.mse_loss(rgb, truth.colour),
            # two-sided: a one-sided loss would let attention vanish inside the soft masks
            "attention": ((attention - masks * solid) * solid).abs().mean(),
            "still": (moved * (1 - regions)).mean(),
            "relief": self.person(signals).relief.loss(rendered, rays, person[:, 0]),
            "rough": result.field.avatar.volume.roughness(),  # the person's, `enroll` may change it
        }
        if rays.layout is not None:
            losses |= patch_losses(
                result.frame.rgb, truth.colour.view(*rays.layout, 3), self.loss_networks
            )
        return losses

    # -- parts ---------------------------------------------------------------------------------

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        return {
            **super().modules_of_parts(),
            "volume": [self.volume],
            "deform": [
                self.face_field,
                self.torso_field,
                self.attention,
                self.lip_code,
                self.eye_code,
                self.pose_code,
                self.to_face,
                self.to_torso,
            ],
            "static": [self.density_net, self.colour_net, self.to_gate, self.gate, self.shading],
            **({} if self.transfer is None else {"transfer": [self.transfer]}),
        }


def _block(n_in: int, n_out: int, *, of: int) -> nn.Linear:
    """A linear map initialised like `n_in` input columns of a layer that has `of` inputs."""
    block = nn.Linear(n_in, n_out, bias=False)
    block.weight.data.mul_((n_in / of) ** 0.5)
    return block


def _two(n_in: int, n_out: int, *, of: int) -> nn.ModuleList:
    """Return one map for the lips, one for the eyes."""
    return nn.ModuleList(_block(n_in, n_out, of=of) for _ in range(2))


def _mapped(maps: nn.ModuleList, codes: tuple[Tensor, Tensor]) -> Tensor:
    """Map codes (T, N_CODE) of lips and eyes, each by its own map -> (2 T, n_out), interleaved."""
    return torch.stack([m(c) for m, c in zip(maps, codes, strict=True)], 1).flatten(0, 1)
