"""S3D-NeRF (Li et al., ECCV 2024): a talking head of an unseen person, from one picture.

    x' = x + D(x, a, F)      position in the picture's face of a point of the row's face
    p  = x' projected by the picture's camera
    density, colour = decoder(planes(p), ...)     planes: encoded from the picture
    output = retouched(marched head, over the picture's shoulders, over the background)

D is conditioned on the driving signals a and on F, the result of cross-attention from slots of the
picture's appearance to a.  All networks learn from pairs of frames of many people; a new face
takes one forward pass of the encoder (`enroll`).

The paper's text leaves sizes and much else open (only its outline is known to us).  Where we
differ, the reason is that a small training set has only a handful of people:
* Pixels are warped, not synthesised: besides features the front plane holds the picture itself,
  and a loss (`own`) limits the field's own colours to mouth and eyes (teeth, lids).
* The depth of the face is the tracked mesh's; only a correction is learned.
* a is the mouth's shape relative to the picture's, and lids, gaze and brows.  The speech encoder is
  supervised on the shape directly: learned from pixels alone, the link from speech to lips is
  lost.  D is supervised at landmarks, whose correspondence is known.
* D acts in regions around mouth and eyes, each in its own unit of length (so that faces are
  alike), and is zero elsewhere; both eyes share one net, mirrored.
* SSIM, gradients and, if installed, LPIPS take the place of the perceptual loss.
* Critic and lip-sync expert have small weights (0.03 and 0.2), and join in the last stages only.
* Hair is marched with the face, since it turns with it.  The final stage warps the full-size
  picture by the marched coordinates and composites it over shoulders that follow `body`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import Avatar, PictureResult, Speaker, averaged
from talkhead_cli.avatars.s3d.face import Face, Layers
from talkhead_cli.avatars.s3d.field import (
    N_COLOURS,
    N_CUES,
    N_EYE_DRIVES,
    N_HIDDEN,
    N_MOUTH_DRIVES,
    OWN,
    SHARE,
    SOURCE,
    Deformation,
    S3DField,
)
from talkhead_cli.avatars.s3d.speaker import MAPS, S3DSpeaker
from talkhead_cli.blocks.appearance import AppearanceEncoder, CrossModal, Slots
from talkhead_cli.blocks.critic import critic_losses
from talkhead_cli.blocks.loss import SOLID, WHOLE, patch_losses, solid_losses
from talkhead_cli.blocks.mlp import Mlp
from talkhead_cli.blocks.mouth import MOUTH, N_CODES, Mouth, principal_shapes, usual_scale
from talkhead_cli.blocks.planes import RowPlanes
from talkhead_cli.blocks.regions import picture_masks, region_masks
from talkhead_cli.blocks.speech import SpeechEncoder
from talkhead_cli.blocks.sync import sync_losses
from talkhead_cli.blocks.upscale import Retoucher
from talkhead_cli.contracts import Portrait, Signals, Size, SpeechShot

DEFORMATIONS = ("none", "naive", "concatenated", "cross-modal")


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
    "small": _Widths((24, 32, 48, 64), 8, 3, (8, 48), 48, 48, 8, 2, 24, 128),
    "full": _Widths((64, 128, 256, 512), 32, 3, (16, 128), 128, 64, 32, 4, 64, 256),
}


class S3D(Avatar):
    """S3D's network, which renders any person from a portrait.  For ablations: `deformation`, from
    DEFORMATIONS (naive: driving signals alone; concatenated: with the mean appearance slot)."""

    composing = frozenset({"retoucher"})
    needs_portrait = True
    expert_losses = frozenset({"sync", "critic"})
    loss_names = (
        SOLID
        | WHOLE
        | expert_losses
        | {"speech", "colour", "lively", "own", "anchor", "deform", "mouth"}
    )
    maps = MAPS
    box = (-1.0, -1.1, -0.75, 1.0, 1.1, 0.45)
    common = ("",)  # the whole state is shared
    mouth_basis: Tensor
    mouth_scale: Tensor
    mouth_rest: Tensor
    mouth_gain: Tensor

    def __init__(self, size: Size, *, n_steps: int, n_features: int, n_people: int = 1) -> None:
        super().__init__()
        widths = SIZES[size]
        self.aabb.copy_(torch.tensor(self.box))
        self.magnification, self.picture_px = widths.magnification, widths.picture_px
        self.n_features = widths.features
        self.deformation = DEFORMATIONS[-1]
        for name, shape in {
            "mouth_basis": (3 * len(MOUTH), N_CODES),
            "mouth_scale": (N_CODES,),
            "mouth_rest": (),
            "mouth_gain": (),
        }.items():
            self.register_buffer(name, torch.zeros(shape))
        self.mouths = [Mouth() for _ in range(n_people)]  # a plain list: not part of the state
        self._gains: list[Tensor] = []
        self.speech = SpeechEncoder.of_windows(n_steps, n_features, N_CODES)
        self.encoder = AppearanceEncoder(8, widths.encoder, widths.channels, widths.n_scales)
        n_slots, n_slot = widths.slots
        self.slots = Slots(self.encoder.n_deep, n_slots, n_slot)
        n_drives = N_MOUTH_DRIVES + 2 * N_EYE_DRIVES
        self.cross = CrossModal(n_drives, n_slots, n_slot, n_slot)
        self.mouth_net = Deformation(widths.deformation, N_MOUTH_DRIVES + n_slot, N_CUES)
        self.eye_net = Deformation(widths.deformation // 2, N_EYE_DRIVES + n_slot, N_CUES)
        n_in = self.encoder.n_out + 6 + 2 + N_HIDDEN + 2 * N_CUES
        # outputs: depth shift, log density factor, share of own colour, own colour, features
        self.decoder = Mlp(n_in, widths.decoder, 2 + 1 + 3 + widths.features, 3, last_scale=0.3)
        n_draft = N_COLOURS + widths.features + 1 + 3 + 4
        self.retoucher = Retoucher(n_draft, widths.retoucher, 4)

    @classmethod
    def build(
        cls, size: Size, *, n_steps: int, n_features: int, px: int, n_people: int = 1
    ) -> Self:
        return cls(size, n_steps=n_steps, n_features=n_features, n_people=n_people)

    # -- measurement -----------------------------------------------------------------------

    @torch.no_grad()
    def survey(self, people: Sequence[Signals]) -> None:
        """Measure mouth basis, scale and median opening at rest; fit the linear speech map to all
        people together."""
        self.mouth_basis.copy_(principal_shapes(people))
        self.mouths = [Mouth().to(s.pose.device) for s in people]
        for mouth, signals in zip(self.mouths, people, strict=True):
            mouth.measure(signals, self.mouth_basis)
        self.mouth_scale.copy_(usual_scale(people, self.mouth_basis))
        nothing = torch.zeros(1, N_CODES).to(self.mouth_basis)
        rests = torch.stack([m.opening(nothing)[0] for m in self.mouths])
        self.mouth_rest.copy_(rests.median())
        self.mouth_gain.fill_(1.0)
        told = [(s, m.speech_target(s)) for m, s in zip(self.mouths, people, strict=True)]
        self.speech.solve(told, at_most=3000)

    @torch.no_grad()
    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Measure the mouth of the one person whom a prior is refined for; all else comes from the
        portrait, and `survey` has measured several people."""
        if len(self.mouths) == 1:
            self.mouths = [Mouth().to(signals.pose.device)]
            self.mouths[0].measure(signals, self.mouth_basis)

    @torch.no_grad()
    def settle(self, kept: Signals) -> None:
        """Set the gain of speech-driven mouths to the median over the people settled so far."""
        mouth = self._mouth(kept)
        mouth.settle(kept, self.speech(kept))
        self._gains.append(mouth.gain.clone())
        self.mouth_gain.copy_(torch.stack(self._gains).median())

    def _mouth(self, signals: Signals) -> Mouth:
        return self.mouths[int(signals.person[0]) if len(self.mouths) > 1 else 0]

    def listen(self, signals: Signals) -> Signals:
        """Return signals with the training person's mouth predicted from speech, all else kept."""
        mouth = self._mouth(signals)
        mouth.gain.copy_(self.mouth_gain)
        marks = signals.landmarks.clone()
        marks[:, MOUTH] = mouth.driven_by_speech(signals, self.speech(signals)).landmarks[:, MOUTH]
        return signals.with_(landmarks=marks)

    # -- enrolment -------------------------------------------------------------------------

    def enroll(self, portrait: Portrait | None) -> Speaker:
        assert portrait is not None, "s3d draws whom it is shown"
        layers = Layers.of(portrait, self.picture_px)
        planes, deep = self.encoder(layers.encoded)
        slots, relief = self.slots(deep), portrait.relief[..., 0]
        faces = []
        for p in range(len(portrait)):
            only = slice(p, p + 1)
            signals = portrait.signals[p]
            mouth = Mouth().to(slots.device)
            mouth.init_from_picture(
                signals.landmarks[0],
                self.mouth_basis,
                self.mouth_scale,
                self.mouth_rest,
                self.mouth_gain,
            )
            faces.append(
                Face(
                    planes=[RowPlanes(level[only]) for level in planes],
                    seen=layers.seen[only],
                    picture=layers.picture[only],
                    shoulders=layers.shoulders[only],
                    signals=signals,
                    slots=slots[p],
                    relief=relief[only, None],
                    mouth=mouth,
                    skin=_mean_colour(layers.seen[p]),
                )
            )
        return S3DSpeaker(self, faces)

    # -- losses ----------------------------------------------------------------------------

    def losses_of(self, rays: str) -> frozenset[str]:
        return super().losses_of(rays) - (frozenset() if rays == "picture" else {"mouth"})

    def losses(self, results: Sequence[SpeechShot | PictureResult]) -> dict[str, Tensor]:
        return averaged(
            self._speech_losses(r) if isinstance(r, SpeechShot) else self._picture_losses(r)
            for r in results
        )

    def _speech_losses(self, shot: SpeechShot) -> dict[str, Tensor]:
        signals = shot.signals
        told = self._mouth(signals).speech_target(signals)
        net_predictions = self.speech.net_predictions(signals)
        return {"speech": F.smooth_l1_loss(net_predictions, told.expand_as(net_predictions))}

    def _picture_losses(self, result: PictureResult) -> dict[str, Tensor]:
        signals, rays, rendered = result.signals, result.rays, result.rendered
        assert isinstance(result.field, S3DField)
        losses = result.field.losses(signals)
        whole = rays.whole
        labels, target, plate = result.truth.labels, result.truth.colour, result.truth.plate
        if whole and self.magnification > 1:
            labels, target, plate = (
                _smaller(x, rays.layout, self.magnification) for x in (labels, target, plate)
            )
        head = labels[:, :3].sum(1, keepdim=True).clamp(0, 1)
        marched = rendered.feature[:, OWN] + rendered.feature[:, SOURCE]
        over = marched + (1 - rendered.opacity) * plate
        at = rays.pixel * (self.magnification if whole else 1)  # masks use full-size pixels
        alive = region_masks(signals, at, rays.row, labels)[:, :2].amax(1)
        error = (over - head * target - (1 - head) * plate).square().mean(1)
        losses |= solid_losses(rendered, head, labels[:, :1]) | {
            "colour": error.mean(),
            "lively": (error * alive).sum() / alive.sum().clamp_min(1),
            "own": ((1 - alive) * rendered.feature[:, SHARE.start]).mean(),
        }
        if whole:
            losses |= self._whole_losses(result)
        return losses

    def _whole_losses(self, result: PictureResult) -> dict[str, Tensor]:
        signals, frame = result.signals, result.frame
        shape = frame.rgb.shape
        truth = result.truth.colour.view(shape)
        labels = result.truth.labels.view(*shape[:3], -1)
        error = F.smooth_l1_loss(frame.rgb, truth, beta=0.1, reduction="none").mean(-1)
        alive = picture_masks(signals, labels)[..., :2].amax(-1)
        return (
            sync_losses(self.loss_networks, frame.rgb, signals)
            | critic_losses(self.loss_networks, frame.rgb, signals.landmarks_2d)
            | {
                "whole": error.mean(),
                "mouth": (error * alive).sum() / alive.sum().clamp_min(1),
                "whole_matte": (frame.alpha - (1 - labels[..., 5:6])).square().mean(),
            }
            | patch_losses(frame.rgb, truth, self.loss_networks, "whole_")
        )

    # -- parts -----------------------------------------------------------------------------

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        return {
            "speech": [self.speech.nets],
            "encoder": [self.encoder],
            "deformation": [self.slots, self.cross, self.mouth_net, self.eye_net],
            "decoder": [self.decoder],
            "retoucher": [self.retoucher],
        }


def _smaller(values: Tensor, layout: tuple[int, int, int] | None, times: int) -> Tensor:
    """Downsample pixels (B H W, C) of finished pictures to those of marched ones of `layout`."""
    assert layout is not None
    b, h, w = layout
    pictures = values.view(b, h * times, w * times, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(pictures, times).permute(0, 2, 3, 1).flatten(0, 2)


def _mean_colour(seen: Tensor) -> Tensor:
    """Return the mean colour (3,) of the face in `Layers.seen` of one picture, (6, s, s)."""
    face = seen[3:4]
    return (seen[:3] * face).sum((1, 2)) / face.sum().clamp_min(1)
