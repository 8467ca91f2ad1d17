"""Frames of a run, one by one or many in one march."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from trainings import train

from talkhead_cli import march
from talkhead_cli.contracts import Frame, Signals, SilentProgress, TalkheadError, unpacked
from talkhead_cli.jobs import footage, views
from talkhead_cli.jobs import player as job
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.runs import box_for, build_avatar, pick_run, speech_shape_of
from talkhead_cli.store import Run, Workspace


@pytest.mark.parametrize("method", ["lokitalk", "landmark", "talk3d"])
def test_pictures_bear_half_precision(
    speaker_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What a GPU draws with, in the CPU's halves, which are coarser than the GPU's."""
    preset = presets.load([method, "tiny"], ["data.size_px=64", "march.resolution=32"])
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    box = box_for(preset, clip.signals.camera[clip.train])
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    avatar, marcher, note = build_avatar(preset, clip.signals.audio.shape[1:], box, cpu)
    avatar.calibrate(clip.signals[clip.train], clip.mesh, box)
    for parameter in avatar.parameters():  # nothing that begins at zero stays there
        parameter.data += 0.03 * torch.randn_like(parameter)
    player = Player(Run(tmp_path), preset, avatar.eval(), marcher.eval(), clip.plate, cpu, note)
    rows = clip.signals[clip.train[:3]]
    whole = [frame.rgb for frame, _ in player.pictures(rows)]
    monkeypatch.setitem(job.HALF, "cpu", torch.bfloat16)
    half = [frame.rgb.float() for frame, _ in player.pictures(rows)]
    for a, b in zip(whole, half, strict=True):
        assert a.std() > 0.01 and not torch.equal(a, b), "halves are what is asked for"
        assert 10 * torch.log10(1 / (a - b).square().mean()) > 30


def test_frames_that_march_together_are_the_same_frames(
    speaker_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = presets.load(["lokitalk", "tiny"], ["data.size_px=32", "march.resolution=32"])
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    box = footage.box_of(clip.signals.camera[clip.train])
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    avatar, marcher, note = build_avatar(preset, clip.signals.audio.shape[1:], box, cpu)
    avatar.calibrate(clip.signals[clip.train], clip.mesh, box)
    avatar.eval()
    marcher.eval()
    player = Player(Run(tmp_path), preset, avatar, marcher, clip.plate, cpu, note)
    rows = clip.signals[clip.train[:5]]
    alone = [frame for frame, _ in player.pictures(rows)]
    monkeypatch.setattr(Player, "rows_at_once", lambda self, size_px: 3)
    together = [frame for frame, _ in player.pictures(rows)]
    assert len(alone) == len(together) == 5
    for a, b in zip(alone, together, strict=True):
        assert a.rgb.shape == b.rgb.shape == (1, 32, 32, 3)
        for x, y in ((a.rgb, b.rgb), (a.alpha, b.alpha), (a.depth, b.depth)):
            assert torch.allclose(x, y, atol=1e-4)
    assert not torch.allclose(alone[0].rgb, alone[4].rgb, atol=1e-3), "rows must differ"
    n_points = [n for _, n in player.pictures(rows)]
    monkeypatch.undo()  # on a GPU, frames that march together have one number of samples
    player.trained = views.poses_of(rows)[:4]
    assert [n for _, n in player.pictures(rows)] == n_points
    player.trained = views.poses_of(rows) + torch.tensor([0.0, 0.2] + 8 * [0.0])
    assert all(b == 2 * a for a, (_, b) in zip(n_points, player.pictures(rows), strict=True))
    player.trained = None
    player.open_views(rows)
    closer = [n for _, n in player.pictures(rows)]
    assert all(b == 2 * a for a, b in zip(n_points, closer, strict=True)), "twice the samples"


@pytest.mark.parametrize("recordable", [True, False])
def test_recorded_pictures_are_those_that_are_drawn_as_they_come(
    speaker_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recordable: bool
) -> None:
    """Here by a recorder that plays by drawing again into the same place, or cannot record, which
    is said once and costs no picture."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    preset = presets.load(["lokitalk", "tiny"], ["data.size_px=32", "march.resolution=32"])
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    box = footage.box_of(clip.signals.camera[clip.train])
    cpu = torch.device("cpu")
    avatar, marcher, note = build_avatar(preset, clip.signals.audio.shape[1:], box, cpu)
    avatar.calibrate(clip.signals[clip.train], clip.mesh, box)
    player = Player(Run(tmp_path), preset, avatar.eval(), marcher.eval(), clip.plate, cpu, note)
    rows, held = clip.signals[clip.train[:5]], []

    class Recorder:
        def __init__(self, work: Any, device: torch.device) -> None:
            self.work = work

        def __call__(self, *given: torch.Tensor) -> Any:
            if not recordable:
                raise march.CannotRecordError("it waits")
            frame, n_points = self.work(*given)
            if not held:
                held.append(frame)
            for place, value in zip(unpacked(held[0]), unpacked(frame), strict=True):
                place.copy_(value)
            return held[0], n_points

    plain = [frame for frame, _ in player.pictures(rows)]
    monkeypatch.setattr(march, "Replay", Recorder)
    monkeypatch.setattr(Player, "_renders_without_sync", True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [frame for frame, _ in player.pictures(rows)]
    assert [("it waits" in str(w.message)) for w in said] == ([] if recordable else [True])
    for a, b in zip(plain, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(unpacked(a), unpacked(b), strict=True))
    assert not torch.equal(found[0].rgb, found[4].rgb), "nor is one overwritten by the next"


def test_new_poses_are_the_furthest_from_what_is_known_first() -> None:
    known = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    near, off, far = [0.99, 0.0], [0.5, 0.3], [0.0, 2.0]
    poses = torch.tensor([near, off, far, [0.0, 2.01], [0.5, 0.3]])
    first, second = views.new_poses(poses, known, 5)
    assert {first, second} == {3, 1} and first == 3, "each news once"
    assert views.new_poses(poses, known, 1) == [3]
    assert views.new_poses(poses[:1], known, 5) == [], "no news"


def test_what_heard_otherwise_is_refused_in_a_sentence(tmp_path: Path) -> None:
    run = Run.named(tmp_path, "old")
    run.write_meta(speech={"backend": "mel", "n_features": 46, "window": 33})
    with pytest.raises(TalkheadError, match="'old' was trained by an older version"):
        speech_shape_of(run)


def test_rows_of_a_film_are_heard_with_what_came_before_them(
    speaker_home: Path, tmp_path: Path
) -> None:
    """As in the whole film, wherever they lie; here by one who adds up three rows' sound."""

    class Adding:
        past = 2

        def listen(self, signals: Signals) -> Signals:
            loud = signals.audio.mean((1, 2))
            summed = torch.stack([loud[max(0, i - 2) : i + 1].sum() for i in range(len(loud))])
            return signals.with_(landmarks=summed[:, None, None].expand(-1, 68, 3))

    preset = presets.load(["lokitalk", "tiny"], ["data.size_px=64"])
    clip = footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())
    player = Player(
        Run(tmp_path),
        preset,
        Adding(),
        nn.Identity(),
        clip.plate,  # type: ignore[arg-type]
        torch.device("cpu"),
        "",
    )
    whole = player.listen(clip.signals).landmarks
    for rows in (torch.arange(40, 50), torch.tensor([0, 1]), torch.tensor([30, 47, 60])):
        heard = player.listen_to_rows(clip.signals, rows)
        assert torch.allclose(heard.landmarks, whole[rows], atol=1e-5)
        assert torch.equal(heard.moment, clip.signals.moment[rows])


