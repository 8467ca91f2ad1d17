"""Base classes of avatars trained on footage: measured face, speech-driven mouth, aimed rays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.avatars.base import Avatar, PictureResult, averaged
from talkhead_cli.blocks.light import Shading
from talkhead_cli.blocks.mouth import (
    MOUTH,
    N_CODES,
    Mouth,
    change_of_shapes,
    principal_shapes,
    usual_scale,
)
from talkhead_cli.blocks.regions import Relief
from talkhead_cli.blocks.remember import remembered
from talkhead_cli.blocks.rigid import (
    PoseCorrection,
    after,
    alignment,
    moved,
    shoulders_in_head,
    undone,
)
from talkhead_cli.blocks.speech import SpeechEncoder
from talkhead_cli.contracts import RayBundle, Signals, SpeechShot

# Noise on the driving signals in training.  Some twenty numbers are enough to identify each of a
# few hundred frames; without noise, networks memorise the frames.
LIP_NOISE, POSE_NOISE = 0.25, 0.1  # in the person's own standard deviations
EYE_NOISE, GAZE_NOISE, BROW_NOISE = 0.05, 0.01, 0.002
N_EYES = 2 * 3 + 2 + 2
LIDS_SHUT, LIDS_OPEN = 0.2, 0.7  # openness of an eye, up to and from which it counts as such


def noisy(x: Tensor, size: float | Tensor) -> Tensor:
    """Return x plus normal noise of standard deviation `size`, which broadcasts."""
    return x + size * torch.randn_like(x)


def disturbed(signals: Signals, noise: float) -> Signals:
    """Return the signals with noise on eyes, gaze and brows, `noise` times the usual."""
    return signals.with_(
        eye=noisy(signals.eye, noise * EYE_NOISE),
        gaze=noisy(signals.gaze, noise * GAZE_NOISE),
        brow=noisy(signals.brow, noise * BROW_NOISE),
    )


def eyes_told(signals: Signals) -> Tensor:
    """Return the eye inputs of networks (T, N_EYES): openness with its sine and cosine, gaze and
    brows, scaled to similar magnitude.

    Brows count as far as eyes are open: in the few frames of a blink they are somewhere by chance,
    and lids of blinks with other brows would not close.
    """
    eye = signals.eye
    awake = ((eye - LIDS_SHUT) / (LIDS_OPEN - LIDS_SHUT)).clamp(0, 1)
    waves = (torch.pi * eye).sin(), (torch.pi * eye).cos()
    return torch.cat([eye, *waves, 4 * signals.gaze, 10 * awake * signals.brow], 1)


def view(signals: Signals) -> Tensor:
    """Return the direction (T, 3) from each row's camera to the head, in head space."""
    return -F.normalize(signals.camera.c2w[:, :3, 3], dim=1)


class Person(nn.Module):
    """Measurements of one person.

    mouth, including the mean pose, in which head and shoulders are canonical ·
    body_mean, body_scale (4,) of `Signals.body` · views (2, 3) least and largest `view`, infinite
    where they were not measured · relief of the face
    """

    body_mean: Tensor
    body_scale: Tensor
    views: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mouth, self.relief = Mouth(), Relief()
        for name in ("body_mean", "body_scale"):
            self.register_buffer(name, torch.zeros(4))
        self.register_buffer("views", torch.tensor([[-torch.inf] * 3, [torch.inf] * 3]))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state.setdefault(f"{prefix}views", self.views)  # runs of before it was measured have none
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def measure(
        self, signals: Signals, basis: Tensor, scale: Tensor, mesh: Tensor, aabb: Tensor
    ) -> None:
        self.mouth.measure(signals, basis, scale)
        self.body_mean.copy_(signals.body.mean(0))
        self.body_scale.copy_(signals.body.std(0).clamp_min(1e-2))
        self.relief.measure(mesh, aabb)

    def to_known_view(self, signals: Signals) -> Tensor | None:
        """Return what to add to each row's ray directions (T, 3) for colours that depend on them:
        zero, but for views beyond those of training, whose colours are of the nearest known view.
        What networks make of directions never seen is pale or flushed skin.  None if all are zero
        and that can be told without a host sync.
        """
        seen = view(signals)
        away = seen.clamp(self.views[0], self.views[1]) - seen
        return None if away.device.type == "cpu" and not away.any() else away

    def stance(self, signals: Signals) -> Tensor:
        """Return the standardised pose of head and shoulders (T, 10)."""
        body = (signals.body - self.body_mean) / self.body_scale
        return torch.cat([self.mouth.pose(signals), body], 1)

    def driven_by_speech(self, signals: Signals, said: Tensor) -> Signals:
        """Return the signals with landmarks from the speech encoder's predictions (T, K)."""
        return self.mouth.driven_by_speech(signals, said)


