"""landmark: speech to landmarks, landmarks to pictures (GtsTalkNeRF, CVM 11(4), 2025).

Stage one predicts landmarks from speech (`listen`), a track that users can edit.
Stage two renders the head of any such track:

    code(x)   Gaussian relative position code of x among the row's 68 landmarks
    u         = tanh(A(planes(x), code(x), gaze)), two ambient coordinates (HyperNeRF's slices)
    density, colour  of (planes(x), ambient planes(u)): points are not displaced; each row's head
              is a slice of a higher-dimensional volume
Stage three adds neck and shoulders around the rendered head by a Style-U-Net, conditioned on the
pose of head and shoulders.

Where the paper's release does not say, or we differ on purpose:
* Audio affects the picture through landmarks only.  The release also feeds the field an audio
  vector, with which an edited track would not determine the picture.
* The upper face moves: lids and brows follow eye openness and brow height by a linear map fitted
  to the person's own frames.  Gaze, which no landmark shows, is an input beside the code.
* z is taken along the camera's own axis, in units of the Gaussians' initial size: in the release's
  units its sines and cosines hardly differ from z and 1.
* Tri-planes take the place of hash grids, and there are no codes of single frames.  Colours are
  compared by squared error; the Style-U-Net works at the picture's own resolution.
* Speech comes from the home's backend, by default an embedding without formants.  Eyes and lips
  are refined in stages after the others, not in steps between them, and without a weight on
  shut eyes.
* A loss penalises ambient coordinates away from mouth and eyes.
* The torso network is trained on training frames only, outputs alpha, and warps a learned canvas
  with the shoulders.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.avatars.base import PictureResult, distance, shaped
from talkhead_cli.avatars.personal import (
    BROW_NOISE,
    EYE_NOISE,
    GAZE_NOISE,
    LIP_NOISE,
    POSE_NOISE,
    Person,
    PersonalAvatar,
    noisy,
)
from talkhead_cli.blocks.gaussians import GaussianCode
from talkhead_cli.blocks.light import LOOK_SCALE, Shading, looking
from talkhead_cli.blocks.loss import PATCH, SOLID, WHOLE, patch_losses, solid_losses
from talkhead_cli.blocks.mlp import Mlp, density_of
from talkhead_cli.blocks.mouth import MAX_POSE, MOUTH, N_CODES
from talkhead_cli.blocks.planes import Planes2d, TriPlanes, warped
from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.regions import region_masks
from talkhead_cli.blocks.rigid import moved, shoulders_in_picture
from talkhead_cli.blocks.speech import SpeechEncoder, ridge_map
from talkhead_cli.blocks.style_unet import StyleUNet
from talkhead_cli.contracts import (
    N_LANDMARKS,
    Frame,
    MisuseError,
    RayBundle,
    Rendered,
    Signals,
    Size,
)

UPPER = torch.tensor([i for i in range(N_LANDMARKS) if i not in MOUTH.tolist()])
UPPER_RIDGE = 0.01  # ridge strength per row
COLOUR, AMBIENT = slice(0, 3), slice(3, 4)


@dataclass(frozen=True)
class _Widths:
    planes: tuple[int, ...]
    plane_channels: int
    ambient: tuple[int, ...]
    ambient_channels: int
    head: int
    torso: tuple[int, ...]


SIZES = {
    "tiny": _Widths((16, 32, 64, 128, 256), 4, (16, 32, 64), 4, 48, (24, 32, 48)),
    "small": _Widths((16, 32, 64, 128, 320), 4, (16, 32, 64), 4, 48, (16, 24, 32, 48)),
    "full": _Widths((16, 32, 64, 128, 256), 8, (16, 32, 64, 128, 256), 8, 64, (64, 128, 256, 256)),
}


class Face(Person):
    """A `Person` with the linear map upper (4, 117), rest (117,) from eyes and brows to UPPER."""

    upper: Tensor
    rest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("upper", torch.zeros(4, 3 * len(UPPER)))
        self.register_buffer("rest", torch.zeros(3 * len(UPPER)))

    @torch.no_grad()
    def measure(
        self, signals: Signals, basis: Tensor, scale: Tensor, mesh: Tensor, aabb: Tensor
    ) -> None:
        super().measure(signals, basis, scale, mesh, aabb)
        marks = signals.landmarks[:, UPPER].flatten(1)
        upper, rest = ridge_map(self.raised(signals), marks, UPPER_RIDGE * len(signals))
        self.upper.copy_(upper)
        self.rest.copy_(rest)

    @staticmethod
    def raised(signals: Signals) -> Tensor:
        """Return the inputs of the map to upper landmarks, (T, 4)."""
        return torch.cat([signals.eye, 10 * signals.brow], 1)

    def driven_by_speech(self, signals: Signals, said: Tensor) -> Signals:
        signals = super().driven_by_speech(signals, said)
        marks = signals.landmarks.clone()
        marks[:, UPPER] = (self.raised(signals) @ self.upper + self.rest).unflatten(1, (-1, 3))
        return signals.with_(landmarks=marks)

    @exact
    def noise(self, like: Tensor) -> Tensor:
        """Return small random displacements, of the shape of `like` (n, 68, 3), along the person's
        own modes of mouth, lids and brows."""
        code = LIP_NOISE * torch.randn(len(like), N_CODES, device=like.device)
        marks = self.mouth.landmarks(code) - self.mouth.neutral
        raised = torch.randn(len(like), 4, device=like.device)
        raised *= raised.new_tensor([EYE_NOISE, EYE_NOISE, 10 * BROW_NOISE, 10 * BROW_NOISE])
        marks[:, UPPER] = (raised @ self.upper).unflatten(1, (-1, 3))
        return marks


class Landmark(PersonalAvatar):
    """The avatar of the landmark method."""

    own = (".styles",)
    composing = frozenset({"torso"})
    loss_names = SOLID | PATCH | WHOLE | {"speech", "colour", "relief", "rough", "still"}
    lids_in_landmarks = True
    maps = MappingProxyType({"ambient": ("ambient coordinates",)})

    def __init__(
        self, size: Size, *, n_steps: int, n_features: int, px: int, n_people: int = 1
    ) -> None:
        super().__init__(
            [Face() for _ in range(n_people)],
            SpeechEncoder.of_sequences(n_steps, n_features, N_CODES, n_people=n_people),
        )
        widths = SIZES[size]
        if px % (coarsest := 2 ** len(widths.torso)):
            raise MisuseError(
                f"data.size_px must be a multiple of {coarsest} for preset landmark, not {px}"
            )
        self.past = self.speech.past
        self.shading = Shading()
        self.volume = TriPlanes(widths.planes, widths.plane_channels)
        self.ambient = Planes2d(widths.ambient, widths.ambient_channels)
        self.code = self.coding()
        self.ambient_net = Mlp(self.volume.n_out + 2, widths.head, 2, 3, last_scale=0.1)
        self.to_ambient = nn.Linear(self.code.n_out, widths.head, bias=False)
        self.density_net = Mlp(self.volume.n_out + self.ambient.n_out, widths.head, 1 + 16, 2)
        self.colour_net = Mlp(16 + 3, 32, 3, 2)
        self.torso = StyleUNet(widths.torso, 10, px=px)

    def coding(self) -> GaussianCode:
        """Return the position code of points relative to the landmarks."""
        return GaussianCode(N_LANDMARKS)

    # -- rendering -------------------------------------------------------------------------

    def condition(self, signals: Signals) -> LandmarkField:
        person = self.person(signals)
        assert isinstance(person, Face)
        pose, gaze, marks = person.mouth.pose(signals), signals.gaze, signals.landmarks
        if self.training:
            gaze = noisy(gaze, self.noise * GAZE_NOISE)
            marks = marks + self.noise * person.noise(marks)
        return LandmarkField(
            self,
            tables=self.code.tables(marks, signals.camera.c2w[:, :3, 2]),
            gaze=4 * gaze,
            light=self.shading(pose),
            look=None if self.training else person.to_known_view(signals),
        )

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        """Composite the head over the plate; with whole pictures, add neck and shoulders."""
        head = torch.cat([rendered.feature[:, COLOUR], rendered.opacity], 1)
        over = head[:, :3] + (1 - head[:, 3:]) * plate
        parts = {
            "head": shaped(over, rays),
            "head_alpha": shaped(head[:, 3:], rays),
            "ambient": shaped(rendered.feature[:, AMBIENT], rays),
        }
        depth = distance(rendered, rays)
        if not rays.whole:
            return Frame(parts["head"], parts["head_alpha"], depth, parts)
        whole = self._whole(shaped(head, rays), signals)
        alpha = whole[..., 3:]
        rgb = whole[..., :3] + (1 - alpha) * shaped(plate, rays)
        return Frame(rgb, alpha.clamp(0, 1), depth, parts)

    def _whole(self, head: Tensor, signals: Signals) -> Tensor:
        """Premultiplied pictures of the head (B, H, W, 4) -> of the whole person."""
        person = self.person(signals)
        stance = person.stance(signals)
        if self.training:
            stance = noisy(stance, self.noise * POSE_NOISE)
        stance = stance.clamp(-MAX_POSE, MAX_POSE)
        carry = shoulders_in_picture(signals.body, signals.camera, person.mouth.pose_mean)
        whole: Tensor = self.torso(head.permute(0, 3, 1, 2).float(), stance, carry)
        return whole.permute(0, 2, 3, 1)

    # -- losses ----------------------------------------------------------------------------

    def losses_of(self, rays: str) -> frozenset[str]:
        return super().losses_of(rays) - (PATCH if rays == "picture" else frozenset())

    def picture_losses(self, result: PictureResult) -> dict[str, Tensor]:
        signals, rays, truth = result.signals, result.rays, result.truth
        rendered, frame = result.rendered, result.frame
        head = truth.labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
        over = frame.parts["head"]
        target = head * truth.colour + (1 - head) * truth.plate
        alive = region_masks(signals, rays.pixel, rays.row, truth.labels)[:, :2].amax(
            1, keepdim=True
        )
        losses = solid_losses(rendered, head, truth.labels[:, :1]) | {
            "colour": F.mse_loss(over.reshape(-1, 3), target),
            "relief": self.person(signals).relief.loss(rendered, rays, head[:, 0]),
            "rough": self.volume.roughness() + self.ambient.roughness(),
            "still": (rendered.feature[:, AMBIENT] * (1 - alive)).mean(),
        }
        if rays.layout is not None and frame.rgb is over:
            losses |= patch_losses(over, target.view(*rays.layout, 3), self.loss_networks)
        if frame.rgb is not over:  # whole pictures: the torso network ran
            picture = truth.colour.view(*frame.rgb.shape)
            person = 1 - truth.labels[:, 5:6].view(*frame.alpha.shape)
            losses |= patch_losses(frame.rgb, picture, self.loss_networks, "whole_")
            losses["whole"] = F.smooth_l1_loss(frame.rgb, picture, beta=0.1)
            losses["whole_matte"] = (frame.alpha - person).square().mean()
        return losses

    # -- parts -----------------------------------------------------------------------------

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        return {
            **super().modules_of_parts(),
            "volume": [self.volume, self.ambient],
            "coding": [self.code],
            "static": [
                self.to_ambient,
                self.ambient_net,
                self.density_net,
                self.colour_net,
                self.shading,
            ],
            "torso": [self.torso],
        }


class LandmarkField:
    """The field of the head for T rows of landmarks."""

    channels = 4
    n_detached = 1

    def __init__(
        self, avatar: Landmark, *, tables: Tensor, gaze: Tensor, light: Tensor, look: Tensor | None
    ) -> None:
        self.avatar, self.aabb, self.n_rows = avatar, avatar.aabb, len(gaze)
        self._tables, self._gaze, self._light, self._look = tables, gaze, light, look
        low, high = avatar.aabb[:3], avatar.aabb[3:]
        self._reach = torch.maximum(-low, high) * 1.1

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        return self._slice(x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        density, hidden, ambient = self._slice(x, row)
        d = looking(d, row, self._look)
        logits = self.avatar.colour_net(torch.cat([hidden, LOOK_SCALE * d], 1))
        colour = (logits + moved(x, self._light, row)).sigmoid()
        return density, torch.cat([colour, ambient.float().abs().sum(1, keepdim=True)], 1)

    def _slice(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), hidden (N, 16), ambient coordinates (N, 2)."""
        avatar = self.avatar
        features = avatar.volume(warped(x, self._reach))
        # Codes have their own map into the first layer, since most points are near no landmark.
        code, near = avatar.code(x, self._tables, row)
        gaze = self._gaze.index_select(0, row)
        told = avatar.to_ambient(code)
        ambient = avatar.ambient_net(torch.cat([features, gaze], 1), told=(told, near))
        ambient = ambient.float().tanh()  # coordinates need float32
        hidden = avatar.density_net(torch.cat([features, avatar.ambient(ambient)], 1))
        density = density_of(hidden[:, 0])
        return density, hidden[:, 1:], ambient
