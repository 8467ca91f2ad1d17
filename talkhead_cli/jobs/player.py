"""A finished run, ready to be asked for pictures; and how runs are saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from talkhead_cli import march
from talkhead_cli.avatars import avatar_class
from talkhead_cli.avatars.base import Avatar
from talkhead_cli.contracts import Camera, Frame, Signals, TalkheadError
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import SpeechStats, read_plate
from talkhead_cli.jobs.preset import Preset
from talkhead_cli.store import Run, Workspace, list_runs

DRIVEN = ("pose", "body", "eye", "gaze", "brow")  # what footage lends a new film


@dataclass
class Player:
    """Avatar and marcher of one run, weights loaded, gradients off."""

    run: Run
    preset: Preset
    avatar: Avatar
    marcher: nn.Module
    plate: Tensor
    device: torch.device
    note: str  # which marcher, and why

    @torch.no_grad()
    def pictures(
        self, signals: Signals, plate: Tensor | None = None
    ) -> Iterator[tuple[Frame, int]]:
        """One frame (B = 1) and its number of field points for each row; signals have listened."""
        background = (self.plate if plate is None else plate).reshape(-1, 3).to(self.device)
        for row in range(len(signals)):
            one = signals[row].to(self.device)
            rays = march.picture_rays(
                one.camera, torch.zeros(1, dtype=torch.long, device=self.device), self.avatar.aabb
            )
            rendered = self.marcher.march(self.avatar.condition(one), rays)  # type: ignore[operator]
            yield self.avatar.compose(rendered, rays, background), rendered.n_points

    @torch.no_grad()
    def open_views(self, signals: Signals) -> None:
        """Let the occupancy grid learn of poses and views that training did not show."""
        grid = getattr(self.marcher, "occupancy", None)
        if grid is not None:
            grid.extend(self.avatar.condition(signals.to(self.device)), range(len(signals)))

    def listen(self, signals: Signals) -> Signals:
        with torch.no_grad():
            return self.avatar.listen(signals.to(self.device)).to("cpu")

    @property
    def stats(self) -> SpeechStats:
        drive = self.run.drive()
        return SpeechStats(drive["speech_mean"], drive["speech_std"])


def pick_run(space: Workspace, name: str | None) -> tuple[Run, bool]:
    """The named finished run, else the newest; and whether it was chosen by default."""
    runs = [r for r in list_runs(space.runs) if r.is_finished]
    if not runs:
        raise TalkheadError(
            f"'{space.id}' has no finished run; train one with: talkhead finetune --id {space.id}"
        )
    if name is None:
        return runs[0], True
    for run in runs:
        if run.name == name:
            return run, False
    raise TalkheadError(
        f"'{space.id}' has no finished run '{name}'; it has: {', '.join(r.name for r in runs)}"
    )


def build(preset: Preset, n_features: int, aabb: Tensor, device: torch.device,
          ) -> tuple[Avatar, nn.Module, str]:  # fmt: skip
    """A fresh avatar and marcher for a preset."""
    avatar = avatar_class(preset.method).build(
        preset.avatar.size, n_steps=preset.data.window, n_features=n_features,
        px=preset.data.size_px,
    )  # fmt: skip
    options = march.MarchOptions(
        preset.march.n_steps, preset.march.resolution, preset.march.early_stop,
        preset.march.every, kind=preset.march.kind,
    )  # fmt: skip
    marcher, why = march.build(options, aabb, device)
    return avatar.to(device), marcher.to(device), why


def save(run: Run, avatar: Avatar, marcher: nn.Module) -> None:
    tensors = {f"avatar.{k}": v for k, v in avatar.state_dict().items()}
    run.save_weights(tensors | {f"marcher.{k}": v for k, v in marcher.state_dict().items()})


def load(run: Run, device: torch.device) -> Player:
    """Rebuild a run's avatar from its own files, strictly."""
    text = run.preset_text()
    if text is None:
        raise TalkheadError(f"run '{run.name}' has no preset.yaml; run finetune again")
    preset = presets.from_yaml(text)
    tensors = run.weights()
    n_features = int(run.meta()["speech"]["n_features"])
    aabb = tensors["avatar.aabb"]
    avatar, marcher, why = build(preset, n_features, aabb.to(device), device)
    for prefix, module in (("avatar.", avatar), ("marcher.", marcher)):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            module.load_state_dict(own, strict=True)
        except RuntimeError as error:
            raise TalkheadError(
                f"run '{run.name}' was made by another version of talkhead "
                f"({run.meta().get('version')}); train it again with finetune --fresh"
            ) from error
        module.eval()
    plate = read_plate(run.plate_file, preset.data.size_px)
    return Player(run, preset, avatar, marcher, plate, device, why)


def still_signals(audio: Tensor, camera: Camera, **given: Tensor) -> Signals:
    """Signals of new speech: audio (T, W, A), camera of T rows, and DRIVEN by name."""
    n = len(audio)
    return Signals(
        audio=audio,
        landmarks=torch.zeros(n, 68, 3),
        landmarks_px=torch.zeros(n, 68, 2),
        camera=camera,
        person=torch.zeros(n, dtype=torch.long),
        footage_index=torch.full((n,), -1),
        **{name: given[name] for name in DRIVEN},
    )
