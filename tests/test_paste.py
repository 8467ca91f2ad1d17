"""Faces are set into the film they came from, and nothing else of it is touched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from talkhead_cli import media
from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.jobs.paste import MASK_PX, Original, difference, face_masks, stand_ins
from talkhead_cli.jobs.render import RenderOptions, _refuse_contradictions
from talkhead_cli.store import Run, Workspace
from talkhead_cli.track.crop import Crop
from talkhead_cli.track.cuts import Take, Takes
from talkhead_cli.track.face import EYES, LOWER_LIP, TOP, UPPER_LIP
from talkhead_cli.track.zoom import STILL, Zoom

N, SIZE = 40, (96, 64)


def at(mask: np.ndarray, point: np.ndarray) -> float:
    x, y = (point * MASK_PX).astype(int)
    return float(mask[y, x])


def test_what_is_pasted_is_the_mouth_and_what_moves_with_it(a_face: np.ndarray) -> None:
    mesh = (a_face / 512).astype(np.float32)
    chin, height = mesh[152], np.linalg.norm(mesh[152] - mesh[TOP])
    always, maybe = face_masks(mesh, eyes=False)
    with_eyes, same = face_masks(mesh, eyes=True)
    assert np.array_equal(maybe, same)
    for inside in (mesh[UPPER_LIP], mesh[LOWER_LIP], chin, chin + [0, 0.05 * height]):
        assert at(maybe, inside) > 0.5
    for lip in (UPPER_LIP, LOWER_LIP, 0, 17, 61, 291):
        assert at(always, mesh[lip]) > 0.6
    assert at(always, chin) < 0.3 and at(always, mesh[4]) < 0.3
    for *corners, _, iris in EYES:
        assert at(always, mesh[iris]) < 0.01 and at(with_eyes, mesh[iris]) > 0.95
        assert at(maybe, mesh[iris]) < 0.01
        assert all(at(with_eyes, mesh[corner]) > 0.5 for corner in corners)
    for outside in (mesh[TOP], mesh[4], chin + [0, 0.3 * height], np.array([0.02, 0.02])):
        assert at(np.maximum(with_eyes, maybe), outside) < 0.3
    assert np.abs(np.diff(maybe, axis=0)).max() < 0.35, "no hard edge"


def test_where_both_show_the_same_there_is_no_difference(a_face: np.ndarray) -> None:
    """Noise and a pixel's shift are none; another brow is, where it is."""
    rng = np.random.default_rng(0)
    seen = cv2.GaussianBlur(rng.integers(60, 200, (96, 96, 3)).astype(np.float32), (0, 0), 6)
    face = cv2.resize(seen, (48, 48), interpolation=cv2.INTER_AREA) + rng.normal(0, 4, (48, 48, 3))
    seen, face = (p.clip(0, 255).astype(np.uint8) for p in (seen, face))
    assert difference(face, seen, 0.45).max() < 0.1
    face[10:20, 20:30] = 255 - face[10:20, 20:30] // 4
    found = difference(face, seen, 0.45)
    assert found[12:18, 22:28].min() > 0.9 and found[32:].max() < 0.1


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat frames, each lighter than the one before."""
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with media.VideoWriter(path, SIZE, crf=1) as out:
        for index in range(N):
            out.write(np.full((SIZE[1], SIZE[0], 3), 20 + 5 * index, np.uint8))
    return path


def levels(frames: Any) -> list[int]:
    return [round((float(frame.mean()) - 20) / 5) for frame in frames]


@pytest.mark.parametrize(
    "rows",
    [
        [*range(5, 12)],
        [9],
        [7, 6, 5],
        [*range(N), *range(N - 2, -1, -1), 1, 2],
        [3, 4, 3, 2, 3],
        [*range(N - 1, -1, -1)],
    ],
)
def test_a_film_is_played_in_any_order(film: Path, rows: list[int]) -> None:
    assert levels(media.Part(film).played(np.array(rows))) == rows


def test_rows_count_from_where_the_part_begins(film: Path) -> None:
    assert levels(media.Part(film, 5, 20).played(np.array([2, 3, 4, 3, 2]))) == [7, 8, 9, 8, 7]


def test_a_film_is_not_played_in_leaps(film: Path) -> None:
    assert not list(media.Part(film).played(np.array([], int)))
    with pytest.raises(ValueError, match="one after the other"):
        list(media.Part(film).played(np.array([5, 3, 1])))


def original(film: Path, mesh: np.ndarray, found: np.ndarray, takes: Takes) -> Original:
    meshes = np.repeat(mesh[None].astype(np.float32), N, 0)
    stands = np.where(found, np.arange(N), -1)
    return Original(media.Part(film), SIZE, Crop(30, 10, 40), takes, meshes, stands)


def test_faces_go_where_a_shot_shows_them(film: Path, a_face: np.ndarray) -> None:
    """Half as large and elsewhere, also where another frame stands in for one without a face."""
    takes = Takes([Take(0, 24, STILL), Take(26, N, Zoom(0.5, (0.0, 0.0)))])
    rows, found = np.arange(N), np.ones(N, bool)
    found[24:26] = False
    whole = original(film, a_face / 512, found, takes)
    whole = replace(whole, stands=np.where(found, rows, np.where(rows < 25, 23, 26)))
    plain = list(media.Part(film).frames())
    white = (np.full((16, 16, 3), 255, np.uint8) for _ in rows)
    pasted = list(whole.with_faces(rows, white, eyes=False))
    for row in (25, 26, N - 1):
        ys, xs = np.nonzero((pasted[row] != plain[row]).any(-1))
        assert len(ys) and xs.min() >= 15 and xs.max() <= 35 and ys.max() <= 25, row


def test_where_a_face_differed_it_fades_out(film: Path, a_face: np.ndarray) -> None:
    """What differs in one frame only is pasted in the next, too: else cheeks would flicker."""
    takes, rows = Takes([Take(0, N, STILL)]), np.arange(2)
    whole = original(film, a_face / 512, np.ones(N, bool), takes)
    same = [cv2.resize(f[10:50, 30:70], (64, 64)) for f in media.Part(film).frames(n_frames=2)]
    second = np.clip(same[1].astype(int) + 6, 0, 255).astype(np.uint8)

    def after(first: np.ndarray) -> np.ndarray:
        return list(whole.with_faces(rows, iter([first, second]), eyes=False))[1]

    assert (after(255 - same[0]) != after(same[0])).any()


def test_all_but_the_face_is_the_film_s_own(film: Path, a_face: np.ndarray) -> None:
    """Also in a shot that shows it nearer, and where nobody is seen."""
    mesh, found = a_face / 512, np.ones(N, bool)
    found[20:22] = False
    takes = Takes([Take(0, 25, STILL), Take(25, N, Zoom(1.25, (-12.0, -5.0)))])
    rows = np.arange(N)
    white = (np.full((16, 16, 3), 255, np.uint8) for _ in rows)
    plain = list(media.Part(film).frames())
    pasted = list(original(film, mesh, found, takes).with_faces(rows, white, eyes=False))
    mouth = mesh[[UPPER_LIP, LOWER_LIP]].mean(0)
    for row in rows:
        changed = (pasted[row] != plain[row]).any(-1)
        if not found[row]:
            assert not changed.any()
            continue
        x, y, side = (30, 10, 40) if row < 25 else (25.5, 7.5, 50)
        lips = int(y + mouth[1] * side), int(x + mouth[0] * side)
        assert (255 - pasted[row][lips] < 0.15 * (255 - plain[row][lips])).all()
        ys, xs = np.nonzero(changed)
        assert xs.min() >= int(x) and xs.max() < x + side + 1
        assert ys.min() >= y + mesh[TOP, 1] * side and ys.max() < y + side + 1


def test_what_the_avatar_shows_alike_stays_as_it_was_filmed(film: Path, a_face: np.ndarray) -> None:
    mesh, rows = a_face / 512, np.arange(N)
    whole = original(film, mesh, np.ones(N, bool), Takes([Take(0, N, STILL)]))
    plain = list(media.Part(film).frames())

    def faces() -> Any:
        for frame in plain:
            face = cv2.resize(frame[10:50, 30:70], (64, 64))
            x, y = (mesh[LOWER_LIP] * 64).astype(int)
            face[y - 1 : y + 2, x - 1 : x + 2] = 0
            yield face

    pasted = list(whole.with_faces(rows, faces(), eyes=False))
    lip, brow, cheek = ((mesh[i] * 40 + [30, 10]).astype(int) for i in (LOWER_LIP, 105, 50))
    for before, after in zip(plain, pasted, strict=True):
        assert before[lip[1], lip[0]].mean() > after[lip[1], lip[0]].mean() + 5
        for x, y in (brow, cheek):
            assert np.abs(before[y, x].astype(int) - after[y, x]).max() <= 1


def test_a_frame_too_few_is_no_film(film: Path, a_face: np.ndarray) -> None:
    whole = original(film, a_face / 512, np.ones(N, bool), Takes([Take(0, N, STILL)]))
    with pytest.raises(ValueError, match="zip"):
        list(whole.with_faces(np.arange(5), iter([np.zeros((8, 8, 3), np.uint8)]), eyes=False))
    with pytest.raises(TalkheadError, match="ends before the frames"):
        faces = iter([np.zeros((8, 8, 3), np.uint8)] * (N + 1))
        list(whole.with_faces(np.minimum(np.arange(N + 1), N), faces, eyes=False))


def test_what_the_film_cannot_have_is_said(film: Path, a_face: np.ndarray) -> None:
    found = np.ones(N, bool)
    whole = original(film, a_face / 512, found.copy(), Takes([Take(0, N, STILL)]))
    assert not list(whole.warnings(np.arange(N), 40))
    assert "softer" in "".join(whole.warnings(np.arange(5), 20))
    assert "backwards" in "".join(whole.warnings(np.arange(N + 1) % N, 40))
    whole.stands[3:5] = -1
    assert "2 of the frames" in "".join(whole.warnings(np.arange(10), 40))


def test_frames_at_a_cut_take_their_neighbour_s_face() -> None:
    """Trackers leave out the first and the last frame of a shot, which show the face, too."""
    found = np.zeros(20, bool)
    found[[*range(8), *range(11, 15)]] = True
    found[12] = False
    takes = Takes([Take(0, 8, STILL), Take(11, 15, STILL)])
    stands = stand_ins(found, takes)
    want = [*range(8), 7, -1, 11, 11, -1, 13, 14, 14, -1, -1, -1, -1]
    assert stands.tolist() == want
    assert stand_ins(np.ones(3, bool), Takes([Take(0, 3, STILL)])).tolist() == [0, 1, 2]


def run_of(space: Workspace, **meta: Any) -> Run:
    """What paste-back asks of a run."""
    known = {"footage": space.fingerprint} | meta
    fake: Any = SimpleNamespace(name="lokitalk", meta=lambda: known)
    return fake  # type: ignore[no-any-return]


def test_it_must_be_the_film_and_the_track_that_the_run_learnt_from(
    home: Path, speaker_clip: Path, film: Path, tmp_path: Path
) -> None:
    space = Workspace.open(home, "speaker")
    copy = Path(shutil.copy(speaker_clip, tmp_path / "renamed.mp4"))
    found = Original.of(space, run_of(space), copy)
    assert found.size == (512, 512) and len(found.stands) == len(found.mesh)
    with pytest.raises(TalkheadError, match="another file"):
        Original.of(space, run_of(space), film)
    with pytest.raises(MisuseError, match="no such file"):
        Original.of(space, run_of(space), tmp_path)
    with pytest.raises(TalkheadError, match="another track"):
        Original.of(space, run_of(space, footage="earlier"), copy)
    space.video.unlink()
    with pytest.raises(TalkheadError, match="without its footage"):
        Original.of(space, run_of(space), copy)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pose", "still"),
        ("background", "#00ff00"),
        ("alpha", True),
        ("depth", True),
        ("yaw_deg", 5.0),
        ("pitch_deg", 5.0),
        ("orbit", True),
    ],
)
def test_what_the_film_has_of_its_own_is_not_asked_for(option: str, value: Any) -> None:
    _refuse_contradictions(RenderOptions(into=Path("film.mp4"), blink="auto"))
    with pytest.raises(MisuseError, match="--" + option.removesuffix("_deg")):
        _refuse_contradictions(RenderOptions(into=Path("film.mp4"), **{option: value}))
