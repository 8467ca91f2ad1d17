"""Whom to follow, and the square round the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import TalkheadError
from talkhead_cli.track import face
from talkhead_cli.track import scout as scouting
from talkhead_cli.track.crop import MIN_FACE_PX, Crop, choose_crop
from talkhead_cli.track.zoom import STILL, Zoom

Array = NDArray[np.floating[Any]]


SQUARE = (0, 0, 512, 512)


def test_crop_lies_inside_the_picture_and_holds_the_face(a_face: Array) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        width, height = (int(v) for v in rng.integers(200, 2000, 2))
        tall = rng.uniform(MIN_FACE_PX + 2, 0.6 * min(width, height))
        mesh = (a_face - a_face.mean(0)) * tall / np.linalg.norm(a_face[10] - a_face[152])
        room = np.array([width, height]) - np.ptp(mesh, axis=0)
        mesh += rng.uniform(0, 1, 2) * room - mesh.min(0)
        points = mesh + rng.normal(0, 0.02 * tall, (6, 1, 2))
        square = choose_crop(points.astype(np.float32), np.ones(6, bool), (0, 0, width, height))
        assert square.side % 2 == 0
        assert 0 <= square.x <= width - square.side and 0 <= square.y <= height - square.side
        inside = (mesh >= [square.x, square.y]) & (
            mesh <= [square.x + square.side] * 2 + np.array([0, square.y - square.x])
        )
        assert inside.mean() > 0.95


def test_crop_of_a_face_with_room_is_roomy_and_level(a_face: Array) -> None:
    mesh = a_face * 0.5 + 600
    square = choose_crop(mesh[None].astype(np.float32), np.ones(1, bool), (0, 0, 2000, 2000))
    tall = np.linalg.norm(mesh[10] - mesh[152])
    assert 2.0 * tall < square.side < 3.0 * tall
    centre = (mesh.min(0) + mesh.max(0)) / 2
    assert square.x + square.side / 2 == pytest.approx(centre[0], abs=2)
    assert centre[1] < square.y + square.side / 2  # more room below, for the shoulders
    assert square.scale(512) == 512 / square.side


def test_the_crop_is_where_a_nearer_shot_shows_it() -> None:
    square, size = Crop(100, 80, 200), (1000, 600)
    assert square.zoomed(STILL, size) == (100, 80, 200, 200)
    assert Crop(101, 81, 200).zoomed(STILL, size) == (101, 81, 200, 200), "as older crops are"
    x, y, _, _ = square.zoomed(Zoom(1.0, (3.2, 5.4)), size)
    assert x % 2 == y % 2 == 0, "pixels share their colours in squares of two by two"
    assert square.zoomed(Zoom(1.5, (-50.0, 20.4)), size) == (100, 140, 300, 300)
    # rounding leads nowhere outside
    corner = Crop(0, 0, 40)
    assert corner.zoomed(Zoom(1.25, (-12.0, -5.0)), (96, 64)) == (0, 0, 50, 50), "held inside"
    assert square.zoomed(Zoom(3.001, (-300.0, -240.0)), size) == (0, 0, 600, 600)


def test_crop_ignores_frames_without_a_face(a_face: Array) -> None:
    points = np.stack([a_face, np.full_like(a_face, np.nan)]).astype(np.float32)
    found = np.array([True, False])
    assert choose_crop(points, found, SQUARE) == choose_crop(points[:1], found[:1], SQUARE)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_tiny_face_is_refused_with_its_size(a_face: Array, share: float) -> None:
    tall = np.linalg.norm(a_face[10] - a_face[152])
    mesh = a_face * share * MIN_FACE_PX / tall
    with pytest.raises(TalkheadError, match=f"only {share * MIN_FACE_PX:.0f} pixels"):
        choose_crop(mesh[None].astype(np.float32), np.ones(1, bool), SQUARE)


def test_a_film_without_a_face_has_no_crop() -> None:
    nothing = np.full((3, face.N_MESH, 3), np.nan, np.float32)
    with pytest.raises(TalkheadError, match="no face"):
        choose_crop(nothing, np.zeros(3, bool), SQUARE)


Boxes = list[list[float]]


Scout = Callable[..., scouting.Scene]


@pytest.fixture
def scout(monkeypatch: pytest.MonkeyPatch) -> Scout:
    """Scout a film of 400 x 200 whose detector finds given boxes, in shares of the sides."""

    def look(film: list[Boxes], which: str = "largest", **options: bool) -> scouting.Scene:
        answers: Iterator[Boxes] = iter(film)

        class Fake:
            def __enter__(self) -> Fake:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
                height, width = rgb.shape[:2]
                boxes = np.array(next(answers), np.float32).reshape(-1, 4)
                return boxes * np.array([width, height] * 2, np.float32)

        monkeypatch.setattr(scouting, "FaceDetector", Fake)
        frames = [np.zeros((50, 100, 3), np.uint8)] * len(film)
        return scouting.scout(frames, (400, 200), which, **options)

    return look


LEFT, RIGHT = [0.1, 0.2, 0.25, 0.5], [0.7, 0.2, 0.9, 0.6]


def test_scout_links_two_faces_whatever_their_order(scout: Scout) -> None:
    film = [[LEFT, RIGHT], [RIGHT, LEFT]] * 5
    assert scout(film).n_faces == 2


@pytest.mark.parametrize("axis", [0, 1])
def test_scout_follows_a_face_as_far_up_and_down_as_across(scout: Scout, axis: int) -> None:
    """The picture is twice as wide as tall; half a face's width is as far in both directions."""
    other = [0.75, 0.3, 0.9, 0.6]
    film = []
    for i in range(10):
        low = [0.2, 0.2]
        low[axis] += (i % 2) * (0.1, 0.2)[axis]
        film.append([[*low, low[0] + 0.18, low[1] + 0.36], other])
    assert scout(film).n_faces == 2
    x, _, width, _ = scout(film).roi
    assert x + width / 2 < 200, "the other one is smaller"


