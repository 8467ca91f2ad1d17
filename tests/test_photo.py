"""Pictures as people have them, and what is said of those that will not do."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from talkhead_cli.contracts import SilentProgress, TalkheadError
from talkhead_cli.jobs import footage, photo
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.store import Workspace

PX = 64


@pytest.fixture(scope="module")
def clip(speaker_home: Path) -> Footage:
    preset = presets.load(["s3d", "tiny"], [f"data.size_px={PX}"])
    return footage.load(Workspace.open(speaker_home, "speaker"), preset.data, SilentProgress())


@pytest.fixture(scope="module")
def likeness(speaker_home: Path) -> np.ndarray:
    """One frame of the synthetic speaker, (512, 512, 3) RGB."""
    found = cv2.VideoCapture(str(Workspace(speaker_home, "speaker").video)).read()[1]
    return np.ascontiguousarray(found[..., ::-1])


def look(path: Path, **options: str) -> tuple[photo.Photo, list[str]]:
    progress = SilentProgress()
    return photo.portrait_of(path, PX, progress, **options), progress.notes


def save(path: Path, rgb: np.ndarray) -> Path:
    cv2.imwrite(str(path), rgb[..., ::-1] if rgb.ndim == 3 and rgb.shape[2] == 3 else rgb)
    return path


def test_a_photo_says_what_a_film_s_frame_says(
    likeness: np.ndarray, clip: Footage, tmp_path: Path
) -> None:
    found, _ = look(save(tmp_path / "face.png", likeness))
    signals = found.portrait.signals
    film = clip.signals[:1]
    gap = (signals.landmarks - film.landmarks)[0, 17:].norm(dim=1)
    assert float(gap.mean()) < 0.08, "face heights; depth and nod are guesses in one picture"
    assert found.portrait.pictures.shape == (1, PX, PX, 3)
    assert found.portrait.labels.shape == (1, 6, 128, 128)
    assert torch.allclose(found.portrait.labels.sum(1), torch.ones(1, 128, 128), atol=0.03)
    assert found.plate.shape == (512, 512, 3)


def test_pictures_of_all_kinds_are_one_and_the_same_face(
    likeness: np.ndarray, tmp_path: Path
) -> None:
    from PIL import Image

    plain, _ = look(save(tmp_path / "plain.png", likeness))
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(likeness)))  # as a phone stores it
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "phone.png", exif=exif)
    alpha = np.concatenate([likeness, np.full((512, 512, 1), 255, np.uint8)], 2)
    Image.fromarray(alpha).save(tmp_path / "alpha.webp", lossless=True)
    Image.fromarray(likeness).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(likeness).convert("L").save(tmp_path / "grey.jpg", quality=95)
    sixteen = cv2.cvtColor(likeness, cv2.COLOR_RGB2GRAY).astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "sixteen.png"), sixteen)
    Image.fromarray(likeness).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    big = np.pad(cv2.resize(likeness, (300, 300)), ((60, 200), (700, 500), (0, 0)), mode="edge")
    save(tmp_path / "far away.png", big)
    true = plain.portrait.signals.landmarks_2d[0]
    for name in ("phone.png", "alpha.webp", "palette.gif", "grey.jpg", "sixteen.png", "print.jpg"):
        found, _ = look(tmp_path / name)
        off = (found.portrait.signals.landmarks_2d[0] - true).norm(dim=1).mean()
        assert float(off) < 0.02, (name, float(off))
    small, notes = look(tmp_path / "far away.png")
    assert small.portrait.signals.landmarks_2d[0].min() > 0
    assert photo.read(tmp_path / "alpha.webp").shape == (512, 512, 3)


@pytest.mark.parametrize(("turns", "told"), [(1, "right"), (2, "upside down"), (3, "left")])
def test_pictures_that_lie_are_turned_upright(
    likeness: np.ndarray, tmp_path: Path, turns: int, told: str
) -> None:
    true, notes = look(save(tmp_path / "plain.png", likeness))
    assert not any("upright" in note for note in notes)
    lying = np.ascontiguousarray(np.rot90(likeness, turns))
    found, notes = look(save(tmp_path / "lying.png", lying))
    assert any("does not stand upright" in note and told in note for note in notes)
    assert torch.equal(found.portrait.pictures, true.portrait.pictures)


@pytest.mark.parametrize("tilt", [-40, 40])
def test_a_tilted_head_is_no_lying_picture(likeness: np.ndarray, tmp_path: Path, tilt: int) -> None:
    around = cv2.getRotationMatrix2D((256, 230), tilt, 0.9)
    tilted = cv2.warpAffine(likeness, around, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    found, notes = look(save(tmp_path / "tilted.png", tilted))
    assert not any("upright" in note for note in notes)
    turn = Rotation.from_rotvec(found.portrait.signals.pose[0, :3].numpy())
    assert abs(turn.as_euler("yxz", degrees=True)[2]) == pytest.approx(40, abs=8)


def test_a_face_that_is_found_only_upright_is_found_lying(
    likeness: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = photo._seen

    def upright_only(rgb: np.ndarray) -> np.ndarray | None:
        mesh = honest(rgb)
        return None if mesh is None or mesh[152, 1] < mesh[10, 1] + 20 else mesh

    monkeypatch.setattr(photo, "_seen", upright_only)
    path = save(tmp_path / "lying.png", np.ascontiguousarray(np.rot90(likeness)))
    _, notes = look(path)
    assert any("turned a quarter turn to the right" in note for note in notes)


def test_of_two_small_faces_the_chosen_one_speaks(likeness: np.ndarray, tmp_path: Path) -> None:
    wide = np.full((2700, 3600, 3), 128, np.uint8)
    for x, side in ((600, 400), (2500, 360)):
        small = cv2.resize(likeness, (side, side), interpolation=cv2.INTER_AREA)
        wide[1300 : 1300 + side, x : x + side] = small
    for which, half in (("largest", 0), ("left", 0), ("right", 1)):
        progress = SilentProgress()
        found = photo._found(wide, which)
        assert found is not None and found.n_faces == 2
        mesh, _ = photo._mesh(tmp_path / "wide.png", wide, which, progress)
        assert any(f"2 faces are in wide.png; the {which} one" in n for n in progress.notes)
        x = float(mesh[:, 0].mean()) + (wide.shape[1] - found.part.shape[1]) * half
        assert (x > 1800) == bool(half)


def test_a_small_face_in_a_large_picture_is_found(likeness: np.ndarray, tmp_path: Path) -> None:
    """The detector alone finds none of 0.04 of the picture's side."""
    wide = np.full((2700, 3600, 3), 128, np.uint8)
    wide[1300:1700, 2100:2500] = cv2.resize(likeness, (400, 400), interpolation=cv2.INTER_AREA)
    assert look(save(tmp_path / "wide.png", wide))[0].portrait is not None
    mesh, _ = photo._mesh(tmp_path / "wide.png", wide, "largest", SilentProgress())
    true, _ = photo._mesh(tmp_path / "plain.png", likeness, "largest", SilentProgress())
    off = (mesh[:, :2] - [2100, 1300]) * 512 / 400 - true[:, :2]
    assert np.linalg.norm(off, axis=1).mean() < 8, "pixels of 512"


