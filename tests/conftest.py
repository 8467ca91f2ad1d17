"""What the tests share: the synthetic speaker, tracked once, and the private clips.

`speaker_home` is made once per session and read by many: a test that changes it copies it first.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from talkhead_cli.contracts import RayBundle, Signals, SilentProgress, Truth

if TYPE_CHECKING:
    from torch import Tensor

    from talkhead_cli.jobs.footage import Footage

ROOT = Path(__file__).parents[1]
SECONDS, SIZE_PX, SEED = 8.0, 512, 0

if str(ROOT / "examples") not in sys.path:
    sys.path.insert(0, str(ROOT / "examples"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that of two processes neither waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_e2e.py")


@pytest.fixture(autouse=True)
def constant_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the machine does: threads order sums, and tests compare trainings."""
    monkeypatch.setattr("talkhead_cli.jobs.threads.EVERY_S", float("inf"))


def hearing(signals: Signals) -> dict[str, int]:
    """What an avatar is told of the speech that it will hear."""
    return dict(zip(("n_steps", "n_features"), signals.audio.shape[1:], strict=True))


def one_picture(clip: Footage, aabb: Tensor) -> tuple[Signals, RayBundle, Truth]:
    """A training row, the rays of all pixels of its picture, and their truth."""
    from talkhead_cli.jobs.shots import truth_of
    from talkhead_cli.march import picture_rays

    at = clip.train[:1]
    rows = clip.signals[at]
    rays = picture_rays(rows.camera, 0 * at, aabb)
    return rows, rays, truth_of(clip, at, rays)


def n_frames_in(film: Path) -> int:
    """Pictures stored in a film, at whatever rate."""
    from talkhead_cli.media.ffmpeg import count_packets

    return count_packets(film, "V:0")[0]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the private test clips; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "hard").is_dir():
        pytest.skip("needs the private test clips (../shared), which are not part of the project")
    return folder


@pytest.fixture(scope="session")
def speaker_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """speaker.mp4: the synthetic speaker with her voice; speaker.truth.npz lies beside it."""
    pytest.importorskip("skimage")
    import synthetic_speaker

    path = tmp_path_factory.mktemp("speaker") / "speaker.mp4"
    synthetic_speaker.film(path, SECONDS, SIZE_PX, SEED)
    return path


@pytest.fixture(scope="session")
def speaker_truth(speaker_clip: Path) -> Any:
    """synthetic_speaker.Truth of the clip."""
    import synthetic_speaker

    return synthetic_speaker.Truth.load(speaker_clip.with_suffix(".truth.npz"))


@pytest.fixture(scope="session")
def speaker_home(speaker_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the preprocessed identity "speaker". Do not write to it: copy it."""
    pytest.importorskip("mediapipe")
    from talkhead_cli.jobs.preprocess import preprocess

    home = tmp_path_factory.mktemp("home")
    preprocess(speaker_clip, home, SilentProgress(), name="speaker")
    return home


@pytest.fixture
def home(speaker_home: Path, tmp_path: Path) -> Path:
    """A copy of the speaker's home, which may be written to."""
    return Path(shutil.copytree(speaker_home, tmp_path / "home"))


@pytest.fixture(scope="session")
def a_face(speaker_truth: Any) -> Any:
    """Mesh (478, 2) in pixels of a 512-pixel picture."""
    return np.asarray(speaker_truth.landmarks_px[0], float)
