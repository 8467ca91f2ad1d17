"""The interface of all methods: signals -> field, and marched channels -> picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from talkhead_cli.blocks.loss import PATCH, WHOLE
from talkhead_cli.contracts import (
    Field,
    Frame,
    Portrait,
    RayBundle,
    Rendered,
    Signals,
    Size,
    SpeechShot,
    Truth,
)


@dataclass(frozen=True)
class PictureResult:
    """What was rendered of a shot with rays; `rays` are those marched, after `aim`."""

    signals: Signals
    rays: RayBundle
    truth: Truth
    field: Field
    rendered: Rendered
    frame: Frame


class Speaker(Protocol):
    """A person ready to be rendered: the part of `Avatar` that jobs call after `enroll`."""

    aabb: Tensor
    past: int
    magnification: int
    maps: Mapping[str, tuple[str, ...]]
    has_kernel: bool
    lids_in_landmarks: bool

    @property
    def neutral(self) -> Tensor | None: ...
    def listen(self, signals: Signals) -> Signals: ...
    def at_rest(self, signals: Signals) -> Signals: ...
    def aim(self, signals: Signals, rays: RayBundle) -> RayBundle: ...
    def condition(self, signals: Signals) -> Field: ...
    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame: ...


class Avatar(nn.Module):
    """Base class of the methods; independent of marching, saving and video I/O.

    aabb            (6,) box of head space that holds the person
    noise           scale of the noise on driving signals in training; each stage sets it
    common, own     name prefixes of the state that people share, which a prior consists of, and
                    name suffixes excluded from it
    loss_names, expert_losses  names of all its losses · those computed by a lip-sync expert or
                    critic, which may be missing.  Which of them stages have is told from their
                    rays and these names (`losses_of`, which a method with others overrides)
    loss_networks   frozen networks that losses use, handed in by the job; a plain list, so that
                    they are neither trained nor saved with the avatar
    composing       names of the parts that only `compose` uses
    needs_portrait  whether it renders unseen people from pictures (`enroll`), within `box`
    takes_portrait  whether `enroll` makes use of pictures
    generators      published generators it can be built for, see `load_generator`
    generator_parts  names of the parts that such a generator has trained
    past            preceding rows that `listen` needs for a row to match the whole-clip result
    magnification   side of finished pictures over that of the marched ones
    maps            parts of a frame to visualise: names of their channels, which are never negative
    has_kernel      without gradients a Triton kernel evaluates its field (which then `skips`), and
                    no operation on rays or signals causes a host sync on CUDA
    lids_in_landmarks  lids are where landmarks are: openness alone does not move them
    """

    aabb: Tensor
    past = 0
    magnification = 1
    maps: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    common: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    noise = 1.0
    loss_names: frozenset[str] = frozenset()
    expert_losses: frozenset[str] = frozenset()
    generators: frozenset[str] = frozenset()
    generator_parts: tuple[str, ...] = ()
    composing: frozenset[str] = frozenset()
    needs_portrait = False
    has_kernel = False
    lids_in_landmarks = False
    box: tuple[float, ...] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.loss_networks: list[nn.Module] = []
        self.register_buffer("aabb", torch.tensor([-1.0, -1, -1, 1, 1, 1]))

    @property
    def takes_portrait(self) -> bool:
        return self.needs_portrait

    @classmethod
    def build(
        cls, size: Size, *, n_steps: int, n_features: int, px: int, n_people: int = 1
    ) -> Self:
        """Return an untrained avatar for speech windows (n_steps, n_features), pictures of px; by
        default the constructor is called with these arguments."""
        return cls(  # type: ignore[call-arg]  # subclasses take them, this base does not
            size, n_steps=n_steps, n_features=n_features, px=px, n_people=n_people
        )

    def common_state(self) -> dict[str, Tensor]:
        """Return the tensors that people share, which a prior consists of."""
        return {
            k: v
            for k, v in self.state_dict().items()
            if k.startswith(self.common) and not k.endswith(self.own)
        }

    def common_parts(self) -> list[str]:
        """Return the names of parts that hold any of the common parameters."""
        names = self.common_state()
        shared = {id(p) for n, p in self.named_parameters() if n in names}
        return [name for name in self.parts() if any(id(p) in shared for p in self.part(name))]

    @torch.no_grad()
    def take_common(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a prior strictly; ValueError names a tensor that does not fit."""
        own = self.common_state()
        for name in own.keys() | tensors.keys():
            have, want = (
                t.shape if t is not None else None for t in (tensors.get(name), own.get(name))
            )
            if have != want:
                raise ValueError(f"{name} is {have and tuple(have)}, not {want and tuple(want)}")
            own[name].copy_(tensors[name])

    def load_generator(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the published generator it was built for; ValueError names a misfit."""
        raise NotImplementedError

    def survey(self, people: Sequence[Signals]) -> None:
        """Measure (not learn) what `people` have in common, before any of them is calibrated."""

    def calibrate(self, signals: Signals, mesh: Tensor, aabb: Tensor) -> None:
        """Measure (not learn) what is specific to one person, on its training rows.

        mesh (n, 3) the rigid face in head space · aabb (6,) the box that holds the person
        """
        raise NotImplementedError

    def see(self, signals: Signals) -> None:
        """Measure what training shows of one person, on all training rows, with sound or not."""

    def enroll(self, portrait: Portrait | None) -> Speaker:
        """Return the avatar as the person in the pictures, by one differentiable forward pass; an
        avatar trained on one person's footage returns itself."""
        assert portrait is None, "it takes no portrait"
        return self

    def meet(self, portrait: Portrait) -> None:
        """Initialise from a portrait after loading a prior, before fine-tuning; default: no-op."""

    def settle(self, kept: Signals) -> None:
        """Measure on rows that a stage held out of training (`inner_split`), when it ends."""

    def finish(self) -> None:
        """Drop what only training needs; rendered pictures stay the same."""

    def listen(self, signals: Signals) -> Signals:
        """Return the signals with the face predicted from speech; by default unchanged.

        Called once per job or chunk, before `condition`; users may edit the result in between.
        """
        return signals

    def at_rest(self, signals: Signals) -> Signals:
        """Return signals after `listen` with the mouth of somebody who is silent; by default
        unchanged."""
        return signals

    @property
    def neutral(self) -> Tensor | None:
        """Landmarks at rest (68, 3), which landmark tracks displace; None if none drive it."""
        return None

    def aim(self, signals: Signals, rays: RayBundle) -> RayBundle:
        """Return rays with the avatar's learned pose correction; by default unchanged."""
        return rays

    def condition(self, signals: Signals) -> Field:
        """Return the field of T rows with these driving signals."""
        raise NotImplementedError

    def compose(
        self, rendered: Rendered, rays: RayBundle, signals: Signals, plate: Tensor
    ) -> Frame:
        """Return the picture of marched channels over the background.

        plate (R, 3): background of each ray or, if the rays are whole pictures, of each pixel of
        the finished pictures.
        """
        raise NotImplementedError

    def losses(self, results: Sequence[SpeechShot | PictureResult]) -> dict[str, Tensor]:
        """Return unweighted scalar losses by name, out of `losses_of` the stage's rays; stages set
        the weights."""
        raise NotImplementedError

    def losses_of(self, rays: str) -> frozenset[str]:
        """Return the names of the losses that stages with such rays have: none, random, patch or
        picture."""
        if rays == "none":
            return self.loss_names & {"speech"}
        found = self.loss_names - {"speech"}
        if rays != "picture":
            found -= WHOLE | self.expert_losses
        return found - PATCH if rays == "random" else found

    def modules_of_parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules of each part that a stage can `learn`, by the part's name."""
        raise NotImplementedError

    def parts(self) -> list[str]:
        """Return the names of the parts."""
        return list(self.modules_of_parts())

    def part(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a part."""
        return [p for module in self.modules_of_parts()[name] for p in module.parameters()]

    def field_learns(self) -> bool:
        """Return whether any parameter is being trained that rays or the field depend on."""
        names = (name for name in self.parts() if name not in self.composing)
        return any(p.requires_grad for name in names for p in self.part(name))


def averaged(found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each named loss over the shots that have it."""
    terms: dict[str, list[Tensor]] = {}
    for losses in found:
        for name, value in losses.items():
            terms.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean() for name, values in terms.items()}


def shaped(tensor: Tensor, rays: RayBundle) -> Tensor:
    """Reshape (R, C) to (B, h, w, C) if the rays have a layout."""
    return tensor if rays.layout is None else tensor.view(*rays.layout, tensor.shape[-1])


def distance(rendered: Rendered, rays: RayBundle) -> Tensor:
    """Return the hit distance along each ray, face heights; infinite where opacity <= 0.5."""
    solid = rendered.opacity > 0.5
    away = rendered.depth / rendered.opacity.clamp_min(1e-3)
    return shaped(torch.where(solid, away, torch.inf), rays)
