"""Mattes, shoulders, labels and the background behind the person, by construction."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from talkhead_cli.contracts import FPS, LABELS
from talkhead_cli.track import face, matte

Array = NDArray[np.floating[Any]]


@pytest.mark.parametrize("cutoff_hz", [1.0, 4.0])
def test_smoothing_halves_a_sine_at_its_cutoff(cutoff_hz: float) -> None:
    t = np.arange(1000) / FPS
    wave = np.sin(2 * np.pi * cutoff_hz * t)[:, None]
    inner = slice(200, -200)
    gain = matte.smooth(wave, cutoff_hz)[inner].std() / wave[inner].std()
    assert gain == pytest.approx(0.5, rel=0.03)


def test_smoothing_keeps_straight_lines_and_passes_slow_waves() -> None:
    rows = np.arange(50.0)
    line = np.stack([3 * rows - 7, np.full(50, 2.0)], -1)
    np.testing.assert_allclose(matte.smooth(line, 2.0), line, atol=1e-8)
    slow = np.sin(2 * np.pi * 0.5 * np.arange(500) / FPS)[:, None]
    np.testing.assert_allclose(matte.smooth(slow, 4.0)[50:-50], slow[50:-50], atol=0.01)
    np.testing.assert_array_equal(matte.smooth(line[:2], 2.0), line[:2])


def test_similarity_recovers_a_known_transform() -> None:
    rng = np.random.default_rng(0)
    source: Array = rng.normal(size=(30, 2))
    turn = 1.7 * np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    target: Array = source @ turn.T + np.array([4.0, -5.0])
    found = matte.similarity(source, target)
    np.testing.assert_allclose(found, np.column_stack([turn, [4, -5]]), atol=1e-5)
    back = matte.similarity(target, source)
    np.testing.assert_allclose(found[:, :2] @ back[:, :2], np.eye(2), atol=1e-5)


def warps_of(motion: Array, pivot: Array) -> Array:
    """Frame-to-reference affines (T, 2, 3) of shoulders that moved by (T, 3) from it."""
    out = []
    for right, down, roll in motion:
        c, s = np.cos(roll), np.sin(roll)
        forth = np.array([[c, -s], [s, c]])
        shift = pivot + [right, down] - forth @ pivot
        out.append(np.column_stack([forth.T, -forth.T @ shift]))
    return np.array(out)


def test_body_motion_recovers_what_the_warps_say() -> None:
    t = np.arange(200) / FPS
    slow = [0.03 * np.sin(t), 0.02 * np.cos(0.7 * t), 0.05 * np.sin(0.5 * t)]
    motion = np.stack(slow, -1)
    pivot = np.array([0.5, 0.8])
    warps, tracked = warps_of(motion, pivot), np.ones(200, bool)
    found = matte.body_motion(warps, tracked, pivot)
    np.testing.assert_allclose(found, motion - motion.mean(0), atol=1e-3)
    tracked[90:95] = False
    warps[90:95] = np.eye(2, 3)
    warps[120] = np.array([[1, 0, 0.6], [0, 1, 0]])  # a registration that ran away
    bridged = matte.body_motion(warps, tracked, pivot)
    np.testing.assert_allclose(bridged, motion - motion.mean(0), atol=2e-3)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_body_that_was_never_registered_stands_still() -> None:
    warps = np.tile(np.eye(2, 3), (20, 1, 1))
    still = matte.body_motion(warps, np.zeros(20, bool), np.array([0.5, 0.8]))
    np.testing.assert_array_equal(still, np.zeros((20, 3)))


def test_body_tracker_registers_a_shift() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (320, 320, 3)).astype(np.uint8)
    picture = cv2.GaussianBlur(noise, (0, 0), 6)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
    register = matte.BodyTracker(picture, np.full((matte.MAP_PX,) * 2, 255, np.uint8))
    shift = np.array([[1, 0, 6], [0, 1, -4]], np.float32)
    moved = cv2.warpAffine(picture, shift, (320, 320), borderMode=cv2.BORDER_REFLECT)
    warp = register(np.asarray(moved, np.uint8))
    assert warp is not None
    # frame to reference: where a reference pixel is seen in the frame
    np.testing.assert_allclose(warp[:, :2], np.eye(2), atol=5e-3)
    np.testing.assert_allclose(np.abs(warp[:, 2]), [6 / 320, 4 / 320], atol=2e-3)


def test_body_tracker_says_when_it_is_lost() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    register = matte.BodyTracker(flat, np.full((matte.MAP_PX,) * 2, 255, np.uint8))
    assert register(flat) is None


def plate_film(n: int) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]], Array]:
    """A black square that wanders over a shaded background, its mattes, the background."""
    y, x = np.mgrid[:128, :128]
    background = np.stack([60 + x, 80 + y, 200 - x // 2], -1).astype(np.uint8)
    frames, mattes = [], []
    for i in range(n):
        frame, mask = background.copy(), np.zeros((matte.MATTE_PX,) * 2, np.uint8)
        left = 24 + (48 * i) // max(1, n - 1)
        frame[40:80, left : left + 30] = 0
        mask[80:160, 2 * left : 2 * left + 60] = 255
        frames.append(frame)
        mattes.append(mask)
    return frames, mattes, background


def test_plate_is_the_background_behind_a_moving_person() -> None:
    frames, mattes, background = plate_film(9)
    plate, seen = matte.make_plate(frames, mattes)
    np.testing.assert_array_equal(plate, background)
    assert seen.min() > 0 and seen[0, 0] == 1


def test_plate_takes_the_median_of_what_was_seen() -> None:
    level = [10, 10, 10, 250, 12]
    frames = [np.full((32, 32, 3), v, np.uint8) for v in level]
    plate, _ = matte.make_plate(frames, [np.zeros((64, 64), np.uint8)] * 5)
    np.testing.assert_array_equal(plate, 10)


def test_plate_takes_late_frames_where_earlier_ones_are_hidden() -> None:
    frames = [np.full((32, 32, 3), v, np.uint8) for v in (10, 12, 11, *[200] * 4)]
    hides = np.zeros((64, 64), np.uint8)
    hides[:, :32] = 255
    clear = np.zeros_like(hides)
    plate, _ = matte.make_plate(frames, [hides] * 3 + [clear] * 4, 3)
    assert (plate[:, 24:] == 11).all() and (plate[:, :8] == 200).all()
    once, _ = matte.make_plate(frames, [hides] * 2 + [clear] * 5, 3)  # one may be mistaken
    assert (once[:, 24:] == 11).all() and (once[:, :8] == 200).all()


def test_plate_fills_smoothly_what_was_never_seen() -> None:
    frames, mattes, background = plate_film(1)
    plate, seen = matte.make_plate(frames, mattes)
    hidden = seen == 0
    assert 0.05 < hidden.mean() < 0.25
    error = np.abs(plate.astype(int) - background)
    assert error[hidden].mean() < 6  # of 255; the square itself is black
    far = cv2.dilate(hidden.astype(np.uint8), np.ones((25, 25))) == 0
    assert error[far].max() <= 1
    steps = (np.abs(np.diff(plate.astype(int), axis=axis)).max() for axis in (0, 1))
    assert max(steps) <= 4  # no seams where sides of the gap meet


def test_plate_of_one_colour_is_of_one_colour_behind_the_person_too() -> None:
    wall = np.full((96, 96, 3), (40, 120, 200), np.uint8)
    mask = np.zeros((matte.MATTE_PX,) * 2, np.uint8)
    mask[100:, 60:190] = 255
    person = cv2.resize(mask, (96, 96), interpolation=cv2.INTER_NEAREST) > 0
    plate, _ = matte.make_plate([np.where(person[..., None], 0, wall).astype(np.uint8)], [mask])
    assert np.abs(plate.astype(int) - wall).max() <= 1
    everywhere, _ = matte.make_plate([wall], [np.full_like(mask, 255)])
    assert everywhere.max() == 0  # nothing was seen, and nothing is made up


def test_labels_are_shares_of_one_and_keep_the_mouth_in_the_face(a_face: Array) -> None:
    mesh = a_face / 512
    person = np.full((matte.MATTE_PX,) * 2, 255, np.uint8)
    person[:20] = 0
    skin = np.full((matte.MAP_PX,) * 2, 255, np.uint8)
    torso = matte.torso_prior(mesh)
    labels = matte.label_maps(mesh, person, skin, 1 - torso, torso)
    assert labels.shape == (len(LABELS), matte.MAP_PX, matte.MAP_PX)
    assert np.abs(labels.astype(int).sum(0) - 255).max() <= len(LABELS) / 2
    at = {name: labels[k] for k, name in enumerate(LABELS)}
    x, y = (mesh[4] * matte.MAP_PX).astype(int)  # the nose
    assert at["face"][y, x] > 250
    assert (at["background"][:8] > 250).all()
    assert at["torso"][-1].min() > 200
    chin = int(mesh[face.CHIN, 1] * matte.MAP_PX)
    assert at["neck"][: chin - 20].max() < 60 and at["neck"][chin + 3].max() > 150
    assert at["hair"][20].max() > 200


def test_regions_follow_head_and_shoulders(a_face: Array) -> None:
    mesh = a_face / 512
    maps = matte.RegionMaps(matte.torso_prior(mesh), mesh)
    pivot = matte.body_pivot(mesh)
    still_hair, still_torso = maps.moved(mesh, np.zeros(3), pivot)
    np.testing.assert_allclose(still_torso, maps.torso, atol=1e-5)
    np.testing.assert_allclose(still_hair, 1 - maps.torso, atol=0.02)
    _, down = maps.moved(mesh, np.array([0, 10 / matte.MAP_PX, 0]), pivot)
    np.testing.assert_allclose(down[20:], maps.torso[10:-10], atol=1e-4)


def test_skin_model_knows_the_skin_it_was_fitted_to() -> None:
    rng = np.random.default_rng(0)
    skin = np.clip(rng.normal([200, 150, 130], 6, (300, 3)), 0, 255)
    model = matte.SkinModel.fit(skin)
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[:64], picture[64:] = [200, 150, 130], [40, 90, 200]
    likeness = model(picture)
    assert likeness[:60].min() > 240 and likeness[68:].max() < 20


def test_a_background_that_moves_is_told_from_one_that_stands() -> None:
    rng = np.random.default_rng(0)
    mattes = [np.zeros((matte.MATTE_PX, matte.MATTE_PX), np.uint8) for _ in range(9)]
    for mask in mattes:
        mask[64:, 64:192] = 255
    wall = rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)
    still = [wall.copy() for _ in mattes]
    for frame in still:  # the person may do what he likes
        frame[32:, 32:96] = rng.integers(0, 256, (96, 64, 3))
    plate, _ = matte.make_plate(still, mattes)
    assert matte.background_change(still, mattes, plate) == 0
    moving = [np.roll(frame, 8 * i, 1) for i, frame in enumerate([wall] * len(mattes))]
    plate, _ = matte.make_plate(moving, mattes)
    assert matte.background_change(moving, mattes, plate) > 30
    everywhere = [np.full_like(mask, 255) for mask in mattes]
    assert matte.background_change(still, everywhere, plate) == 0


def test_what_always_stands_beside_the_person_is_none_of_it() -> None:
    """An ornament that the network sees in some frames, and faintly; a hand that is lifted."""
    y, x = np.mgrid[: matte.MATTE_PX, : matte.MATTE_PX]

    def disc(at: tuple[float, float], radius: float, value: int) -> NDArray[np.uint8]:
        return np.where(np.hypot(x - at[0], y - at[1]) < radius, value, 0).astype(np.uint8)

    mattes = []
    for i in range(60):
        seen = [disc((128 + i % 7, 128), 60, 255)]
        if i % 3:
            seen.append(disc((230, 60), 10 + i % 4, 120))
        if i >= 50:
            seen.append(disc((20 + 4 * (i - 50), 230 - 3 * (i - 50)), 9, 250))
        mattes.append(np.max(seen, 0))
    furniture = matte.fixtures(mattes)
    assert furniture[60, 230] == pytest.approx(2 / 3, abs=0.01) and furniture[128, 128] == 0
    clean = matte.without(mattes[59], furniture)
    assert clean[60, 230] == 0 and mattes[59][60, 230] == 120
    assert clean[203, 56] == 250, "the hand"
    assert np.array_equal(clean[:, 60:200], mattes[59][:, 60:200])
    nobody = np.zeros_like(mattes[0])
    assert np.array_equal(matte.without(nobody, furniture), nobody)
