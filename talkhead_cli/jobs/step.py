"""Forward pass of one training step: condition, march, compose, compute the weighted loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from talkhead_cli import march
from talkhead_cli.avatars.base import Avatar, PictureResult
from talkhead_cli.contracts import MisuseError, Shot, SpeechShot
from talkhead_cli.jobs.preset import Train


def refuse_unknown(train: Train, avatar: Avatar, method: str) -> None:
    """Raise MisuseError if a stage names a part or a loss that the avatar lacks or that its rays do
    not yield, which would otherwise be ignored, weighs no loss, shows the avatar portraits that it
    cannot use, or none where it needs some."""
    for name, stage in train.stages.items():
        for what, named, known in (
            ("learn", stage.learn, avatar.parts()),
            ("weights", stage.weights, avatar.loss_names),
        ):
            for strange in sorted(set(named) - set(known)):
                raise MisuseError(
                    f"stage '{name}': preset {method} knows no '{strange}' among its {what}; "
                    f"known: {', '.join(sorted(known))}"
                )
        weighed = {loss for loss, weight in stage.weights.items() if weight}
        here = avatar.losses_of(stage.rays)
        for loss in sorted(weighed - here):
            raise MisuseError(
                f"stage '{name}': rays: {stage.rays} yield no loss '{loss}', but "
                f"{', '.join(sorted(here)) or 'none'}"
            )
        if stage.steps and not weighed:
            raise MisuseError(
                f"stage '{name}' weighs no loss; weigh one of {', '.join(sorted(here)) or 'none'}"
            )
        if stage.rays == "none":
            continue
        if stage.portraits and not avatar.takes_portrait:
            raise MisuseError(
                f"stage '{name}': preset {method} learns nothing from portraits here; leave "
                "portraits at 0"
            )
        if avatar.needs_portrait and not stage.portraits:
            raise MisuseError(
                f"stage '{name}': preset {method} draws people from portraits; set portraits to 1 "
                "or more"
            )


class UncastShots:
    """The shots of a step, wrapped to keep Fabric from casting them.

    In half-precision training Fabric casts every tensor it finds in a module's input, which would
    put positions off by a hundredth of a head.  It does not look inside this class.
    """

    def __init__(self, shots: list[Shot]) -> None:
        self.shots = shots


class StepLosses(NamedTuple):
    """Losses of a step.  loss () the weighted sum · terms () by name, unweighted · n_points sent to
    the field · pictures to train a critic on: whole pictures (B, H, W, 3), their targets and the
    landmarks in them (B, 68, 2)."""

    loss: Tensor
    terms: dict[str, Tensor]
    n_points: int
    pictures: list[tuple[Tensor, Tensor, Tensor]]


class PendingLosses:
    """The losses of a step, copied from the device asynchronously, all at once."""

    def __init__(self, lost: StepLosses, n_rays: int) -> None:
        self.names = list(lost.terms)
        self.counts = {"rays": float(n_rays), "points": float(lost.n_points)}
        terms = [lost.loss.detach().float(), *(term.float() for term in lost.terms.values())]
        self.values, self.here = torch.stack(terms), None
        if self.values.is_cuda:
            there = torch.empty(len(terms), pin_memory=True)
            self.values = there.copy_(self.values, non_blocking=True)
            self.here = torch.cuda.current_stream(lost.loss.device).record_event()

    def read(self) -> tuple[dict[str, float], float]:
        """Return the losses by name, with `loss` their weighted sum, and that sum."""
        if self.here is not None:
            self.here.synchronize()
        loss, *terms = self.values.tolist()
        figures = dict(zip(self.names, terms, strict=True)) | {"loss": loss}
        return figures | (self.counts if self.counts["points"] else {}), loss


class Step(nn.Module):
    """The forward pass and loss of a step in one `forward`, which is what Fabric wraps."""

    def __init__(self, avatar: Avatar, marcher: march.Marcher) -> None:
        super().__init__()
        self.avatar, self.marcher = avatar, marcher

    def forward(self, drawn: UncastShots, weights: Mapping[str, float]) -> StepLosses:
        """Return the losses of a step; only `loss` has a gradient."""
        results: list[SpeechShot | PictureResult] = []
        n_points = 0
        marches_with_grad = torch.is_grad_enabled() and self.avatar.field_learns()
        for shot in drawn.shots:
            if isinstance(shot, SpeechShot):
                results.append(shot)
                continue
            with torch.set_grad_enabled(marches_with_grad):
                speaker = self.avatar.enroll(shot.portrait)
                rays = speaker.aim(shot.signals, shot.rays)
                made = speaker.condition(shot.signals)
                rendered = self.marcher.march(made, rays)
            frame = speaker.compose(rendered, rays, shot.signals, shot.truth.plate)
            results.append(PictureResult(shot.signals, rays, shot.truth, made, rendered, frame))
            n_points += int(rendered.n_points)
        terms = self.avatar.losses(results)
        known = self.avatar.losses_of(_rays_of(drawn.shots[0]))
        assert terms.keys() <= known, f"losses_of leaves out {sorted(terms.keys() - known)}"
        weighed = [weights[name] * term for name, term in terms.items() if weights.get(name)]
        assert weighed, terms.keys()
        loss = torch.stack(weighed).sum()
        pictures = []
        if weights.get("critic"):
            pictures = [_with_its_truth(r) for r in results if isinstance(r, PictureResult)]
        return StepLosses(
            loss, {name: term.detach() for name, term in terms.items()}, n_points, pictures
        )


def _rays_of(shot: Shot) -> str:
    """Return `Stage.rays` of the stage that the shot was drawn for."""
    if isinstance(shot, SpeechShot):
        return "none"
    if shot.rays.layout is None:
        return "random"
    return "picture" if shot.rays.whole else "patch"


def _with_its_truth(result: PictureResult) -> tuple[Tensor, Tensor, Tensor]:
    made = result.frame.rgb.detach()
    return made, result.truth.colour.view(made.shape), result.signals.landmarks_2d
