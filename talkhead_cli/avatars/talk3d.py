"""Talk3D (Ko et al., arXiv 2403.20153): a personal tri-plane of the head, edited by speech.

    P          identity planes of one person
    t          five tokens of the row: speech, eyes, null (learned), head rotation, place
    P' = P + U(P, t)        U: an attention U-Net over planes (of side `edited`), initially zero
    density, features       a small decoder of P' at x
    picture = Up(marched features); marching is at a quarter of the side in the full avatar

Before training, every picture is therefore exactly that of the still identity.

There are three sources of P:
* EG3D's generator, as in the paper; its weights are restricted, and the user's to bring
  (`load_generator`).
* Free fitting to the person's footage, as a pyramid of planes (coarse levels extrapolate to
  unseen areas), regularised by the tracked mesh's depth, mirror symmetry and smoothness.
* A generator of our own, pretrained on the still heads of many people, one latent each.
In either generator a new person is found as in VIVE3D (Fruehstueck et al. 2023), which the paper
uses: optimise the latent (inversion), then the generator's weights too (tuning).  The pyramid,
zero until then, learns the residual; `finish` reduces a person to planes.  In all cases the still
head is fitted first and keeps learning beside U.

Where we differ on purpose:
* Pictures are stable crops around the head, and rays are in head space: the camera plays the role
  of the paper's face-aligned crop, and nothing has to be pasted back.
* Shoulders do not follow the head: their measured rigid motion is undone below the chin before
  planes are read.  In place of the landmark token, which carries the paper's crop, the place
  token holds the translation of the head and the motion of the shoulders.
* The speech token encodes the mouth's shape, on which the speech encoder is supervised directly;
  learned from pixels alone, the link from speech to lips is lost.
* U learns from random pixels by their colour; perceptual losses and a weight on the mouth come
  with the upscaler, which is our own.  There is no identity loss; `sync` is available, but no
  shipped stage weighs it.
* Rays take a few samples where the grid has seen surfaces, not 48 and 48 more.
* Angles are not frequency-encoded as in the paper: encoded, they would identify each of a few
  hundred frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.avatars.base import PictureResult, distance, shaped
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
from talkhead_cli.blocks.eg3d import (
    KINDS,
    N_STYLES,
    EG3DDecoder,
    EG3DGenerator,
    EG3DPlacing,
    Kind,
    checked,
)
from talkhead_cli.blocks.eg3d import N_STYLE as N_EG3D_STYLE
from talkhead_cli.blocks.loss import PATCH, SOLID, WHOLE, patch_losses, solid_losses
from talkhead_cli.blocks.mlp import Mlp, density_of
from talkhead_cli.blocks.mouth import MAX_POSE, N_CODES
from talkhead_cli.blocks.plane_generator import Latents, PlaneGenerator
from talkhead_cli.blocks.plane_unet import PlaneUNet
from talkhead_cli.blocks.planes import PlanePyramid, RowPlanes, asymmetry, roughness, warped
from talkhead_cli.blocks.regions import picture_masks
from talkhead_cli.blocks.rigid import below_chin, moved
from talkhead_cli.blocks.speech import SpeechEncoder
from talkhead_cli.blocks.sync import sync_losses
from talkhead_cli.blocks.upscale import Upscaler
from talkhead_cli.contracts import CHIN, Frame, RayBundle, Rendered, Signals, Size

TOKEN_WIDTH = 64
TOKENS = ("speech", "eyes", "nothing", "rotation", "place")


@dataclass(frozen=True)
class _Widths:
    planes: tuple[int, ...]  # sides of the pyramid
    channels: int
    edited: int  # side of the planes that the U-Net edits
    unet: tuple[int, ...]
    generator: tuple[int, ...]
    decoder: int
    features: int  # marched channels, including colour
    magnification: int
    upscaler: int


SIZES = {
    "tiny": _Widths((16, 32, 64, 128), 16, 64, (16, 32, 48), (64, 64, 48, 32, 24), 48, 12, 1, 24),
    "small": _Widths(
        (16, 32, 64, 128, 256), 16, 64, (16, 32, 48), (64, 64, 48, 32, 24, 16), 48, 12, 2, 24
    ),
    "full": _Widths(
        (16, 32, 64, 128, 256), 32, 256, (64, 128, 256), (256, 256, 256, 128, 96, 64), 64, 32, 4, 64
    ),
}


class Talk3D(SharedAvatar):
    """Talk3D's avatar; for several people, or started from a prior or EG3D, it also has the
    `generator` of planes and the people's `latents`.

    For ablations: `unheard`, names of TOKENS set to zero · `still`, render the identity alone.
    """

    common = (*SharedAvatar.common, "generator.", "decoder.", "upscaler.")
    expert_losses = frozenset({"sync"})
    loss_names = (
        SOLID
        | PATCH
        | WHOLE
        | expert_losses
        | {"speech", "colour", "relief", "rough", "symmetry", "latent", "raw", "mouth"}
    )
    composing = frozenset({"upscaler"})
    generators = frozenset(KINDS)
    generator_parts = ("generator", "decoder")
    generator: PlaneGenerator | EG3DGenerator | None
    latents: Latents | None
    placing: EG3DPlacing | None

    def __init__(
        self,
        size: Size,
        *,
        n_steps: int,
        n_features: int,
        n_people: int = 1,
        split: bool = True,
        borrowed: Kind | None = None,
    ) -> None:
        """borrowed: kind of the published generator whose decoder is used."""
        super().__init__(
            [Person() for _ in range(n_people)],
            SpeechEncoder.of_windows(n_steps, n_features, N_CODES),
        )
        widths = self.widths = SIZES[size]
        self.magnification = widths.magnification
        self.n_features, self.edited = widths.features, widths.edited
        self.still, self.unheard = False, frozenset[str]()
        self.planes = PlanePyramid(widths.planes, widths.channels)
        self.borrowed = borrowed
        self.decoder: nn.Module = (
            EG3DDecoder()
            if borrowed
            else Mlp(widths.channels, widths.decoder, 1 + widths.features, 3)
        )
        self.tokens = nn.ModuleDict(
            {
                "speech": Mlp(N_CODES, TOKEN_WIDTH, TOKEN_WIDTH),
                "eyes": Mlp(N_EYES, TOKEN_WIDTH, TOKEN_WIDTH),
                "rotation": Mlp(3, TOKEN_WIDTH, TOKEN_WIDTH),
                "place": Mlp(3 + 4, TOKEN_WIDTH, TOKEN_WIDTH),
            }
        )
        self.nothing = nn.Parameter(torch.randn(TOKEN_WIDTH))
        self.editor = PlaneUNet(
            widths.channels, widths.edited, widths.unet, len(TOKENS), TOKEN_WIDTH, split=split
        )
        self.upscaler = Upscaler(widths.features + 1, widths.upscaler, widths.magnification)
        self.generator, self.latents, self.placing = None, None, None
        if n_people > 1:
            self._be_generated(n_people)

    @classmethod
    def build(
        cls,
        size: Size,
        *,
        n_steps: int,
        n_features: int,
        px: int,
        n_people: int = 1,
        borrowed: Kind | None = None,
    ) -> Self:
        return cls(
            size, n_steps=n_steps, n_features=n_features, n_people=n_people, borrowed=borrowed
        )

    # -- identity --------------------------------------------------------------------------

    @torch.no_grad()
    def _be_generated(self, n_people: int) -> None:
        """Add a plane generator and its latents; zero the pyramid, which learns the residual."""
        widths = self.widths
        made = PlaneGenerator(widths.channels, widths.planes[-1], widths.generator)
        self.generator = made.to(self.aabb.device)
        self.latents = Latents(n_people).to(self.aabb.device)
        for level in self.planes.levels:
            level.zero_()

    @torch.no_grad()
    def load_generator(self, tensors: Mapping[str, Tensor]) -> None:
        """Load EG3D's generator and decoder, tensors named as in its file; ValueError names what
        does not fit."""
        assert self.borrowed is not None and isinstance(self.decoder, EG3DDecoder)
        known, where = checked(tensors), self.aabb.device
        self.generator = EG3DGenerator()
        self.generator.take(known)
        self.generator.to(where)
        self.decoder.take(known)
        self.latents = Latents(1, (N_STYLES, N_EG3D_STYLE)).to(where)
        self.placing = EG3DPlacing(self.borrowed).to(where)
        for level in self.planes.levels:
            level.zero_()

    def take_common(self, tensors: Mapping[str, Tensor]) -> None:
        if self.generator is None:
            self._be_generated(1)
        super().take_common(tensors)

    def finish(self) -> None:
        """Add the generated planes to the pyramid's finest level and drop the generator."""
        if (drawn := self._drawn(0)) is not None:
            with torch.no_grad():
                self.planes.levels[-1].add_(drawn)
        self.generator, self.latents, self.placing = None, None, None

    def _drawn(self, index: int) -> Tensor | None:
        """Return the generator's planes of a person, (3, C, S, S); None without a generator."""
        if self.generator is None:
            return None
        assert self.latents is not None
        planes: Tensor
        if self.placing is None:
            planes = self.generator(self.latents(index))
        else:
            planes = self.placing(self.generator(self.latents(index)[0]), self.reach)
        return planes

    # -- rendering -------------------------------------------------------------------------

    def condition(self, signals: Signals) -> Talk3DField:
        person = self.person(signals)
        stance = person.stance(signals)
        identity, change = self.planes(), None
        drawn = self._drawn(int(signals.person[0]) if len(self.people) > 1 else 0)
        if drawn is not None:
            identity = identity + drawn
        if not (self.still or self.editor.is_silent):
            seen = F.avg_pool2d(identity, identity.shape[-1] // self.edited)
            change = self.editor(seen, self._tokens(signals, stance))
        return Talk3DField(
            self,
            identity=identity,
            drawn=drawn,
            change=change,
            shared=self.shared(person),
            shoulders=self.shoulders(signals),
            light=self.shading(stance[:, :6]),
            chin=person.mouth.neutral[CHIN, 1],
        )

    def _tokens(self, signals: Signals, stance: Tensor) -> Tensor:
        """Return the tokens (T, 5, TOKEN_WIDTH) of each row."""
        lips = self.person(signals).mouth.code(signals)
        if self.training:
            stance = noisy(stance, self.noise * POSE_NOISE)
            lips = noisy(lips, self.noise * LIP_NOISE)
            signals = disturbed(signals, self.noise)
        stance = stance.clamp(-MAX_POSE, MAX_POSE)
        heard = {
            "speech": lips.clamp(-4, 4),
            "eyes": eyes_told(signals),
            "rotation": stance[:, :3],
            "place": stance[:, 3:],
        }
        said = {name: self.tokens[name](value) for name, value in heard.items()}
        said["nothing"] = self.nothing.expand(len(signals), -1)
        return torch.stack([said[name] * (name not in self.unheard) for name in TOKENS], 1)

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        marched = torch.cat([rendered.feature, rendered.opacity], 1)
        depth = distance(rendered, rays)
        if not rays.whole:
            rgb = marched[:, :3] + (1 - rendered.opacity) * plate
            return Frame(shaped(rgb, rays), shaped(rendered.opacity, rays), depth, {})
        raw = shaped(marched.float(), rays).permute(0, 3, 1, 2)
        whole = self.upscaler(raw).permute(0, 2, 3, 1)
        alpha = whole[..., 3:]
        rgb = whole[..., :3] + (1 - alpha) * plate.view(*alpha.shape[:3], 3)
        depth = depth.repeat_interleave(self.magnification, 1)
        depth = depth.repeat_interleave(self.magnification, 2)
        parts = {"raw": raw.permute(0, 2, 3, 1)}
        return Frame(rgb, alpha.clamp(0, 1), depth, parts)

    # -- losses ----------------------------------------------------------------------------

    def losses_of(self, rays: str) -> frozenset[str]:
        finished = WHOLE | self.expert_losses | {"raw", "mouth"}
        found = super().losses_of(rays)
        return found & finished if rays == "picture" else found - finished

    def picture_losses(self, result: PictureResult) -> dict[str, Tensor]:
        rays, truth, rendered = result.rays, result.truth, result.rendered
        if rays.whole:
            return self._whole_losses(result)
        rgb, person = result.frame.rgb, 1 - truth.labels[:, 5:6]
        losses = solid_losses(rendered, person, truth.labels[:, :1]) | {
            "colour": F.mse_loss(rgb.reshape(-1, 3), truth.colour),
            "relief": self.person(result.signals).relief.loss(rendered, rays, person[:, 0]),
            "rough": self.planes.roughness(),
            "symmetry": self.planes.asymmetry(),
        }
        assert isinstance(result.field, Talk3DField)
        if (drawn := result.field.drawn) is not None and self.latents is not None:
            losses["rough"] = losses["rough"] + roughness(drawn)
            losses["symmetry"] = losses["symmetry"] + asymmetry(drawn)
            losses["latent"] = self.latents.styles.square().mean()
        if rays.layout is not None:
            losses |= patch_losses(rgb, truth.colour.view(*rays.layout, 3), self.loss_networks)
        return losses

    def _whole_losses(self, result: PictureResult) -> dict[str, Tensor]:
        """Return losses on finished pictures and on the smaller marched ones."""
        frame = result.frame
        shape = frame.rgb.shape
        truth, plate = result.truth.colour.view(shape), result.truth.plate.view(shape)
        labels = result.truth.labels.view(*shape[:3], -1)
        raw = frame.parts["raw"]
        small, behind = (_smaller(x, self.magnification) for x in (truth, plate))
        lips = picture_masks(result.signals, labels)[..., 0]
        error = F.smooth_l1_loss(frame.rgb, truth, beta=0.1, reduction="none").mean(-1)
        return (
            {
                "raw": F.mse_loss(raw[..., :3] + (1 - raw[..., -1:]) * behind, small),
                "whole": error.mean(),
                "mouth": (error * lips).sum() / lips.sum().clamp_min(1),
                "whole_matte": (frame.alpha - (1 - labels[..., 5:6])).square().mean(),
            }
            | patch_losses(frame.rgb, truth, self.loss_networks, "whole_")
            | sync_losses(self.loss_networks, frame.rgb, result.signals)
        )

    # -- parts -----------------------------------------------------------------------------

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        return {
            **super().modules_of_parts(),
            "planes": [self.planes],
            "decoder": [self.decoder, self.shading],
            "editor": [self.editor, self.tokens],
            "upscaler": [self.upscaler],
            **({} if self.generator is None else {"generator": [self.generator]}),
            **({} if self.latents is None else {"latents": self._finds()}),
        }

    def _finds(self) -> list[nn.Module]:
        """Return the modules that inversion optimises: latents and, with EG3D, placing."""
        return [module for module in (self.latents, self.placing) if module is not None]

    def part(self, name: str) -> list[nn.Parameter]:
        return super().part(name) + ([self.nothing] if name == "editor" else [])


class Talk3DField:
    """Talk3D's field for the planes of T rows.

    identity (3, C, S, S) · drawn: the generator's part of it · change (T, 3, C, s, s) added per
    row, or None; it may be coarser, since sampling is linear · shared (1, 3, 4) from head space to
    the shared face's space, in which planes are laid out · shoulders (T, 3, 4) from the row to the
    rest pose · light (T, 3, 4) affine in position, added to the head's colour logits · chin () its
    height at rest
    """

    n_detached = 0

    def __init__(
        self,
        avatar: Talk3D,
        *,
        identity: Tensor,
        drawn: Tensor | None,
        change: Tensor | None,
        shared: Tensor,
        shoulders: Tensor,
        light: Tensor,
        chin: Tensor,
    ) -> None:
        self.avatar, self.aabb, self.n_rows = avatar, avatar.aabb, len(shoulders)
        self.channels, self.drawn = avatar.n_features, drawn
        self._identity = RowPlanes(identity[None])
        self._change = None if change is None else RowPlanes(change)
        self._shoulders, self._light, self._chin = shoulders, light, chin
        self._shared, self._reach = shared, avatar.reach

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        return self._decoded(x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        density, features, torso = self._decoded(x, row)
        logits = features[:, :3] + (1 - torso) * moved(x, self._light, row)
        return density, torch.cat([logits.sigmoid(), features[:, 3:]], 1)

    def _decoded(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 3), row (N,) -> density (N,), features (N, F), shoulder weight (N, 1)."""
        torso = below_chin(x[:, 1:2], self._chin)
        x = x + torso * (moved(x, self._shoulders, row) - x)
        at = warped(moved(x, self._shared, row), self._reach)
        read = self._identity(at, row)
        if self._change is not None:
            read = read + self._change(at, row)
        decoded = self.avatar.decoder(read)
        density = density_of(decoded[:, 0])
        return density, decoded[:, 1:], torso


def _smaller(pictures: Tensor, times: int) -> Tensor:
    """Downsample pictures (B, H, W, C) by averaging squares of side `times`."""
    return F.avg_pool2d(pictures.permute(0, 3, 1, 2), times).permute(0, 2, 3, 1)
