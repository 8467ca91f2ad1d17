"""Cuts are found where they are, and what shows another picture is left out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from talkhead_cli.contracts import FPS, SilentProgress, TalkheadError
from talkhead_cli.jobs import footage
from talkhead_cli.jobs.holdout import split
from talkhead_cli.jobs.preprocess import preprocess
from talkhead_cli.jobs.preset import Data
from talkhead_cli.media import ffmpeg
from talkhead_cli.track.cuts import CutFinder, Shots, Take, Takes, thumb
from talkhead_cli.track.face import CHIN, N_MESH, TOP
from talkhead_cli.track.zoom import STILL, Zoom, common_window

ROOM, STREET = (np.random.default_rng(i).uniform(0, 255, (72, 128, 3)) for i in range(2))


def face_at(x: float, y: float, height: float = 30.0) -> np.ndarray:
    mesh = np.zeros((N_MESH, 3))
    mesh[TOP, :2], mesh[CHIN, :2] = (x, y), (x, y + height)
    return mesh


def film(*shots: tuple[np.ndarray, int, np.ndarray | None], noise: float = 3.0) -> Shots:
    rng, seen = np.random.default_rng(9), Shots()
    for picture, n, mesh in shots:
        for _ in range(n):
            noisy = picture + rng.normal(0, noise, picture.shape)
            seen.see(noisy.clip(0, 255).astype(np.uint8), mesh)
    return seen


def frames_kept(shots: Shots) -> np.ndarray:
    return shots.kept().flags(shots.edges()[-1][1])


HERE, THERE = face_at(60, 20), face_at(100, 20)


def test_an_uncut_film_is_kept_whole() -> None:
    shots = film((ROOM, 120, HERE))
    assert (
        shots.edges() == [(0, 120)]
        and frames_kept(shots).all()
        and shots.kept() == [Take(0, 120, STILL)]
    )


@pytest.mark.parametrize("other", [0.0, 255.0])
def test_fades_are_told_from_exposure(other: float) -> None:
    """From black or white and back is a fade; a tenth more or less light is none."""
    ramp = [ROOM * k + other * (1 - k) for k in np.linspace(0, 1, 20)]
    fades = film(
        *((picture, 1, HERE) for picture in ramp),
        (ROOM, 80, HERE),
        *((picture, 1, HERE) for picture in ramp[::-1]),
    )
    faded = fades.faded()
    assert faded[:15].all() and faded[-15:].all() and not faded[20:100].any()
    drift = film(*((ROOM * k, 2, HERE) for k in np.linspace(0.85, 1.15, 50)))
    assert not drift.faded().any()
    dim = [(ROOM * k, 90, HERE) for k in (0.5, 0.62, 0.75, 0.88, 1.0)]
    assert not film(*dim).faded().any(), "light that stays for seconds is light"
    assert not film(*dim[:2]).faded().any(), "no frame is as light as two halves on average"


@pytest.mark.parametrize(
    ("picture", "mesh"),
    [(STREET, HERE), (ROOM[:, ::-1], THERE), (STREET, None), (ROOM + 60, THERE)],
)
def test_another_picture_is_left_out(picture: np.ndarray, mesh: np.ndarray | None) -> None:
    shots = film((ROOM, 60, HERE), (picture, 50, mesh), (ROOM, 30, HERE))
    assert shots.edges() == [(0, 60), (60, 110), (110, 140)]
    kept = frames_kept(shots)
    assert not kept[59:111].any() and kept[:59].all() and kept[111:].all()


def test_a_jump_cut_leaves_out_only_what_trackers_smear() -> None:
    """The same room and face, but everything has moved a little, and the light as well."""
    moved = np.roll(ROOM, 40, 1)
    patch = ROOM.copy()
    patch[4:68, 32:96] = moved[4:68, 32:96] + 40
    shots = film((ROOM, 60, HERE), (patch, 50, face_at(66, 22)))
    assert shots.edges() == [(0, 60), (60, 110)]
    assert np.flatnonzero(~frames_kept(shots)).tolist() == [59, 60]


def test_the_shot_with_most_of_the_face_is_the_one() -> None:
    shots = film((STREET, 90, None), (ROOM, 40, HERE))
    assert np.flatnonzero(frames_kept(shots)).tolist() == list(range(91, 130))


def test_whose_face_is_meant_decides() -> None:
    shots = film((ROOM, 60, HERE), (STREET, 40, THERE))
    assert shots.kept() == [Take(0, 59, STILL)]
    assert shots.kept([70, 82, 94]) == [Take(61, 100, STILL)]


def test_a_nearer_camera_is_another_picture() -> None:
    nearer = face_at(60, 15, 45)
    shots = film((ROOM, 60, HERE), (np.roll(ROOM, 64, 1), 20, None), (ROOM, 30, nearer))
    assert not frames_kept(shots)[60:].any()


def test_motion_and_fades_are_no_cuts() -> None:
    begins = CutFinder()
    pan = [np.roll(ROOM, i, 1) for i in range(60)]
    assert not any(begins(thumb(p.astype(np.uint8))) for p in pan)
    fade = CutFinder()
    steps = [(1 - s) * ROOM + s * STREET for s in np.linspace(0, 1, 25)]
    assert not any(fade(thumb(p.astype(np.uint8))) for p in steps)


# -- zooms ---------------------------------------------------------------------------------------

SCENE = (
    sum(
        k * cv2.GaussianBlur(np.random.default_rng(k).uniform(-255, 255, (360, 640, 3)), (0, 0), k)
        for k in (2, 4, 8)
    )
    / 2
    + 128
)


def shown(zoom: Zoom, picture: np.ndarray = SCENE) -> np.ndarray:
    """The picture as a shot with that zoom shows it; pixel i is at i + 0.5."""
    shift = np.array(zoom.shift) + 0.5 * (zoom.scale - 1)
    matrix = np.array([[zoom.scale, 0, shift[0]], [0, zoom.scale, shift[1]]])
    return cv2.warpAffine(picture, matrix, picture.shape[1::-1], borderMode=cv2.BORDER_REFLECT)


def seen_at(zoom: Zoom, x: float, y: float, height: float) -> np.ndarray:
    mesh = face_at(zoom.scale * x + zoom.shift[0], zoom.scale * y + zoom.shift[1])
    mesh[CHIN, 1] = mesh[TOP, 1] + zoom.scale * height
    return mesh


@pytest.mark.parametrize(
    "zoom", [Zoom(1.25, (-70.0, -60.0)), Zoom(0.8, (60.0, 40.0)), Zoom(1.08, (-20.0, -30.0))]
)
def test_a_zoom_is_measured_though_the_person_has_moved(zoom: Zoom) -> None:
    """What stands still tells how near a picture is; the face is a first guess that is 6 % off."""
    known = seen_at(STILL, 300, 140, 90)
    moved = seen_at(zoom, 303, 146, 90 * 1.06)
    shots = film((SCENE, 80, known), (shown(zoom), 50, moved), (SCENE, 30, known))
    still, nearer, again = shots.kept()
    assert (still, again) == (Take(0, 79, STILL), Take(131, 160, STILL))
    assert (nearer.first, nearer.end) == (81, 129)
    assert abs(nearer.zoom.scale / zoom.scale - 1) < 0.002
    for corner in ([0.0, 0.0], [640.0, 360.0], [300.0, 180.0]):
        at = zoom.scale * np.array([corner]) + zoom.shift
        assert np.abs(nearer.zoom.undone(at) - corner).max() < 1.0


def test_a_zoom_that_leaves_no_room_for_the_head_is_left_out() -> None:
    zoom = Zoom(1.4, (-110.0, -70.0))
    for height, n in ((90, 2), (150, 1)):
        faces = (seen_at(z, 300, 110 if n == 2 else 80, height) for z in (STILL, zoom))
        first, then = faces
        shots = film((SCENE, 80, first), (shown(zoom), 50, then))
        assert len(shots.kept()) == n, height


def test_another_room_is_no_zoom() -> None:
    other = np.roll(SCENE[::-1], 100, 1)
    shots = film((SCENE, 80, seen_at(STILL, 300, 140, 90)), (other, 50, face_at(320, 100, 110)))
    assert len(shots.kept()) == 1


def test_a_soft_cut_shows_in_a_face_that_leaps() -> None:
    """Before a plain wall a zoom changes little of the picture; but no face grows in a moment."""
    wall = 128 + (SCENE - 128) * 0.4
    zoom = Zoom(1.2, (-60.0, -40.0))
    near, far = (seen_at(z, 300, 140, 90) for z in (zoom, STILL))
    assert film((wall, 60, far), (shown(zoom, wall), 60, near), noise=0.3).edges() == [
        (0, 60),
        (60, 120),
    ]
    calm = film((wall, 60, far), (shown(zoom, wall), 60, far), noise=0.3)
    assert calm.edges() == [(0, 120)], "or else the cut would be found without the face"


def test_zooms_are_carried_from_pixels_to_pixels() -> None:
    """A picture at twice the size from (30, 10) on: the same points, the same windows."""
    zoom = Zoom(1.25, (-70.0, -60.0))
    p = np.array([[12.0, 40.0], [600.0, 3.0]])
    larger = zoom.in_pixels(2.0, (30.0, 10.0))
    q = 2 * p + [30, 10]
    there = 2 * (zoom.scale * p + zoom.shift) + [30, 10]
    assert np.allclose(larger.scale * q + larger.shift, there)
    assert np.allclose(larger.undone(there), q) and there[0, 0] != q[0, 0]
    depths = zoom.undone(np.array([[1.0, 2.0, 5.0]]))
    assert depths[0, 2] == 4.0
    left, top, right, bottom = zoom.window((640, 360))
    assert np.allclose(
        zoom.undone(np.array([[0.0, 0.0], [640.0, 360.0]])), [[left, top], [right, bottom]]
    )
    assert common_window([STILL, zoom], (640, 360)) == (left, top, right, bottom)
    assert common_window([STILL], (640, 360)) == (0, 0, 640, 360)


def test_takes_are_read_in_pieces_of_one_zoom() -> None:
    near = Zoom(1.2, (-60.0, -40.0))
    takes = Takes([Take(5, 9, STILL), Take(11, 20, STILL), Take(22, 29, near), Take(31, 40, STILL)])
    assert [*takes.spans(0, 45)] == [Take(0, 22, STILL), Take(22, 31, near), Take(31, 45, STILL)]
    assert [*takes.spans(25, 26)] == [Take(25, 26, near)]
    assert Takes.from_array(takes.to_array()) == takes
    assert np.flatnonzero(takes.flags(45, zoomed=True)).tolist() == list(range(22, 29))
    points = np.ones((45, 3, 2))
    takes.undo(points)
    assert (points[:22] == 1).all() and (points[29:] == 1).all()
    assert np.allclose(points[22:29], [61 / 1.2, 41 / 1.2])


# -- through preprocess --------------------------------------------------------------------------


def joined(out: Path, *clips: tuple[Path, float]) -> Path:
    """The first seconds of each clip, at the size of the first, one after the other."""
    words, graph = ["-loglevel", "error", "-y"], ""
    for index, (clip, seconds) in enumerate(clips):
        words += ["-t", str(seconds), "-i", str(clip)]
        graph += f"[{index}:v]fps=25,scale=512:512,setsar=1[v{index}];"
        graph += f"[{index}:a]aresample=16000,aformat=channel_layouts=mono[a{index}];"
    pads = "".join(f"[v{i}][a{i}]" for i in range(len(clips)))
    graph += f"{pads}concat=n={len(clips)}:v=1:a=1[v][a]"
    words += ["-filter_complex", graph, "-map", "[v]", "-map", "[a]", "-crf", "12", str(out)]
    subprocess.run([ffmpeg.executable(), *words], check=True)
    return out


def wall(out: Path, seconds: float) -> Path:
    words = ["-loglevel", "error", "-y", "-f", "lavfi", "-i", f"testsrc=s=512x512:r=25:d={seconds}",
             "-f", "lavfi", "-i", f"sine=r=16000:d={seconds}", str(out)]  # fmt: skip
    subprocess.run([ffmpeg.executable(), *words], check=True)
    return out


def test_what_was_cut_in_is_neither_learnt_nor_scored(speaker_clip: Path, tmp_path: Path) -> None:
    test_card = wall(tmp_path / "card.mp4", 3)
    cut = joined(tmp_path / "cut.mp4", (test_card, 2), (speaker_clip, 6), (test_card, 3))
    progress = SilentProgress()
    space = preprocess(cut, tmp_path / "home", progress)
    assert any("frames 0-50, 199-274" in note for note in progress.notes)
    tracks = space.load("tracks")
    usable = np.flatnonzero(tracks["usable"])
    assert usable[0] in range(50, 56) and usable[-1] in range(193, 200)
    clip = footage.load(space, Data(size_px=64), SilentProgress())
    assert len(clip.held) == split(usable[-1] + 1 - usable[0], Data().holdout)
    assert clip.held[0] == clip.train[-1] + 1
    # the plate shows the speaker's background, not the card's
    alone = preprocess(speaker_clip, tmp_path / "home", SilentProgress(), name="alone")
    plates = [footage.read_plate(s.plate_file, 64) for s in (space, alone)]
    assert (plates[0] - plates[1]).abs().mean() < 0.05


def test_a_film_that_zooms_is_tracked_as_one_that_does_not(
    speaker_clip: Path, tmp_path: Path
) -> None:
    """The speaker in a wide picture, which an editor shows nearer for two seconds."""
    room = tmp_path / "room.png"
    cv2.imwrite(str(room), cv2.resize(SCENE, (1024, 576)).clip(0, 255).astype(np.uint8))
    nearer = "crop=iw/1.25:ih/1.25:120:80,scale=1024:576"
    plans = {
        "plain": "null",
        "zoomed": f"split=3[a][b][c];[a]trim=0:2,setpts=PTS-STARTPTS[d];"
        f"[b]trim=2:4,setpts=PTS-STARTPTS,{nearer},setsar=1[e];[c]trim=4:6,setpts=PTS-STARTPTS[f];"
        "[d][e][f]concat=n=3",
    }
    tracks, notes = {}, {}
    for name, plan in plans.items():
        out, progress = tmp_path / f"{name}.mp4", SilentProgress()
        graph = f"[0:v]fps=25,scale=340:340[p];[1:v][p]overlay=320:180,setsar=1,{plan}[v]"
        words = ["-loglevel", "error", "-y", "-t", "6", "-i", str(speaker_clip), "-loop", "1",
                 "-r", "25", "-t", "6", "-i", str(room), "-filter_complex", graph, "-map", "[v]",
                 "-map", "0:a", "-t", "6", "-crf", "10", str(out)]  # fmt: skip
        subprocess.run([ffmpeg.executable(), *words], check=True)
        space = preprocess(out, tmp_path / "home", progress)
        tracks[name], notes[name] = space.load("tracks"), progress.notes
    assert any("49-" not in n and "1.25 times as large" in n for n in notes["zoomed"])
    both = tracks["plain"]["usable"] & tracks["zoomed"]["usable"]
    assert both.sum() > 125 and both[55:95].all()
    far, near = (tracks[name]["pose"][both] for name in plans)
    depth = near[:, 5] / far[:, 5]
    assert abs(depth / np.median(depth) - 1).max() < 0.02, "nothing is left of the zoom"
    assert np.degrees(np.abs((near - far)[:, :3] - np.median(near - far, 0)[:3]).max()) < 1.5
    eyes = [tracks[name]["eye"][both].mean(1) for name in plans]
    assert np.corrcoef(*eyes)[0, 1] > 0.97


def test_shots_too_short_to_learn_from_are_refused(speaker_clip: Path, tmp_path: Path) -> None:
    card = wall(tmp_path / "card.mp4", 8)
    cut = joined(tmp_path / "cut.mp4", (card, 4), (speaker_clip, 1.5), (card, 4))
    with pytest.raises(TalkheadError, match="1.[0-9] s of cut.mp4 show one person in one picture"):
        preprocess(cut, tmp_path / "home", SilentProgress())


def test_shares_of_a_film_are_of_what_is_left_of_it() -> None:
    usable = np.zeros(3000, bool)
    usable[:50] = usable[2750:] = True
    train, held = footage.split_rows(usable, 1 / 11)
    assert len(train) == 225 and len(held) == 75, "a quarter, not all of the end"
    short, same = footage.split_rows(usable, 1 / 11, train_s=4)
    assert len(short) == 100 and held.tolist() == same.tolist()


@pytest.mark.parametrize(("who", "kept"), [("left", range(20, 95)), ("right", range(106, 190))])
def test_of_two_people_in_two_shots_the_one_that_is_meant_is_followed(
    shared: Path, tmp_path: Path, who: str, kept: range
) -> None:
    """Two people, one after the other, on either side of the picture."""
    clips = shared / "clips"
    out = tmp_path / "both.mp4"
    graph = (
        "[0:v]fps=25,scale=400:400,pad=1000:400:0:0,setsar=1[a];"
        "[1:v]fps=25,scale=400:400,pad=1000:400:600:0,setsar=1[b];[a][b]concat=n=2[v]"
    )
    words = ["-loglevel", "error", "-y"]
    for name in ("alice", "carl"):
        words += ["-t", "4", "-i", str(clips / f"{name}.mp4")]
    words += ["-filter_complex", graph, "-map", "[v]", str(out)]
    subprocess.run([ffmpeg.executable(), *words], check=True)
    space = preprocess(out, tmp_path / "home", SilentProgress(), which_face=who, with_audio=False)
    assert space.load("tracks")["usable"][list(kept)].all()
    assert space.load("tracks")["usable"].sum() < 101


def test_a_real_cut_to_another_person(shared: Path, tmp_path: Path) -> None:
    space = preprocess(shared / "hard" / "cut_to_other_person.mp4", tmp_path, SilentProgress())
    about = space.manifest()
    assert about["n_cut_away"] > FPS
    tracks = space.load("tracks")
    # one person: the rigid landmarks of every usable frame fit one shape
    assert np.nanpercentile(tracks["residual_px"][tracks["usable"]], 95) < 6
