"""The mouth as a PCA code of its landmarks, and the part of it that speech has to predict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.speech import ridge_map
from talkhead_cli.contracts import LIPS, LOWER_LIP, N_LANDMARKS, UPPER_LIP, Signals

LOWER_JAW = slice(4, 13)
MOUTH = torch.cat([torch.arange(N_LANDMARKS)[LOWER_JAW], torch.arange(N_LANDMARKS)[LIPS]])
INNER_LIPS = [UPPER_LIP, LOWER_LIP]
N_CODES = 8
SPREAD = 0.9  # target std of the predicted mouth opening, as a share of the tracked one
GAINS = (1.0, 2.0)
LEAN_RIDGE = 1.0  # per row: halves the fitted slopes, since only half of the effect generalises
# Opening of closed lips, face heights: in 17 of 20 clips, a twentieth of the frames is at -0.007 to
# 0.007 or below.
SHUT = 0.004
MAX_REST = 2.0  # by how many of its standard deviations a mouth at rest may differ from the mean
MAX_POSE = 2.5  # standard deviations; poses are clamped here, the edge of the training data


def principal_shapes(people: Sequence[Signals]) -> Tensor:
    """Return the principal components (87, K) of the mouth landmarks of `people`.

    Every person's motion is normalised first, so that all people have the same weight.  An SVD
    leaves signs open: here the largest entry of each component is positive.
    """
    moves = []
    for signals in people:
        shape = signals.landmarks[:, MOUTH]
        move = (shape - shape.mean(0)).flatten(1)
        moves.append(move / move.square().mean().sqrt().clamp_min(1e-6) / len(move) ** 0.5)
    _, _, basis = torch.linalg.svd(torch.cat(moves).double(), full_matrices=False)
    shapes = basis[:N_CODES]
    largest = shapes.gather(1, shapes.abs().argmax(1, keepdim=True))
    return (shapes * largest.sign()).T.to(people[0].landmarks)


def usual_scale(people: Sequence[Signals], basis: Tensor) -> Tensor:
    """Return the median over people of the std along each shape (K,)."""
    return torch.stack([_scale(signals, basis) for signals in people]).median(0).values


def _scale(signals: Signals, basis: Tensor) -> Tensor:
    """Return the std of one person's mouth along each shape (K,), face heights."""
    move = (signals.landmarks - signals.landmarks.mean(0))[:, MOUTH].flatten(1)
    return (move @ basis).std(0).clamp_min(1e-4)


def change_of_shapes(signals: Signals, old: Tensor, new: Tensor) -> Tensor:
    """Return the map (K, K) from a person's speech coordinates in `old` shapes (87, K) to `new`."""
    shape = signals.landmarks[:, MOUTH]
    move = (shape - shape.mean(0)).flatten(1)
    size_old, size_new = (size(move @ basis) for basis in (old, new))
    return size_old * (old.T @ new) / size_new


def size(coordinates: Tensor) -> Tensor:
    """Return the RMS () of a mouth's coordinates (T, K) in some shapes."""
    return coordinates.square().mean().sqrt().clamp_min(1e-6)


