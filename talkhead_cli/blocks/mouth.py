"""A mouth as a small code: what landmarks say of it, and what is left for speech to say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from talkhead_cli.blocks.precision import exact
from talkhead_cli.blocks.speech import ridge_map
from talkhead_cli.contracts import Signals

JAW, LIPS = slice(4, 13), slice(48, 68)  # of the 68
MOUTH = torch.cat([torch.arange(68)[JAW], torch.arange(68)[LIPS]])
INNER_LIPS = [62, 66]  # middle of the upper and of the lower one
N_CODES = 8
SPREAD = 0.9  # share of the true spread of the opening that heard mouths are given
GAINS = (1.0, 2.0)
LEAN_RIDGE = 1.0  # per row: half of what a pose seems to say of a mouth holds elsewhere
MAX_POSE = 2.5  # standard deviations; further out, codes are held where training ended


def principal_shapes(people: Sequence[Signals]) -> Tensor:
    """The directions (87, K) in which mouths of `people` move most, each person by its own scale.

    Some mouths move more than others; each counts the same.
    """
    moves = []
    for signals in people:
        shape = signals.landmarks[:, MOUTH]
        move = (shape - shape.mean(0)).flatten(1)
        moves.append(move / move.square().mean().sqrt().clamp_min(1e-6) / len(move) ** 0.5)
    _, _, basis = torch.linalg.svd(torch.cat(moves).double(), full_matrices=False)
    return basis[:N_CODES].T.to(people[0].landmarks)


def usual_scale(people: Sequence[Signals], basis: Tensor) -> Tensor:
    """How far mouths of people go in each shape (K,): the median."""
    return torch.stack([_scale(signals, basis) for signals in people]).median(0).values


def _scale(signals: Signals, basis: Tensor) -> Tensor:
    """How far one person's mouth goes in each shape (K,), face heights."""
    move = (signals.landmarks - signals.landmarks.mean(0))[:, MOUTH].flatten(1)
    return (move @ basis).std(0).clamp_min(1e-4)


def change_of_shapes(signals: Signals, old: Tensor, new: Tensor) -> Tensor:
    """(K, K) that takes what is said of a person in `old` shapes (87, K) to the same in `new`."""
    shape = signals.landmarks[:, MOUTH]
    move = (shape - shape.mean(0)).flatten(1)
    size_old, size_new = (size(move @ basis) for basis in (old, new))
    return size_old * (old.T @ new) / size_new


def size(coordinates: Tensor) -> Tensor:
    """How much a mouth moves: RMS () of its coordinates (T, K) in some shapes."""
    return coordinates.square().mean().sqrt().clamp_min(1e-6)


