"""Tracks of landmarks as files: round trips, edits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from talkhead_cli.contracts import TalkheadError
from talkhead_cli.jobs import landmark_track
from talkhead_cli.jobs.landmark_track import LandmarkTrack


@pytest.fixture
def track() -> LandmarkTrack:
    rng = np.random.default_rng(0)
    neutral = rng.normal(0, 0.3, (68, 3)).astype(np.float32)
    marks = (neutral + rng.normal(0, 0.02, (30, 68, 3))).astype(np.float32)
    return LandmarkTrack(marks, neutral, rng.uniform(0, 1, (30, 2)).astype(np.float32))


def test_a_track_comes_back_as_it_was(track: LandmarkTrack, tmp_path: Path) -> None:
    path = tmp_path / "ü track.npz"
    landmark_track.write(path, track)
    again = landmark_track.read(path)
    assert np.array_equal(again.landmarks, track.landmarks) and np.array_equal(again.eye, track.eye)  # type: ignore[arg-type]
    assert np.array_equal(again.neutral, track.neutral)


def test_gains_move_their_parts_from_the_neutral_face(track: LandmarkTrack) -> None:
    loud = track.louder(lips=2.0, jaw=0.0)
    away, before = loud.landmarks - track.neutral, track.landmarks - track.neutral
    assert np.allclose(away[:, 48:68], 2 * before[:, 48:68], atol=1e-6)
    assert np.allclose(away[:, :17], 0, atol=1e-6)
    assert np.array_equal(away[:, 17:48], before[:, 17:48])


def test_a_foreign_track_moves_the_own_face(track: LandmarkTrack) -> None:
    own = track.neutral + 0.1
    moved = track.on(own)
    assert np.allclose(moved.landmarks - own, track.landmarks - track.neutral, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"landmarks": None}, "has no array 'landmarks'"),
        ({"neutral": None}, "has no array 'neutral'"),
        ({"landmarks": np.zeros((5, 67, 3))}, r"must be numbers \(T, 68, 3\)"),
        ({"landmarks": np.zeros((0, 68, 3))}, "must be numbers"),
        ({"landmarks": np.full((3, 68, 3), np.nan), "eye": None}, "not numbers"),
        ({"landmarks": np.full((3, 68, 3), 100.0), "eye": None}, "face heights"),
        ({"landmarks": np.array(["a"])}, "must be numbers"),
        ({"eye": np.zeros((7, 2))}, "'eye'"),
        ({"eye": np.full((30, 2), 50.0)}, "not from 50 to 50"),
    ],
)
def test_wrong_tracks_are_refused_by_what_is_wrong(
    track: LandmarkTrack, tmp_path: Path, change: dict, told: str
) -> None:
    arrays = {"landmarks": track.landmarks, "neutral": track.neutral, "eye": track.eye} | change
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(TalkheadError, match=told):
        landmark_track.read(path)


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    path.write_text("no archive")
    for wrong in (path, tmp_path / "absent.npz", tmp_path):
        with pytest.raises(TalkheadError, match="--landmarks"):
            landmark_track.read(wrong)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))  # one array under an archive's name
    with pytest.raises(TalkheadError, match="not a .npz archive"):
        landmark_track.read(path)
    np.savez(path, landmarks=np.array([object()], dtype=object))
    with pytest.raises(TalkheadError, match="not a .npz archive"):
        landmark_track.read(path)


def test_a_track_of_another_speech_is_refused(track: LandmarkTrack) -> None:
    landmark_track.fits_film(track, 31, Path("t.npz"))
    with pytest.raises(TalkheadError, match="30 rows .* 40 frames"):
        landmark_track.fits_film(track, 40, Path("t.npz"))
