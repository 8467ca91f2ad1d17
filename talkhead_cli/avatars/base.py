"""What every method is: signals in, a field out; marched channels in, a picture out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.contracts import Field, Frame, Portrait, RayBundle, Rendered, Shot, Signals


@dataclass(frozen=True)
class StepResult:
    """What one shot of a training step came to; the rays' part is None for speech-only stages."""

    shot: Shot
    field: Field | None = None
    rendered: Rendered | None = None
    frame: Frame | None = None


class Speaker(Protocol):
    """Somebody who can be drawn: the calls that jobs make once they know whom."""

    aabb: Tensor
    past: int
    magnification: int
    maps: Mapping[str, tuple[str, ...]]
    has_kernel: bool

    @property
    def neutral(self) -> Tensor | None: ...
    def listen(self, signals: Signals) -> Signals: ...
    def aim(self, signals: Signals, rays: RayBundle) -> RayBundle: ...
    def condition(self, signals: Signals) -> Field: ...
    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame: ...


class Avatar(nn.Module):
    """Base of the methods. An avatar knows neither how it is marched, nor saved, nor filmed.

    `aabb` (6,) is the box of head space that holds the person.  In training, methods put noise
    on the driving signals; `noise` is the stage's share of it.  `common` names what people share
    and a prior consists of, by the beginnings of its names in the state.
    `weighs` names all losses that it may have, and of these the ones that it `heeds` are the word
    of an expert, who may be missing.
    `judges` are frozen networks that a job hands in for their word in the losses; a list, so
    that they are neither trained nor saved with the avatar.
    One that `needs_portrait` learns to draw people whom it never met (`enroll`), within `box`.
    One that `begins_with` published generators is built for one of them and is given it (`borrow`).
    `past` is how many rows before a row `listen` has to be given for it to hear the row as in
    the whole speech.  Whole pictures are marched `magnification` times smaller than they come out
    of `compose`.  `maps` are parts of a frame that are worth a look: the names of their channels,
    none of them negative.  One that `has_kernel` answers by one where no gradients are wanted
    (its field `skips`), and nothing it does with rays and signals waits for a CUDA device.
    """

    aabb: Tensor
    past = 0
    magnification = 1
    maps: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    common: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    noise = 1.0
    weighs: frozenset[str] = frozenset()
    heeds: frozenset[str] = frozenset()
    begins_with: frozenset[str] = frozenset()
    needs_portrait = False
    has_kernel = False
    box: tuple[float, ...] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.judges: list[nn.Module] = []
        self.register_buffer("aabb", torch.tensor([-1.0, -1, -1, 1, 1, 1]))

    @classmethod
    def build(
        cls, size: Literal["tiny", "full"], *, n_steps: int, n_features: int, px: int,
        n_people: int = 1,
    ) -> Self:  # fmt: skip
        """A fresh avatar of one size for speech windows (n_steps, n_features), pictures of px; by
        default the class is made with just these words."""
        return cls(  # type: ignore[call-arg]  # which this base is not
            size, n_steps=n_steps, n_features=n_features, px=px, n_people=n_people
        )

    def common_state(self) -> dict[str, Tensor]:
        """What people share: the tensors that a prior consists of."""
        return {
            k: v for k, v in self.state_dict().items()
            if k.startswith(self.common) and not k.endswith(self.own)
        }  # fmt: skip

    def common_parts(self) -> list[str]:
        """The parts that learn any of it."""
        names = self.common_state()
        shared = {id(p) for n, p in self.named_parameters() if n in names}
        return [name for name in self.parts() if any(id(p) in shared for p in self.part(name))]

    @torch.no_grad()
    def take_common(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin from a prior, strictly; ValueError names what does not fit."""
        own = self.common_state()
        for name in own.keys() | tensors.keys():
            have, want = (t.shape if t is not None else None
                          for t in (tensors.get(name), own.get(name)))  # fmt: skip
            if have != want:
                raise ValueError(f"{name} is {have and tuple(have)}, not {want and tuple(want)}")
            own[name].copy_(tensors[name])

    def borrow(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin with the published generator that it was built for; ValueError names what does not
        fit."""
        raise NotImplementedError

    def survey(self, people: Sequence[Signals]) -> None:
        """Read what is common to `people` and measured, before any of them is calibrated."""

    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Read what is measured rather than learnt off one person's training rows.

        mesh (n, 3) the rigid face in head space · aabb (6,) the box that holds the person
        """
        raise NotImplementedError

    def enroll(self, portrait: Portrait | None) -> Speaker:
        """The avatar as the person of the pictures, in one forward pass through which gradients
        go; who learnt one person's footage is that person already."""
        assert portrait is None
        return self

    def meet(self, portrait: Portrait) -> None:
        """Begin, from a prior, as the person of the pictures, who is then learnt from footage; by
        default as anybody."""

    def settle(self, kept: Signals) -> None:
        """After a stage that kept rows from training (`inner_split`): measure on those rows."""

    def finish(self) -> None:
        """After training: become what a finished person needs, the same pictures as before."""

    def listen(self, signals: Signals) -> Signals:
        """What speech says about the face, written into the signals; by default nothing.

        Called once per job or chunk, before `condition`; what it writes a person may edit.
        """
        return signals

    @property
    def neutral(self) -> Tensor | None:
        """The face at rest (68, 3) that tracks of landmarks move; None where none drive it."""
        return None

    def aim(self, signals: Signals, rays: RayBundle) -> RayBundle:
        """Rays in head space as the avatar has learnt it; by default as it was tracked."""
        return rays

    def condition(self, signals: Signals) -> Field:
        """Close over the driving signals of T rows."""
        raise NotImplementedError

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        """Marched channels and the background -> picture.

        plate (R, 3): behind each ray, or behind each pixel of the finished pictures where the
        rays are whole ones.
        """
        raise NotImplementedError

    def losses(self, results: list[StepResult]) -> dict[str, Tensor]:
        """Scalars by name, of those it `weighs`; a stage says which count, and how much."""
        raise NotImplementedError

    def part(self, name: str) -> list[nn.Parameter]:
        """Parameters of a named part, for the stage's `learn` and `rates`."""
        raise NotImplementedError

    def parts(self) -> list[str]:
        """Names that `part` knows."""
        raise NotImplementedError


def averaged(found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of several shots, by name -> the mean of each name over the shots that have it."""
    terms: dict[str, list[Tensor]] = {}
    for losses in found:
        for name, value in losses.items():
            terms.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean() for name, values in terms.items()}


def shaped(tensor: Tensor, rays: RayBundle) -> Tensor:
    """(R, C) -> (B, h, w, C) where the rays have a layout."""
    return tensor if rays.layout is None else tensor.view(*rays.layout, tensor.shape[-1])


def distance(rendered: Rendered, rays: RayBundle) -> Tensor:
    """How far what is solid lies along each ray, face heights; infinite where nothing is."""
    solid = rendered.opacity > 0.5
    away = rendered.depth / rendered.opacity.clamp_min(1e-3)
    return shaped(torch.where(solid, away, torch.inf), rays)