class Mouth(nn.Module):
    """One person's mouth; all of it is measured, nothing is learnt.

    neutral (68, 3) mean landmarks · basis (87, K), scale (K,) shapes of mouth and jaw, and what
    counts as far in each · extent () how far this mouth goes, face heights · gain () that the
    opening is widened by where speech says it · lean (6, K) what the pose alone says of the code ·
    pose_mean, pose_scale (6,) of the head

    A mouth is a code, coordinate by coordinate in units of `scale`, for the field; for speech it is
    coordinates in units of the mouth's whole extent, so that an error counts by what it moves, and
    shy mouths say what others do.
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
            "neutral": (68, 3), "basis": (3 * len(MOUTH), N_CODES), "scale": (N_CODES,),
            "extent": (), "gain": (), "lean": (6, N_CODES), "pose_mean": (6,), "pose_scale": (6,),
        }.items():  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))

    @torch.no_grad()
    def measure(self, signals: Signals, basis: Tensor, scale: Tensor | None = None) -> None:
        """Neutral face, extent and lean of the person's rows, in the shapes of `basis`; the scale
        as well, unless it is given as people's."""
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
    def presume(
        self, seen: Tensor, basis: Tensor, scale: Tensor, rest: Tensor, gain: Tensor
    ) -> None:
        """A mouth of which one picture shows the landmarks `seen` (68, 3).

        scale (K,), rest () the opening on average, gain (): as people have them.  Whether the
        mouth stands open in the picture can be seen, and is undone by the least change of its
        code; whether it smiles, or is of that shape, cannot.
        """
        self.basis.copy_(basis)
        self.scale.copy_(scale)
        self.extent.copy_(size(scale))
        self.gain.copy_(gain)
        self.pose_scale.fill_(1.0)
        self.neutral.copy_(seen)
        nothing = torch.zeros(1, N_CODES).to(seen)
        slope = self.slope(nothing)
        code = slope * (rest - self.opening(nothing)) / slope.square().sum().clamp_min(1e-9)
        self.neutral.copy_(self.landmarks(code[None])[0])

    @torch.no_grad()
    def settle(self, kept: Signals, said: Tensor) -> None:
        """Set the gain of heard mouths, on rows that the encoder was not trained on.

        said (T, K): what it says of them.  A regression says the mean of what may be meant,
        which mumbles: it is widened until the mouth opens by SPREAD of its true spread.
        """
        true, heard = (  # shut is shut: what is heard below it is not seen
            self.opening(self.coded(s)).clamp_min(0).std() for s in (self.to_say(kept), said)
        )
        self.gain.copy_((SPREAD * true / heard.clamp_min(1e-6)).clamp(*GAINS))

    def code(self, signals: Signals) -> Tensor:
        """Mouth code (T, K) of the landmarks, in units of the scale."""
        away = signals.landmarks - self.neutral
        jaw, lips = away[:, JAW], away[:, LIPS]  # slices: a GPU would wait for a list of numbers
        mouth = torch.cat([jaw, lips], 1).flatten(1)
        return mouth @ self.basis / self.scale

    def leant(self, signals: Signals) -> Tensor:
        """What the pose says of the mouth code (T, K).

        Part of what the tracked mouth does goes with the head: jaws hang when heads tilt, and
        meshes bend when heads turn.  Speech cannot know, and a field that learnt mouths with it
        misses it when driven by speech.
        """
        return self.pose(signals).clamp(-MAX_POSE, MAX_POSE) @ self.lean

    def to_say(self, signals: Signals) -> Tensor:
        """What is left for speech to say of the mouth (T, K), in units of the mouth's size."""
        return (self.code(signals) - self.leant(signals)) * self._share

    def coded(self, said: Tensor) -> Tensor:
        """The code (T, K) of what was said."""
        return said / self._share

    def widened(self, code: Tensor) -> Tensor:
        """The code (T, K) with the opening, and what goes with it, `gain` times as far.

        Codes in a mouth's own shapes are uncorrelated, each of deviation 1, and nearly so in
        people's: what lies across the slope of the opening goes its own way, and stays as said.
        """
        slope = self.slope(code)
        along = slope / slope.square().sum().clamp_min(1e-9)
        return code + (self.gain - 1) * (code @ slope)[:, None] * along

    def slope(self, like: Tensor) -> Tensor:
        """How much each code (K,) opens the mouth, face heights."""
        return self.opening(torch.eye(N_CODES).to(like)) - self.opening(torch.zeros_like(like[:1]))

    @property
    def _share(self) -> Tensor:
        """What counts as far in each shape (K,), in units of the mouth's extent."""
        return self.scale / self.extent

    @property
    def vigour(self) -> Tensor:
        """How far this mouth goes, in what counts as far: 1 where the scale is its own."""
        return self.extent / size(self.scale)

    def pose(self, signals: Signals) -> Tensor:
        """Standardised pose of the head (T, 6)."""
        return (signals.pose - self.pose_mean) / self.pose_scale

    def opening(self, code: Tensor) -> Tensor:
        """How far (T,) the lower lip's inner edge is below the upper one's, face heights.

        Only along the face: one lip stands before the other, and that is no opening.
        """
        upper, lower = self.landmarks(code)[:, INNER_LIPS, 1].unbind(1)
        return lower - upper

    @exact
    def landmarks(self, code: Tensor) -> Tensor:
        """Landmarks (T, 68, 3) of standardised mouth codes (T, K) on the neutral face."""
        landmarks = self.neutral.expand(len(code), -1, -1).clone()
        landmarks[:, MOUTH] += ((code * self.scale) @ self.basis.T).view(len(code), -1, 3)
        return landmarks

    def heard(self, signals: Signals, said: Tensor) -> Signals:
        """The signals with the mouth that was said (T, K); the rest of the face is neutral."""
        code = self.widened(self.coded(said)) + self.leant(signals)
        return signals.with_(landmarks=self.landmarks(code))
