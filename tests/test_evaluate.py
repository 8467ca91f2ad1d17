"""The figures, on series and pictures whose figures are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from talkhead_cli import media
from talkhead_cli.contracts import Frame, Signals, SilentProgress, TalkheadError
from talkhead_cli.jobs import evaluate as job
from talkhead_cli.jobs import footage, maps, scores
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.compare import compare
from talkhead_cli.jobs.runs import pick_by_beginning, pick_run
from talkhead_cli.jobs.scores import Seen
from talkhead_cli.store import Run, Workspace


def still_face(n: int) -> np.ndarray:
    return np.tile(np.random.default_rng(0).uniform(0, 512, (1, 478, 3)), (n, 1, 1))


def test_psnr_of_a_known_error() -> None:
    a = np.zeros((8, 8, 3))
    assert scores.psnr(a, a + 0.1) == pytest.approx(20.0)
    assert scores.psnr(a, a) >= 100


def test_correlation_has_its_interval_and_spread() -> None:
    rng = np.random.default_rng(0)
    a = np.sin(np.arange(240) / 5)
    same = scores.correlation(a, 0.5 * a + 3)
    assert same["r"] == pytest.approx(1.0) and same["spread"] == pytest.approx(0.5)
    assert same["interval_90"] == [1.0, 1.0]
    noisy = scores.correlation(a, a + rng.normal(0, 1, 240))
    low, high = noisy["interval_90"]
    assert low < noisy["r"] < high and 0.1 < high - low < 0.6
    short = scores.correlation(a[:60], (a + rng.normal(0, 1, 240))[:60])
    assert short["interval_90"][1] - short["interval_90"][0] > high - low
    assert scores.correlation(a, np.ones(240))["r"] == 0.0


def seen(mesh: np.ndarray) -> Seen:
    """A film of which the mesh alone matters."""
    return Seen(np.zeros((len(mesh), 8, 8, 3), np.uint8), mesh, np.ones(len(mesh), bool))


def test_jitter_is_blind_to_steady_motion_and_sees_shaking() -> None:
    mesh, frames = still_face(30), np.arange(30)
    mesh[..., 0] += np.arange(30)[:, None] * 3.0
    assert scores.jitter(mesh, frames) == pytest.approx(0, abs=1e-9)
    mesh[..., 0] += (-1.0) ** np.arange(30)[:, None]
    assert scores.jitter(mesh, frames) == pytest.approx(4.0)
    mesh[15:, :, 0] += 50.0  # another shot: its frames are not the next ones
    assert scores.jitter(mesh, frames) > 6
    assert scores.jitter(mesh, frames + 40 * (frames >= 15)) == pytest.approx(4.0)
    assert scores.jitter(mesh, 2 * frames) is None, "no three frames in a row"


def test_landmark_distance_ignores_where_the_mouth_is() -> None:
    truth, moved = still_face(5), still_face(5)
    moved[..., :2] += 17
    assert scores.mouth_distance(seen(truth), seen(moved)) == pytest.approx(0, abs=1e-6)
    wide = truth.copy()
    centre = wide[:, :, :2].mean(1, keepdims=True)
    wide[..., :2] = centre + 1.1 * (wide[..., :2] - centre)
    assert scores.mouth_distance(seen(truth), seen(wide)) > 1


def test_face_boxes_lie_inside_the_picture() -> None:
    mesh = np.array([[[-0.1, 0.2], [0.5, 1.3]], [[0.25, 0.25], [0.5, 0.75]]])
    boxes = scores.face_boxes(mesh, 128)
    assert boxes.tolist() == [[0, 25, 64, 128], [32, 32, 64, 96]]


def test_shut_eyes_are_counted_once_each() -> None:
    mesh = still_face(60)
    for outer, inner, lids, _ in job.face.EYES:
        mesh[:, outer, :2], mesh[:, inner, :2] = (0, 0), (30, 0)
        for up, down in lids:
            mesh[:, up, :2], mesh[:, down, :2] = (15, 5), (15, -5)
    shut = mesh.copy()
    for first in (10, 40):
        for _, _, lids, _ in job.face.EYES:
            for up, _ in lids:
                shut[first : first + 4, up, 1] = -4.0
    figures = scores.eye_scores(seen(shut), seen(shut))
    assert figures["blinks_in_truth"] == 2 and figures["correlation"]["r"] == pytest.approx(1.0)


# -- maps ----------------------------------------------------------------------------------------


def test_near_is_bright_on_one_scale_and_nothing_is_black() -> None:
    near, far = np.full((4, 4), 2.0), np.full((4, 4), 3.0)
    far[0] = np.inf
    first, second = maps.shaded([near, far])
    assert (first == 255).all() and (second[0] == 0).all()
    assert 0 < second[1:].max() == second[1:].min() < 100
    (nothing,) = maps.shaded([np.full((4, 4), np.inf)])
    assert not nothing.any()


def test_heat_rises_with_the_value() -> None:
    ramp = maps.heat(np.linspace(-0.5, 1.5, 9)[None].repeat(2, 0)).astype(int).sum(2)
    assert ramp.shape == (2, 9) and (np.diff(ramp[0]) >= 0).all()
    assert ramp[0, 0] == ramp[0, 2] and ramp[0, -1] == ramp[0, -3], "clipped at 0 and 1"


def test_a_sheet_has_a_line_for_each_name_and_its_pictures_in_order() -> None:
    grey = [np.full((8, 8, 3), value, np.uint8) for value in (10, 100, 200)]
    drawn = maps.sheet({"one": grey, "two, up to 3": grey[::-1]})
    cell, margin = maps.CELL_PX, maps.MARGIN_PX
    assert drawn.shape == (2 * cell, margin + 3 * cell, 3)
    middle = margin + cell // 2 + cell * np.arange(3)
    assert drawn[cell // 2, middle, 0].tolist() == [10, 100, 200]
    assert drawn[cell + cell // 2, middle, 0].tolist() == [200, 100, 10]
    assert drawn[:cell, :margin].any() and drawn[cell:, :margin].any(), "names are written"


@pytest.mark.parametrize("n_heard", [30, 110, 130, 400])
def test_controls_are_three_different_stretches(n_heard: int) -> None:
    """Also where there is hardly more to hear than is asked for, or less."""
    clip: Any = SimpleNamespace(
        speaking=torch.arange(n_heard),
        signals=SimpleNamespace(audio=torch.arange(n_heard)[:, None]),
    )
    found = torch.stack(job._other_speech(clip, 100))[..., 0]
    assert found.shape == (3, 100)
    starts = found[:, 0].sort().values
    assert (starts.diff() >= min(job.BLOCK, n_heard // 3)).all()
    assert ((found.diff(dim=1) == 1) | (found[:, 1:] == 0)).all(), "sound as it was said"


def test_a_newest_run_that_was_a_quick_look_is_named_as_such(tmp_path: Path) -> None:
    space, progress = Workspace(tmp_path, "speaker"), SilentProgress()
    for age, (name, settings) in enumerate(
        {"whole": ["data.size_px=64"], "look": ["data.size_px=64", "train.scale=0.1"]}.items()
    ):
        Run.named(space.runs, name).write_meta(
            finished=True, finished_at=float(age), asked={"presets": [], "settings": settings}
        )
        assert pick_run(space, None, progress).name == name
    assert pick_run(space, "whole", progress).name == "whole"
    assert progress.notes == ["run: whole", "run: look (-s train.scale=0.1; --run chooses another)"]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("lokitalk+tiny", "lokitalk+tiny"),
        ("lokitalk", "lokitalk+tiny+from-crowd"),
        ("lokitalk+tiny+from", "lokitalk+tiny+from-crowd"),
        ("land", "landmark+tiny+from-crowd"),
        ("look", "look2"),
        ("lok", "lokitalk+tiny+from-crowd"),
    ],
)
def test_the_beginning_of_a_run_s_name_is_enough(tmp_path: Path, word: str, name: str) -> None:
    """Of several such runs the newest is meant; a whole name means that run alone."""
    space = Workspace(tmp_path, "speaker")
    names = ("lokitalk+tiny", "lokitalk+tiny+from-crowd", "landmark+tiny+from-crowd", "look2")
    for age, run in enumerate(names):
        Run.named(space.runs, run).write_meta(finished=True, finished_at=float(age))
    assert pick_by_beginning(space, word).name == name
    with pytest.raises(TalkheadError, match="no finished run 'tiny'; it has: look2, landmark"):
        pick_by_beginning(space, "tiny")


def test_figures_of_other_footage_are_not_compared(speaker_home: Path, tmp_path: Path) -> None:
    """Even where they were written down in time."""
    shutil.copytree(speaker_home / "speaker", tmp_path / "speaker")
    space = Workspace.open(tmp_path, "speaker")
    for name in ("one", "two"):
        run = Run.named(space.runs, name)
        run.write_meta(finished=True, finished_at=0.0, footage="of before")
        run.write_figures({"protocol": {"frames": [0, 1], "size_px": 64}})
    with pytest.raises(TalkheadError, match="preprocessed again"):
        compare(tmp_path, "speaker", ["one", "two"], SilentProgress())


# -- the protocol, on a player that knows the truth ------------------------------------------------


class Oracle:
    """Plays the footage's own picture of whatever speech it is given, and its neighbours' where
    poses are not that frame's; `spoiled` may do something to the pictures."""

    device = torch.device("cpu")
    avatar = SimpleNamespace(past=3)

    def __init__(self, home: Path, spoiled: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self.preset = presets.load(["lokitalk", "tiny"], ["data.size_px=128"])
        space = Workspace.open(home, "speaker")
        self.clip = footage.load(space, self.preset.data, SilentProgress())
        self.stats = self.clip.stats
        self.frame_of = {key(window): i for i, window in enumerate(self.clip.signals.audio)}
        self.spoiled = spoiled

    def listen(self, signals: Signals) -> Signals:
        return signals

    def pictures(self, signals: Signals) -> Iterator[tuple[Frame, int]]:
        for index, window in enumerate(signals.audio):
            true = self.clip.pictures[self.frame_of[key(window)]]
            rgb = torch.from_numpy(self.spoiled(true, index).astype(np.float32) / 255)[None]
            yield Frame(rgb, rgb[..., :1], rgb[..., :1], {}), 10


def key(window: torch.Tensor) -> bytes:
    return window.numpy().tobytes()


@pytest.fixture
def scored(
    speaker_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], list[Path], SilentProgress]]:
    """Figures of an oracle whose pictures are spoiled in some way, and what was written."""
    shutil.copytree(speaker_home / "speaker", tmp_path / "speaker")
    space = Workspace.open(tmp_path, "speaker")
    run = Run.named(space.runs, "oracle")
    run.write_meta(
        finished=True, finished_at=0.0, footage=space.fingerprint, speech={"backend": "none"}
    )

    def score(
        spoiled: Callable[[np.ndarray, int], np.ndarray] = lambda rgb, _: rgb,
    ) -> tuple[dict[str, Any], list[Path], SilentProgress]:
        progress = SilentProgress()
        monkeypatch.setattr(job.Player, "load", lambda *_: Oracle(tmp_path, spoiled))
        return *job.evaluate(tmp_path, "speaker", progress), progress

    return score