def test_scout_cuts_half_way_between_two_faces(scout: Scout) -> None:
    film = [[LEFT, RIGHT]] * 10
    left, right = scout(film, "left"), scout(film, "right")
    assert scout(film) == right  # the larger one
    between = 400 * (LEFT[2] + RIGHT[0]) / 2
    assert left.roi[0] + left.roi[2] <= between <= right.roi[0] + 1
    for scene, box in ((left, LEFT), (right, RIGHT)):
        x, y, w, h = scene.roi
        assert x <= 400 * box[0] and 400 * box[2] <= x + w <= 400
        assert y <= 200 * box[1] and 200 * box[3] <= y + h <= 200
        assert min(x, y) >= 0


@pytest.mark.parametrize("which", [0, 1])
def test_scout_cuts_between_faces_that_stand_one_above_the_other(scout: Scout, which: int) -> None:
    boxes = [[0.3, 0.05, 0.72, 0.35], [0.25, 0.6, 0.68, 0.9]]
    boxes[which] = [*boxes[which][:2], boxes[which][2] + 0.05, boxes[which][3] + 0.02]  # largest
    x, y, w, h = scout([boxes] * 10).roi
    mine = boxes[which]
    assert x <= 400 * mine[0] and 400 * mine[2] <= x + w
    assert y <= 200 * mine[1] and 200 * mine[3] <= y + h + 1
    assert (y + h <= 200 * 0.6) if which == 0 else (y >= 200 * 0.35 - 1)


def test_scout_gives_one_person_the_whole_picture(scout: Scout) -> None:
    moving = [[[0.1 + 0.05 * i, 0.2, 0.3 + 0.05 * i, 0.6]] for i in range(10)]
    assert scout(moving) == scouting.Scene(1, (0, 0, 400, 200), frozenset(range(10)))


def test_scout_looks_near_a_small_face_wherever_it_goes(scout: Scout) -> None:
    there, here = [0.1, 0.2, 0.18, 0.4], [0.7, 0.3, 0.78, 0.5]
    x, y, width, height = scout([[there]] * 10).roi
    assert max(x, y) < 3 and width < 150 and height < 140
    x, y, width, height = scout([[there]] * 8 + [[here]] * 2).roi
    assert x < 3 and x + width > 320 and y + height > 110
    wall = [0.9, 0.1, 0.93, 0.15]
    assert scout([[there, wall]] * 10).roi[2] < 150
    assert scout([[there]] * 10, narrow=False).roi == (0, 0, 400, 200)


def test_scout_overlooks_a_passer_by_and_a_face_on_the_wall(scout: Scout) -> None:
    passer = [[RIGHT, LEFT]] * 2 + [[RIGHT]] * 8
    assert scout(passer).n_faces == 1
    tiny = [0.1, 0.2, 0.12, 0.24]
    assert scout([[RIGHT, tiny]] * 10).n_faces == 1


def test_scout_leaves_the_last_word_to_the_mesh(scout: Scout) -> None:
    assert scout([[]] * 4) == scouting.Scene(0, (0, 0, 400, 200))


def test_scout_refuses_faces_that_cross(scout: Scout) -> None:
    a = [[0.05 + 0.09 * i, 0.2, 0.25 + 0.09 * i, 0.6] for i in range(9)]
    b = [[0.75 - 0.09 * i, 0.4, 0.95 - 0.09 * i, 0.8] for i in range(9)]
    with pytest.raises(TalkheadError, match="cover"):
        scout([[p, q] for p, q in zip(a, b, strict=True)])
    below = [[x, 0.7, right, 0.98] for x, _, right, _ in b]
    assert scout([[p, q] for p, q in zip(a, below, strict=True)]).n_faces == 2


def test_a_face_that_reaches_out_of_the_picture_is_covered_by_nobody(scout: Scout) -> None:
    at_the_edge = [-0.15, -0.2, 0.2, 0.55]
    assert scout([[at_the_edge, RIGHT]] * 5).n_faces == 2


def test_two_faces_of_a_film_are_told_apart(shared: Path) -> None:
    film = shared / "hard" / "two_faces.mp4"
    about = media.probe(film)
    stills = media.frames(film, max_side=640, stride=50)
    scene = scouting.scout(stills, (about.width, about.height), "left")
    assert scene.n_faces == 2
    assert scene.roi[0] + scene.roi[2] < 0.7 * about.width


def test_each_face_keeps_its_own_score() -> None:
    """The largest comes first, though a smaller one is surer."""

    def seen(x: float, side: float, score: float) -> SimpleNamespace:
        box = SimpleNamespace(xmin=x, ymin=0.1, width=side, height=side)
        return SimpleNamespace(
            location_data=SimpleNamespace(relative_bounding_box=box), score=[score]
        )

    detect = face.FaceDetector()
    detect._detector.close()
    faces = [seen(0.0, 0.1, 0.9), seen(0.5, 0.4, 0.6), seen(0.2, 0.2, 0.7)]
    answer = SimpleNamespace(detections=faces)
    detect._detector = SimpleNamespace(process=lambda _: answer, close=lambda: None)
    boxes, scores = detect.scored(np.zeros((100, 200, 3), np.uint8))
    np.testing.assert_allclose(scores, [0.6, 0.7, 0.9])
    np.testing.assert_allclose(boxes[0], [100, 10, 180, 50])