class PersonalAvatar(Avatar):
    """Speech predicts the mouth, supervised on tracked mouths; rendering is left to the method.

    The speech networks are common to all people, and so are the shapes whose coordinates they
    predict: mouth_basis (87, K), mouth_scale (K,).  With `own_shapes`, the avatar of one person
    replaces them by that person's; not so if the networks that render the mouth are common too.
    `aim` corrects rays before they are marched: tracking errors are mostly systematic, and a
    linear map of pose and expression removes most of them, also in poses not seen in training.
    """

    common: tuple[str, ...] = ("speech.nets.", "speech.linear.", "mouth_basis")
    own_shapes = True
    mouth_basis: Tensor
    mouth_scale: Tensor

    def __init__(self, people: Sequence[Person], speech: SpeechEncoder) -> None:
        super().__init__()
        self.people = nn.ModuleList(people)
        self.register_buffer("mouth_basis", torch.zeros(3 * len(MOUTH), N_CODES))
        self.register_buffer("mouth_scale", torch.zeros(N_CODES))
        self.speech = speech
        self.pose_correction = PoseCorrection(6 + 2 + 2 + 2)

    def person(self, signals: Signals) -> Person:
        """Return the person of these rows; all rows of a shot belong to one person."""
        index = int(signals.person[0]) if len(self.people) > 1 else 0
        found = self.people[index]
        assert isinstance(found, Person)
        return found

    # -- measurement -----------------------------------------------------------------------

    @torch.no_grad()
    def survey(self, people: Sequence[Signals]) -> None:
        """Measure the mouth basis and scale; for several people also fit the linear speech map."""
        self.mouth_basis.copy_(principal_shapes(people))
        self.mouth_scale.copy_(usual_scale(people, self.mouth_basis))
        if len(people) > 1:
            mouths = [Mouth().to(signals.pose.device) for signals in people]
            for mouth, signals in zip(mouths, people, strict=True):
                mouth.measure(signals, self.mouth_basis)
            self.speech.solve(
                [(s, m.speech_target(s)) for s, m in zip(people, mouths, strict=True)]
            )

    @torch.no_grad()
    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Measure mouth, pose statistics and relief; with a single person, also fit the linear
        speech map, to the residual of a prior's encoder if there is one."""
        self.aabb.copy_(aabb)
        alone = len(self.people) == 1
        known = self.mouth_basis.clone()
        if alone and (self.own_shapes or not known.any()):
            # A prior's speech encoder predicts shapes fitted to many people; this person's own
            # shapes reproduce the mouth better.
            self.survey([signals])
            if known.any():
                self.speech.change_basis(change_of_shapes(signals, known, self.mouth_basis))
        person = self.person(signals)
        person.measure(signals, self.mouth_basis, self.mouth_scale, mesh, aabb)
        if alone:
            if known.any():
                self.speech.freeze_as_prior()
            self.speech.solve([(signals, person.mouth.speech_target(signals))])

    @torch.no_grad()
    def see(self, signals: Signals) -> None:
        views = view(signals)
        self.person(signals).views.copy_(torch.stack([views.amin(0), views.amax(0)]))

    # -- speech ----------------------------------------------------------------------------

    @torch.no_grad()
    def settle(self, kept: Signals) -> None:
        self.person(kept).mouth.settle(kept, self.speech(kept))

    def listen(self, signals: Signals) -> Signals:
        """Return the signals with landmarks predicted from speech and pose, the rest neutral."""
        return self.person(signals).driven_by_speech(signals, self.speech(signals))

    def at_rest(self, signals: Signals) -> Signals:
        return self.person(signals).mouth.at_rest(signals)

    @property
    def neutral(self) -> Tensor:
        person = self.people[0]
        assert isinstance(person, Person)
        return person.mouth.neutral

    def speech_losses(self, shot: SpeechShot) -> dict[str, Tensor]:
        """Return the smooth L1 error of the predicted against the tracked mouth."""
        signals = shot.signals
        told = self.person(signals).mouth.speech_target(signals)
        net_predictions = self.speech.net_predictions(signals)
        return {"speech": F.smooth_l1_loss(net_predictions, told.expand_as(net_predictions))}

    def picture_losses(self, result: PictureResult) -> dict[str, Tensor]:
        """Return the method's losses on marched rays."""
        raise NotImplementedError

    def losses(self, results: Sequence[SpeechShot | PictureResult]) -> dict[str, Tensor]:
        return averaged(
            self.speech_losses(r) if isinstance(r, SpeechShot) else self.picture_losses(r)
            for r in results
        )

    # -- pose ------------------------------------------------------------------------------

    def aim(self, signals: Signals, rays: RayBundle) -> RayBundle:
        """Return rays corrected for the tracker's systematic pose errors."""
        motion = self.correction(signals)
        turn = F.pad(motion[:, :, :3], (0, 1))
        # near and far stay: the motion is small compared with the box's margin around the head
        return replace(
            rays,
            origins=moved(rays.origins, motion, rays.row),
            directions=moved(rays.directions, turn, rays.row),
        )

    def correction(self, signals: Signals) -> Tensor:
        """Return the correction of each row's head pose, (T, 3, 4)."""
        face = [4 * (signals.eye - 1), 4 * signals.gaze, 10 * signals.brow]
        pose = self.person(signals).mouth.pose(signals)
        return self.pose_correction(torch.cat([pose, *face], 1))

    def shoulders(self, signals: Signals) -> Tensor:
        """Return rigid motions (T, 3, 4) of head space that take points on the shoulders from
        each row to the rest pose.

        Shoulders are tracked in the picture, independently of the head-pose correction, which is
        therefore undone first.
        """
        rest = self.person(signals).mouth.pose_mean
        carried = shoulders_in_head(signals.pose, signals.body, rest)
        return after(carried, undone(self.correction(signals)))

    # -- parts -----------------------------------------------------------------------------

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        """Return speech and pose; methods add their own parts to these."""
        return {"speech": [self.speech.nets], "pose": [self.pose_correction]}


