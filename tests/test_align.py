"""Alignment of frames to the mean face, on a textured plane that is seen in known poses."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from talkhead_cli.track import align

Z = -0.5  # the plane that stands for the face
K = np.array([[400.0, 0, 128], [0, 400, 128], [0, 0, 1]])
TRUE = np.array([0.06, -0.05, 0.03, 0.05, -0.04, 3.1])


@pytest.fixture(scope="module")
def shape() -> NDArray[Any]:
    """A flat mesh (478, 3) with lips and eyes where a face has them."""
    rng = np.random.default_rng(0)
    mesh = np.column_stack([rng.uniform(-0.4, 0.4, 478), rng.uniform(-0.4, 0.5, 478)])
    for index, place in {33: (-0.28, -0.1), 133: (-0.12, -0.1), 263: (0.28, -0.1),
                         362: (0.12, -0.1)}.items():  # fmt: skip
        mesh[index] = place
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    mesh[align.MESH_TO_68[48:60]] = np.column_stack([0.17 * np.cos(angle),
                                                     0.32 + 0.06 * np.sin(angle)])  # fmt: skip
    return np.column_stack([mesh, np.full(478, Z)])


def seen(pose: NDArray[Any]) -> NDArray[np.uint8]:
    """The plane's picture in a pose."""
    rng = np.random.default_rng(1)
    paint = cv2.GaussianBlur(rng.uniform(0, 255, (400, 400, 3)).astype(np.float32), (0, 0), 6)
    paint = np.clip((paint - 127) * 9 + 127, 0, 255)
    turn = Rotation.from_rotvec(pose[:3]).as_matrix()
    plane = K @ np.column_stack([turn[:, 0], turn[:, 1], turn[:, 2] * Z + pose[3:]])
    to_plane = np.array([[1 / 200, 0, -1 + 0.5 / 200], [0, 1 / 200, -1 + 0.5 / 200], [0, 0, 1]])
    to_index = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    size = (align.ALIGN_PX, align.ALIGN_PX)
    return cv2.warpPerspective(paint, to_index @ plane @ to_plane, size).astype(np.uint8)


def test_the_surface_leaves_out_what_speaks_and_blinks(shape: NDArray[Any]) -> None:
    points = align.rigid_surface(shape)
    assert len(points) > 200
    assert points[:, 1].max() < 0.26  # nothing from the lips down
    for eye in ((-0.2, -0.1), (0.2, -0.1)):
        assert np.linalg.norm(points[:, :2] - eye, axis=1).min() > 0.06


def test_a_pose_that_is_off_is_brought_back(shape: NDArray[Any]) -> None:
    aligner = align.Aligner(shape, K)
    rest = np.array([0.0, 0, 0, 0, 0, 3.0])
    aligner.learn(align.prepared(seen(rest)), rest)
    off = TRUE + np.array([0.012, -0.01, 0.008, 0.006, -0.005, 0.02])
    found = aligner.refine(align.prepared(seen(TRUE)), off)

    # what counts is where the skin lands
    def land(pose: NDArray[Any]) -> NDArray[Any]:
        return aligner._project(pose)[2]

    before = np.linalg.norm(land(off) - land(TRUE), axis=1).mean()
    after = np.linalg.norm(land(found) - land(TRUE), axis=1).mean()
    assert before > 0.8 and after < 0.15


def test_brightness_does_not_move_the_head(shape: NDArray[Any]) -> None:
    aligner = align.Aligner(shape, K)
    aligner.learn(align.prepared(seen(TRUE)), TRUE)
    dim = (seen(TRUE) * 0.6 + 20).astype(np.uint8)
    assert np.abs(aligner.refine(align.prepared(dim), TRUE) - TRUE)[:5].max() < 1e-3


def test_without_texture_the_landmarks_have_the_last_word(shape: NDArray[Any]) -> None:
    aligner = align.Aligner(shape, K)
    grey = np.full((64, 64, 3), 128, np.uint8)
    aligner.learn(align.prepared(grey), TRUE)
    assert np.allclose(aligner.refine(align.prepared(grey), TRUE), TRUE, atol=1e-6)
