"""Cuts are found where they are, and what shows another picture is left out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from talkhead_cli.contracts import FPS, SilentProgress, TalkheadError
from talkhead_cli.jobs import footage
from talkhead_cli.jobs.preprocess import preprocess
from talkhead_cli.jobs.preset import Data
from talkhead_cli.media import ffmpeg
from talkhead_cli.track.face import CHIN, N_MESH, TOP
from talkhead_cli.track.shots import CutFinder, Shots, thumb

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


HERE, THERE = face_at(60, 20), face_at(100, 20)


def test_an_uncut_film_is_kept_whole() -> None:
    shots = film((ROOM, 120, HERE))
    assert shots.edges() == [(0, 120)] and shots.kept().all() and len(shots.kept()) == 120


@pytest.mark.parametrize("other", [0.0, 255.0])
def test_fades_are_told_from_exposure(other: float) -> None:
    """From black or white and back is a fade; a tenth more or less light is none."""
    ramp = [ROOM * k + other * (1 - k) for k in np.linspace(0, 1, 20)]
    fades = film(*((picture, 1, HERE) for picture in ramp), (ROOM, 80, HERE),
                 *((picture, 1, HERE) for picture in ramp[::-1]))  # fmt: skip
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
    kept = shots.kept()
    assert not kept[59:111].any() and kept[:59].all() and kept[111:].all()


def test_a_jump_cut_leaves_out_only_what_trackers_smear() -> None:
    """The same room and face, but everything has moved a little, and the light as well."""
    moved = np.roll(ROOM, 40, 1)
    patch = ROOM.copy()
    patch[4:68, 32:96] = moved[4:68, 32:96] + 40
    shots = film((ROOM, 60, HERE), (patch, 50, face_at(66, 22)))
    assert shots.edges() == [(0, 60), (60, 110)]
    assert np.flatnonzero(~shots.kept()).tolist() == [59, 60]


def test_the_shot_with_most_of_the_face_is_the_one() -> None:
    shots = film((STREET, 90, None), (ROOM, 40, HERE))
    assert np.flatnonzero(shots.kept()).tolist() == list(range(91, 130))


def test_whose_face_is_meant_decides() -> None:
    shots = film((ROOM, 60, HERE), (STREET, 40, THERE))
    assert shots.kept()[:59].all() and not shots.kept()[60:].any()
    assert shots.kept([70, 82, 94])[61:].all() and not shots.kept([70, 82, 94])[:60].any()


def test_a_nearer_camera_is_another_picture() -> None:
    nearer = face_at(60, 15, 45)
    shots = film((ROOM, 60, HERE), (np.roll(ROOM, 64, 1), 20, None), (ROOM, 30, nearer))
    assert not shots.kept()[60:].any()


def test_motion_and_fades_are_no_cuts() -> None:
    begins = CutFinder()
    pan = [np.roll(ROOM, i, 1) for i in range(60)]
    assert not any(begins(thumb(p.astype(np.uint8))) for p in pan)
    fade = CutFinder()
    steps = [(1 - s) * ROOM + s * STREET for s in np.linspace(0, 1, 25)]
    assert not any(fade(thumb(p.astype(np.uint8))) for p in steps)


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
    assert len(clip.held) == footage.split(usable[-1] + 1 - usable[0], Data().holdout)
    assert clip.held[0] == clip.train[-1] + 1
    # the plate shows the speaker's background, not the card's
    alone = preprocess(speaker_clip, tmp_path / "home", SilentProgress(), name="alone")
    plates = [footage.read_plate(s.plate_file, 64) for s in (space, alone)]
    assert (plates[0] - plates[1]).abs().mean() < 0.05


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