def test_frames_made_side_by_side_come_in_order_and_are_the_same(home: Path) -> None:
    train(home)
    space = Workspace.open(home, "speaker")
    player = Player.load(pick_run(space, None, SilentProgress()), torch.device("cpu"))
    clip = footage.load(space, player.preset.data, SilentProgress())
    assert player.trained is not None
    assert torch.equal(player.trained, views.poses_of(clip.signals[clip.train]))
    signals = clip.signals[clip.train[:: len(clip.train) // 6]]
    n_threads = torch.get_num_threads()
    try:
        made = []
        for n in (1, 3):
            torch.set_num_threads(n)
            made.append(torch.cat([frame.rgb for frame, _ in player.pictures(signals)]))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.allclose(*made, atol=1e-5)
    steps = (made[0][1:] - made[0][:-1]).abs().flatten(1).amax(1)
    assert steps.min() > 1e-3, "the frames differ, so order shows"


class Stream:
    """Stands for a CUDA stream: work on it is done when an event of it has been waited for."""

    log: list[str] = []
    now: list[Stream] = []

    def __init__(self, name: str) -> None:
        self.name, self.device = name, torch.device("cpu")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return f"event {sum(line.startswith('work') for line in self.log) - 1}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def __enter__(self) -> None:
        self.now.append(self)

    def __exit__(self, *_: object) -> None:
        self.now.pop()


@pytest.mark.parametrize("n_read", [1, 4])
def test_on_a_gpu_the_next_pictures_are_drawn_before_these_are_handed_out(
    monkeypatch: pytest.MonkeyPatch, n_read: int
) -> None:
    """In order, on a stream of their own, each with a wait of the reader's for its very end; and a
    reader that leaves early leaves nothing running that reads what may be freed."""
    own, reader = Stream("own"), Stream("reader")
    monkeypatch.setattr(Stream, "log", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: reader)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    held: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: held.append(t))

    def work(index: int) -> tuple[Frame, Any]:
        assert Stream.now == [own]
        Stream.log.append(f"work {index}")
        rgb = torch.full((2, 4, 4, 3), float(index))
        return Frame(rgb, rgb[..., :1], rgb[..., :1], {}), torch.tensor(index)

    frames = job._one_ahead(work, 4, own)  # type: ignore[arg-type]
    read = []
    for frame, n_points in frames:
        assert int(n_points) == frame.rgb[0, 0, 0, 0]
        Stream.log.append(f"read {int(n_points)}")
        read.append(int(n_points))
        if len(read) == n_read:
            break
    frames.close()
    assert read == list(range(n_read)) and len(held) >= 4 * n_read
    steps = {line: i for i, line in enumerate(Stream.log)}
    assert Stream.log[0] == "own waits for reader" and Stream.log[-1] == "reader waits for own"
    for index in read:
        assert steps[f"reader waits for event {index}"] < steps[f"read {index}"]
        if index < 3:
            assert steps[f"work {index + 1}"] < steps[f"read {index}"]
    assert n_read == 4 or "work 2" not in steps, "one ahead, and no more"


def test_a_gpu_marches_as_many_frames_as_it_has_room_for() -> None:
    player = SimpleNamespace(device=torch.device("cuda"))
    sizes = {px: Player.rows_at_once(player, px) for px in (64, 256, 512, 1024)}  # type: ignore[arg-type]
    assert sizes == {64: 8, 256: 8, 512: 2, 1024: 1}
    player.device = torch.device("cpu")
    assert Player.rows_at_once(player, 64) == 1  # type: ignore[arg-type]