class Mouth(nn.Module):
    """Mouth model of one person; all buffers are measured, none is learned.

    neutral (68, 3) mean landmarks · basis (87, K) shapes of mouth and jaw · scale (K,) unit of the
    code along each · extent () RMS motion of this mouth, face heights · gain () factor by which the
    opening predicted from speech is widened · lean (6, K) linear map from pose to code ·
    pose_mean, pose_scale (6,) of the head

    The field takes the code, each coordinate in units of `scale`.  The speech encoder predicts
    coordinates in units of `extent`, so that the loss weighs errors by the motion they cause and
    mouths that move little have targets as large as others.
    """

    neutral: Tensor
    basis: Tensor
    scale: Tensor
    extent: Tensor
    gain: Tensor
    lean: Tensor
    pose_mean: Tensor
    pose_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "neutral": (68, 3),
            "basis": (3 * len(MOUTH), N_CODES),
            "scale": (N_CODES,),
            "extent": (),
            "gain": (),
            "lean": (6, N_CODES),
            "pose_mean": (6,),
            "pose_scale": (6,),
        }.items():
            self.register_buffer(name, torch.zeros(shape))

    @torch.no_grad()
    def measure(self, signals: Signals, basis: Tensor, scale: Tensor | None = None) -> None:
        """Set neutral face, extent, pose statistics and lean from the person's rows, and the scale
        unless one shared by all people is given; gain becomes 1."""
        self.basis.copy_(basis)
        self.neutral.copy_(signals.landmarks.mean(0))
        own = _scale(signals, self.basis)
        self.scale.copy_(own if scale is None else scale)
        self.extent.copy_(size(own))
        self.gain.fill_(1.0)
        self.pose_mean.copy_(signals.pose.mean(0))
        self.pose_scale.copy_(signals.pose.std(0).clamp_min(1e-2))
        lean, _ = ridge_map(self.pose(signals), self.code(signals), LEAN_RIDGE * len(signals))
        self.lean.copy_(lean)

    @torch.no_grad()
    def init_from_picture(
        self, seen: Tensor, basis: Tensor, scale: Tensor, rest: Tensor, gain: Tensor
    ) -> None:
        """Initialise from the landmarks `seen` (68, 3) of one picture.

        scale (K,), rest () mean opening, gain (): those of the training people.  The neutral face
        is `seen` with its opening set to `rest` by the smallest change of the code.  A smile stays
        in: one picture cannot tell it from the shape of the mouth.
        """
        self.basis.copy_(basis)
        self.scale.copy_(scale)
        self.extent.copy_(size(scale))
        self.gain.copy_(gain)
        self.pose_scale.fill_(1.0)
        self.neutral.copy_(seen)
        self.neutral.copy_(self.landmarks(self._opened(rest))[0])

    @torch.no_grad()
    def settle(self, kept: Signals, said: Tensor) -> None:
        """Set the gain, from rows that the speech encoder's networks were not trained on (its
        linear map has seen them, which makes the gain a little too small).

        said (T, K): its predictions for them.  Regression predicts means, mouths open too little;
        the gain, within GAINS, brings the std of the opening to SPREAD times the tracked one.  A
        single row has none: the gain stays.
        """
        if len(kept) < 2:
            return
        true, heard = (  # a negative opening looks like a closed mouth
            self.opening(self.from_speech_units(s)).clamp_min(0).std()
            for s in (self.speech_target(kept), said)
        )
        self.gain.copy_((SPREAD * true / heard.clamp_min(1e-6)).clamp(*GAINS))

    def code(self, signals: Signals) -> Tensor:
        """Return the mouth code (T, K) of the landmarks, in units of `scale`."""
        away = signals.landmarks - self.neutral
        # slices: an index list would cost a host sync
        jaw, lips = away[:, LOWER_JAW], away[:, LIPS]
        mouth = torch.cat([jaw, lips], 1).flatten(1)
        return mouth @ self.basis / self.scale

    def pose_part(self, signals: Signals) -> Tensor:
        """Return the part of the mouth code (T, K) that is predicted from head pose.

        Tracked mouths correlate with head pose: jaws hang when heads tilt, and tracked meshes bend
        when heads turn.  Speech cannot predict this, but a field trained on tracked mouths expects
        it, so it is added back when driven by speech.
        """
        return self.pose(signals).clamp(-MAX_POSE, MAX_POSE) @ self.lean

    def speech_target(self, signals: Signals) -> Tensor:
        """Return the speech encoder's targets (T, K): code minus `pose_part`, in units of
        `extent`."""
        return (self.code(signals) - self.pose_part(signals)) * self._share

    def from_speech_units(self, said: Tensor) -> Tensor:
        """Convert predictions of the speech encoder (T, K) to units of the code."""
        return said / self._share

    def with_gain(self, code: Tensor) -> Tensor:
        """Return the code (T, K) with its component along the opening scaled by `gain`.

        The code's coordinates have std 1 and are uncorrelated in a mouth's own shapes, nearly so
        in shared ones: what is orthogonal to the opening is independent of it and is kept.
        """
        slope = self.slope(code)
        along = slope / slope.square().sum().clamp_min(1e-9)
        return code + (self.gain - 1) * (code @ slope)[:, None] * along

    def slope(self, like: Tensor) -> Tensor:
        """Return how far a unit of each code coordinate opens the mouth (K,), face heights."""
        return self.opening(torch.eye(N_CODES).to(like)) - self.opening(torch.zeros_like(like[:1]))

    def _opened(self, by: Tensor | float) -> Tensor:
        """Return the code (1, K) of the mouth nearest to the mean one that is open `by` that."""
        nothing = torch.zeros(1, N_CODES).to(self.neutral)
        slope = self.slope(nothing)
        code = slope * (by - self.opening(nothing)) / slope.square().sum().clamp_min(1e-9)
        return code[None]

    @property
    def _share(self) -> Tensor:
        """`scale` (K,) in units of `extent`."""
        return self.scale / self.extent

    @property
    def relative_extent(self) -> Tensor:
        """`extent` over the RMS of `scale`: 1 if the scale is this person's own."""
        return self.extent / size(self.scale)

    def pose(self, signals: Signals) -> Tensor:
        """Return the standardised pose of the head (T, 6)."""
        return (signals.pose - self.pose_mean) / self.pose_scale

    def opening(self, code: Tensor) -> Tensor:
        """Return how far (T,) the lower lip's inner edge is below the upper one's, face heights.

        Vertical distance only: an offset in depth between the lips is not an opening.
        """
        upper, lower = self.landmarks(code)[:, INNER_LIPS, 1].unbind(1)
        return lower - upper

    @exact
    def landmarks(self, code: Tensor) -> Tensor:
        """Return the neutral face's landmarks (T, 68, 3) with mouths of the codes (T, K)."""
        landmarks = self.neutral.expand(len(code), -1, -1).clone()
        landmarks[:, MOUTH] += ((code * self.scale) @ self.basis.T).view(len(code), -1, 3)
        return landmarks

    def driven_by_speech(self, signals: Signals, said: Tensor) -> Signals:
        """Return the signals with landmarks of the predictions (T, K) on the neutral face."""
        code = self.with_gain(self.from_speech_units(said)) + self.pose_part(signals)
        return signals.with_(landmarks=self.landmarks(code))

    def at_rest(self, signals: Signals) -> Signals:
        """Return the signals with the mouth of somebody who does not speak; the rest is kept."""
        code = self._opened(SHUT)
        most = MAX_REST * self.relative_extent
        code = code * (most / code.norm().clamp_min(1e-6)).clamp(max=1)
        marks = signals.landmarks.clone()
        marks[:, MOUTH] = self.landmarks(code + self.pose_part(signals))[:, MOUTH]
        return signals.with_(landmarks=marks)