def test_who_knows_the_truth_is_scored_as_perfect(scored: Any) -> None:
    """Held-out frames are driven by their own sound, in order, and controls by other speech."""
    figures, made, _ = scored()
    picture = figures["picture"]
    assert picture["face_box"]["psnr_db"] == picture["full"]["psnr_db"] == 120
    assert figures["lips"]["correlation"] == {"r": 1, "interval_90": [1, 1], "spread": 1}
    assert abs(figures["lips"]["mismatched_control"]["r"]) < 0.6
    assert all(row["r"] < 0.8 for row in figures["lips"]["mismatched_control"]["each"])
    assert figures["eyes"]["correlation"]["r"] == 1 and figures["jitter_px_at_512"]["ratio"] == 1
    assert figures["lmd_px_at_512"] == 0 and figures["face_found"] == 1
    assert figures["likeness"]["colour_of_255"] == 0
    assert figures["render"]["points_per_frame"] == 10
    films = {path.stem: path for path in made if path.suffix == ".mp4"}
    assert media.probe(films["side_by_side"]).has_audio
    marked = {name: b"synthetic" in path.read_bytes() for name, path in films.items()}
    assert marked == {"truth": False, "render": True, "side_by_side": True}


def test_each_fault_lowers_the_figure_that_is_to_tell_of_it(scored: Any) -> None:
    shaken, _, _ = scored(lambda rgb, i: np.roll(rgb, 3 * (i % 2), 1))
    assert shaken["jitter_px_at_512"]["ratio"] > 2 and shaken["lips"]["correlation"]["r"] > 0.5
    dark, _, _ = scored(lambda rgb, _: (0.7 * rgb).astype(np.uint8))
    assert dark["likeness"]["colour_of_255"] > 20
    assert dark["picture"]["full"]["psnr_db"] < 25
    wide, _, _ = scored(
        lambda rgb, _: np.ascontiguousarray(cv2.resize(rgb, None, fx=1.15, fy=1.0)[:, 9:137])
    )
    assert wide["likeness"]["geometry_percent_of_face_height"] > 2
    assert wide["lmd_px_at_512"] > 1


