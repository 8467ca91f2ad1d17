"""The figures, on series and pictures whose figures are known."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from talkhead_cli.contracts import SilentProgress, TalkheadError
from talkhead_cli.jobs import evaluate as job
from talkhead_cli.jobs import maps
from talkhead_cli.jobs.compare import compare
from talkhead_cli.jobs.evaluate import Measured
from talkhead_cli.store import Run, Workspace


def still_face(n: int) -> np.ndarray:
    return np.tile(np.random.default_rng(0).uniform(0, 512, (1, 478, 3)), (n, 1, 1))


def test_psnr_of_a_known_error() -> None:
    a = np.zeros((8, 8, 3))
    assert job.psnr(a, a + 0.1) == pytest.approx(20.0)
    assert job.psnr(a, a) >= 100


def test_correlation_has_its_interval_and_spread() -> None:
    rng = np.random.default_rng(0)
    a = np.sin(np.arange(240) / 5)
    same = job.correlation(a, 0.5 * a + 3)
    assert same["r"] == pytest.approx(1.0) and same["spread"] == pytest.approx(0.5)
    assert same["interval_90"] == [1.0, 1.0]
    noisy = job.correlation(a, a + rng.normal(0, 1, 240))
    low, high = noisy["interval_90"]
    assert low < noisy["r"] < high and 0.1 < high - low < 0.6
    short = job.correlation(a[:60], (a + rng.normal(0, 1, 240))[:60])
    assert short["interval_90"][1] - short["interval_90"][0] > high - low
    assert job.correlation(a, np.ones(240))["r"] == 0.0


def test_jitter_is_blind_to_steady_motion_and_sees_shaking() -> None:
    mesh = still_face(30)
    mesh[..., 0] += np.arange(30)[:, None] * 3.0
    assert job.jitter(mesh) == pytest.approx(0, abs=1e-9)
    mesh[..., 0] += (-1.0) ** np.arange(30)[:, None]
    assert job.jitter(mesh) == pytest.approx(4.0)


def test_landmark_distance_ignores_where_the_mouth_is() -> None:
    truth, moved = still_face(5), still_face(5)
    moved[..., :2] += 17
    found = np.ones(5, bool)
    assert job._lmd(Measured(truth, found), Measured(moved, found)) == pytest.approx(0, abs=1e-6)
    wide = truth.copy()
    centre = wide[:, :, :2].mean(1, keepdims=True)
    wide[..., :2] = centre + 1.1 * (wide[..., :2] - centre)
    assert job._lmd(Measured(truth, found), Measured(wide, found)) > 1


def test_face_boxes_lie_inside_the_picture() -> None:
    mesh = np.array([[[-0.1, 0.2], [0.5, 1.3]], [[0.25, 0.25], [0.5, 0.75]]])
    boxes = job.face_boxes(mesh, 128)
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
    found = np.ones(60, bool)
    figures = job._eye_figures(Measured(shut, found), Measured(shut, found))
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