class SharedAvatar(PersonalAvatar):
    """A `PersonalAvatar` whose rendering networks people share too.  They see points in the space
    of a shared face, one affine map per person from the landmarks at rest (`alignment`).

    face (68, 3) the shared landmarks at rest · frame (6,) the box by which networks normalise
    points: a prior's if there is one, else `aabb`
    """

    common = (*PersonalAvatar.common, "face", "frame", "pose_correction.", "shading.")
    face: Tensor
    frame: Tensor

    def __init__(self, people: Sequence[Person], speech: SpeechEncoder) -> None:
        super().__init__(people, speech)
        self.register_buffer("face", torch.zeros(68, 3))
        self.register_buffer("frame", torch.zeros(6))
        self.shading = Shading()

    @torch.no_grad()
    def survey(self, people: Sequence[Signals]) -> None:
        super().survey(people)
        if not self.face.any():
            self.face.copy_(torch.stack([s.landmarks.mean(0) for s in people]).mean(0))

    @torch.no_grad()
    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        super().calibrate(signals, mesh, aabb)
        if not self.frame.any():
            self.frame.copy_(aabb)

    def shared(self, person: Person) -> Tensor:
        """Return the affine map (1, 3, 4) from the person's head space to the shared face's."""
        neutral, face = person.mouth.neutral, self.face
        return remembered(person, "alignment", [neutral, face], lambda: alignment(neutral, face))

    @property
    def reach(self) -> Tensor:
        """Half-size (3,) of the box that planes cover, centred on the origin of head space."""
        return torch.maximum(-self.frame[:3], self.frame[3:]) * 1.1