def test_a_dark_picture_stays_dark(tmp_path: Path) -> None:
    dark = np.full((8, 8), 65_535 // 4, np.uint16)
    cv2.imwrite(str(tmp_path / "dark.png"), dark)
    assert photo.read(tmp_path / "dark.png").mean() == pytest.approx(64, abs=1)


def test_transparent_pictures_lie_on_paper(tmp_path: Path) -> None:
    from PIL import Image

    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (200, 10, 10, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = photo.read(tmp_path / "clear.png")
    assert found[0, 0].tolist() == [200, 10, 10] and found[7, 7].tolist() == [photo.PAPER] * 3


def test_of_two_faces_one_is_chosen_and_said(likeness: np.ndarray, tmp_path: Path) -> None:
    small = cv2.resize(likeness, (384, 384))
    both = np.full((512, 1024, 3), 90, np.uint8)
    both[:, :512], both[128:, 576:960] = likeness, small
    path = save(tmp_path / "both.png", both)
    largest, notes = look(path)
    assert any("2 faces" in note for note in notes)
    right, _ = look(path, which_face="right")
    assert not torch.equal(largest.portrait.pictures, right.portrait.pictures)


def test_a_face_found_in_an_enlarged_part_lies_where_it_is_in_the_whole(
    likeness: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = cv2.resize(likeness, (300, 300), interpolation=cv2.INTER_AREA)
    picture = np.full((900, 1600, 3), 128, np.uint8)
    picture[500:800, 1100:1400] = close
    path, progress = save(tmp_path / "far.png", picture), SilentProgress()
    honest, looked = photo._seen, []

    def short_sighted(rgb: np.ndarray) -> np.ndarray | None:
        looked.append(rgb.shape)
        return honest(rgb) if len(looked) > 1 else None

    monkeypatch.setattr(photo, "_seen", short_sighted)
    found, _ = photo._mesh(path, picture, "largest", progress)
    assert len(looked) == 2 and looked[1] < looked[0]
    near = honest(close)
    assert near is not None
    assert np.abs(found[:, :2].mean(0) - near[:, :2].mean(0) - [1100, 500]).max() < 3


def test_what_is_no_picture_or_shows_nobody_is_answered(tmp_path: Path) -> None:
    with pytest.raises(TalkheadError, match="there is no picture"):
        look(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(TalkheadError, match="JPEG or PNG"):
        look(tmp_path / "text.png")
    rng = np.random.default_rng(0)
    sky = (rng.random((200, 300, 3)) * 40 + 150).astype(np.uint8)
    with pytest.raises(TalkheadError, match="no face is found in sky.png"):
        look(save(tmp_path / "sky.png", sky))


def test_an_animal_is_doubtful_and_people_are_not(shared: Path) -> None:
    for path in sorted((shared / "photos").iterdir()):
        _, notes = look(path)
        assert any("may not show" in n for n in notes) == (path.stem == "not_a_person"), path.name


def test_a_head_turned_away_is_refused_and_a_half_turned_one_named() -> None:
    from scipy.spatial.transform import Rotation

    progress = SilentProgress()
    for yaw in (0, 20):
        photo._look_at_turn(
            Path("x.png"), Rotation.from_euler("y", yaw, True).as_matrix(), progress
        )
    assert not progress.notes
    photo._look_at_turn(Path("x.png"), Rotation.from_euler("y", 35, True).as_matrix(), progress)
    assert "35 degrees" in progress.notes[0]
    with pytest.raises(TalkheadError, match="turned away by 70"):
        photo._look_at_turn(
            Path("x.png"), Rotation.from_euler("y", -70, True).as_matrix(), progress
        )


def test_a_run_is_not_made_from_a_picture_by_a_method_that_wants_footage(
    likeness: np.ndarray, speaker_home: Path, tmp_path: Path
) -> None:
    from talkhead_cli.contracts import MisuseError
    from talkhead_cli.jobs.enroll import enroll

    face = save(tmp_path / "face.png", likeness)
    with pytest.raises(MisuseError, match="lokitalk learns a person from footage"):
        enroll([face], tmp_path, tmp_path, ["lokitalk"], SilentProgress())
    with pytest.raises(TalkheadError, match="talkhead pretrain -p s3d"):
        enroll([face], tmp_path, tmp_path, ["s3d"], SilentProgress())
    assert not (tmp_path / "face").exists()