def test_the_baseline_learns_nothing_from_what_it_is_asked(speaker_home: Path) -> None:
    space = Workspace.open(speaker_home, "speaker")
    preset = presets.load(["lokitalk", "tiny"], ["data.size_px=64"])
    clip = footage.load(space, preset.data, SilentProgress())
    sound = media.read_wav(space.audio)
    said = job._linear_baseline(clip, sound)
    assert np.corrcoef(said, clip.lip_truth[clip.held.numpy()])[0, 1] > 0.5
    other = clip.lip_truth.copy()
    other[clip.held.numpy()] = np.random.default_rng(0).normal(size=len(clip.held))
    assert np.array_equal(job._linear_baseline(replace(clip, lip_truth=other), sound), said)


def test_figures_need_the_footage_that_the_run_was_trained_on(scored: Any, tmp_path: Path) -> None:
    run = Run.named(Workspace.open(tmp_path, "speaker").runs, "oracle")
    run.write_meta(footage="of before")
    with pytest.raises(TalkheadError, match="preprocessed again"):
        scored()
    run.write_meta(
        footage=Workspace.open(tmp_path, "speaker").fingerprint,
        prior={"name": "crowd", "knew_person": True},
    )
    _, _, progress = scored()
    assert any(
        "was trained on 'speaker': these figures are too good" in note for note in progress.notes
    )
    Workspace.open(tmp_path, "speaker").video.unlink()
    with pytest.raises(TalkheadError, match="without its footage"):
        scored()
