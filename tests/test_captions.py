"""Captions are found by how they come, and hands and heads are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SilentProgress
from talkhead_cli.jobs.check import check
from talkhead_cli.track.captions import CaptionFinder

ROOM = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 255, (360, 640, 3)), (0, 0), 6)
WORDS = ("but then", "nobody", "had seen it", "coming", "in all those", "years")


def noisy(picture: np.ndarray, at: int) -> np.ndarray:
    noise = np.random.default_rng(at).normal(0, 2, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def written(picture: np.ndarray, words: str, y: float) -> np.ndarray:
    shown = picture.copy()
    at = (picture.shape[1] // 4, round(y * picture.shape[0]))
    for colour, width in (((0, 0, 0), 7), ((255, 255, 255), 2)):
        cv2.putText(shown, words, at, cv2.FONT_HERSHEY_DUPLEX, 1.3, colour, width, cv2.LINE_AA)
    return shown


def lines(frames: Iterator[np.ndarray]) -> tuple[float, float] | None:
    finder = CaptionFinder()
    for frame in frames:
        finder.see(frame)
    return finder.lines


@pytest.mark.parametrize("y", [0.12, 0.5, 0.85])
def test_words_that_come_and_go_are_captions_where_they_are(y: float) -> None:
    found = lines(noisy(written(ROOM, WORDS[i // 20 % 6], y), i) for i in range(150))
    assert found is not None
    # letters stand on their line, some 29 pixels of 360 tall
    assert y - 0.1 < found[0] < y - 0.03 and y - 0.01 < found[1] < y + 0.05


def test_a_picture_that_stands_still_or_bears_a_sign_has_none() -> None:
    assert lines(noisy(ROOM, i) for i in range(60)) is None
    assert lines(noisy(written(ROOM, "NEWS AT TEN", 0.9), i) for i in range(60)) is None


@pytest.mark.parametrize("repeats", [1, 3])
def test_what_moves_is_no_caption(repeats: int) -> None:
    """A face-high block sways and a hand comes up from below, in films that repeat frames too."""

    def frame(i: int) -> np.ndarray:
        at = i // repeats * repeats
        shown = ROOM.copy()
        x = round(250 + 40 * np.sin(at / 7))
        shown[80:280, x : x + 150] = 200
        y = round(330 - 25 * np.sin(at / 3) ** 2)
        shown[y:, 80:200] = 240
        return noisy(shown, i)

    assert lines(frame(i) for i in range(300)) is None


def test_two_words_in_a_minute_are_too_few() -> None:
    silent, *spoken = (noisy(p, 0) for p in (ROOM, *(written(ROOM, w, 0.7) for w in WORDS[:4])))
    rare = (spoken[i // 375] if i > 20 else silent for i in range(60 * FPS))
    often = (spoken[i // 30 % 4] if i > 20 else silent for i in range(60 * FPS))
    assert lines(rare) is None and lines(often) is not None


def test_check_says_that_captions_hide_the_chest(speaker_clip: Path, tmp_path: Path) -> None:
    film = tmp_path / "captioned.mp4"
    frames = media.frames(speaker_clip, n_frames=5 * FPS)
    with media.VideoWriter(film, (512, 512), audio=speaker_clip) as out:
        for i, frame in enumerate(frames):
            out.write(written(frame, WORDS[i // 15 % 6], 0.9))
    said = {f.name: f for f in check(film, SilentProgress()).findings}
    assert said["captions"].verdict == "warn" and "over the chest" in said["captions"].found
    assert "captions" not in {f.name for f in check(speaker_clip, SilentProgress()).findings}
