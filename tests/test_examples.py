"""The examples do what they show; and how methods of one's own come in."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, n_frames_in
from typer.testing import CliRunner, Result

from talkhead_cli import avatars, media
from talkhead_cli.avatars.lokitalk import LokiTalk
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import footage, views
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.jobs.scores import psnr
from talkhead_cli.store import Workspace

FIFTH, PRESET = ROOT / "examples" / "fifth_method.py", ROOT / "examples" / "fifth_method.yaml"
SMALL = [
    "data.size_px=64",
    "march.resolution=32",
    "train.stages.speech.steps=60",
    "train.stages.shape.steps=140",
    "train.stages.detail.steps=80",
    "train.stages.shape.n_points=6000",
    "train.stages.detail.n_points=6000",
]


def talkhead(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def settings(*keys: str) -> list[str]:
    return [word for key in keys for word in ("-s", key)]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import formant_voice

    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    media.write_wav(path, formant_voice.speak(2.0, seed=7).sound)
    return path


@pytest.fixture(scope="module")
def trained(speaker_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose speaker the fifth method learnt, by the command line."""
    import fifth_method

    assert avatars.avatar_class("fifth") is fifth_method.Fifth
    home = Path(shutil.copytree(speaker_home, tmp_path_factory.mktemp("fifth") / "home"))
    made = talkhead("finetune", "--id", "speaker", "-p", PRESET, *settings(*SMALL), "--home", home)
    assert made.exit_code == 0, made.stderr
    assert made.stdout.split() == [str(home / "speaker/runs/fifth_method")]
    return home


# -- the fifth method --------------------------------------------------------------------------


def test_a_method_of_one_s_own_takes_under_eighty_lines() -> None:
    lines = FIFTH.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80 and max(map(len, lines)) <= 100


def test_its_pictures_are_nearer_to_held_out_frames_than_the_background_is(trained: Path) -> None:
    space = Workspace.open(trained, "speaker")
    run = pick_run(space, "fifth_method", SilentProgress())
    player = Player.load(run, torch.device("cpu"))
    clip = footage.load(space, player.preset.data, SilentProgress())
    held = clip.held[::12]
    pictures = [frame.rgb[0].numpy() for frame, _ in player.pictures(clip.signals[held])]
    truth = clip.pictures[held.numpy()].astype(np.float32) / 255
    drawn = np.mean([psnr(a, b) for a, b in zip(truth, pictures, strict=True)])
    empty = np.mean([psnr(a, player.plate.numpy()) for a in truth])
    assert drawn > empty + 10


def test_landmarks_of_the_mouth_move_the_picture_there(trained: Path) -> None:
    space = Workspace.open(trained, "speaker")
    player = Player.load(pick_run(space, "fifth_method", SilentProgress()), torch.device("cpu"))
    clip = footage.load(space, player.preset.data, SilentProgress())
    row = clip.signals[clip.train[:1]]
    shut, wide = (
        frame.rgb[0] for frame, _ in player.pictures(views.opening_mouths(player.avatar, row, 2))
    )
    change = (wide - shut).abs().mean(-1)
    x, y = (64 * row.landmarks_2d[0, 48:68].mean(0)).long().tolist()
    assert change[y - 4 : y + 8, x - 6 : x + 6].mean() > 5 * change[:16].mean() + 0.01


def test_it_films_new_speech_by_the_command_line(
    trained: Path, speech: Path, tmp_path: Path
) -> None:
    out = tmp_path / "film.mp4"
    words = ["render", "--id", "speaker", "--run", "fifth_method", "--audio", speech]
    made = talkhead(*words, "-o", out, "--home", trained)
    assert made.exit_code == 0, made.stderr
    assert n_frames_in(out) == 50 and media.probe(out).has_audio
    frames = np.stack(list(media.frames(out))).astype(int)
    assert frames.shape[1:] == (64, 64, 3) and np.abs(np.diff(frames, axis=0)).max() > 10


def test_a_run_whose_method_is_not_known_here_is_refused(
    trained: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avatars, "_registered", {})
    words = ["render", "--id", "speaker", "--audio", speech, "-o", tmp_path / "film.mp4"]
    refused = talkhead(*words, "--home", trained)
    assert refused.exit_code == 2 and "unknown method 'fifth'; known: landmark" in refused.stderr


# -- how methods come in -----------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, and nothing registered."""
    monkeypatch.setattr(avatars, "_registered", {})
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def install(packages: Path, name: str, code: str, *points: str) -> Path:
    """A package of one module `name`; a file that exists once the module was imported."""
    marker = packages / f"{name}.imported"
    text = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n{code}\n"
    (packages / f"{name}.py").write_text(text)
    if points:
        info = packages / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[talkhead.methods]", *points, ""]))
    return marker


def test_an_installed_package_s_method_is_known_and_loaded_when_it_is_asked_for(
    packages: Path,
) -> None:
    code = "from talkhead_cli.avatars.base import Avatar\nclass Sixth(Avatar): pass"
    marker = install(packages, "sixth_package", code, "sixth = sixth_package:Sixth")
    assert avatars.method_names() == sorted([*avatars.METHODS, "sixth"])
    assert avatars.avatar_class("lokitalk") is LokiTalk and not marker.exists()
    assert avatars.avatar_class("sixth") is sys.modules["sixth_package"].Sixth


def test_a_package_s_method_that_cannot_be_had_is_refused(packages: Path) -> None:
    install(packages, "broken_package", "1 / 0", "broken = broken_package:Broken")
    install(packages, "odd_package", "Odd = 3", "odd = odd_package:Odd", "lost = odd_package:Lost")
    for number in "12":
        install(packages, f"twin{number}_package", "", f"twin = twin{number}_package:Twin")
    for method, said in {
        "broken": "broken_package:Broken .division by zero",
        "odd": "no class of avatars: 3",
        "lost": "cannot be loaded from odd_package:Lost",
        "twin": "several methods 'twin': twin1_package:Twin, twin2_package:Twin",
    }.items():
        with pytest.raises(TalkheadError, match=said):
            avatars.avatar_class(method)


@pytest.mark.parametrize(
    "method",
    ["evil", "evil:Evil", "evil.Evil", "../evil", "talkhead_cli.avatars.evil", "base", "personal"],
)
def test_a_preset_cannot_name_a_module(packages: Path, home: Path, method: str) -> None:
    marker = install(packages, "evil", "from talkhead_cli.avatars.lokitalk import LokiTalk as Evil")
    preset = packages / "mine.yaml"
    text = PRESET.read_text().replace("method: fifth", f'method: "{method}"')
    stages = text[text.index("train:") :].removeprefix("train:")
    preset.write_text(f"{text}\npretrain:{stages}")
    for job in (["finetune", "--id", "speaker"], ["pretrain", "--ids", "speaker,speaker"]):
        refused = talkhead(*job, "-p", preset, "--home", home)
        assert refused.exit_code == 2 and not marker.exists()
        assert f"unknown method '{method}'; known: landmark, lokitalk, s3d" in refused.stderr
    assert not (home / "speaker/runs/mine").exists()


@pytest.mark.parametrize("name", ["lokitalk", "expert"])
def test_talkhead_s_own_methods_stay_its_own(packages: Path, name: str) -> None:
    install(packages, "thief_package", "Thief = 3", f"{name} = thief_package:Thief")
    before = avatars.avatar_class(name)
    with pytest.raises(MisuseError, match=f"'{name}' is a method of talkhead"):
        avatars.register(name, LokiTalk)
    assert avatars.avatar_class(name) is before
    assert avatars.method_names() == sorted(avatars.METHODS)


def test_what_is_registered_has_a_plain_name_and_is_an_avatar(packages: Path) -> None:
    for name in ("", "Fifth", "a/b", "a:b", "../a", "5th"):
        with pytest.raises(MisuseError, match="cannot be the name of a method"):
            avatars.register(name, LokiTalk)
    with pytest.raises(TalkheadError, match="no class of avatars"):
        avatars.register("mine", torch.nn.Linear)
    avatars.register("mine", LokiTalk)
    assert avatars.avatar_class("mine") is LokiTalk and "mine" in avatars.method_names()


# -- the pipeline ------------------------------------------------------------------------------


def test_the_quickstart_s_pipeline_makes_a_film_and_figures(
    trained: Path, speaker_clip: Path, speech: Path, tmp_path: Path
) -> None:
    """Of a home where the slow jobs find their work done."""
    import quickstart

    shutil.copytree(trained, tmp_path / "avatars")
    film, figures = quickstart.pipeline(
        speaker_clip, speech, tmp_path, SilentProgress(), preset_names=[str(PRESET)], settings=SMALL
    )
    assert film == tmp_path / "speaker-says.mp4" and n_frames_in(film) == 50
    assert figures["run"] == "fifth_method" and figures["picture"]["full"]["psnr_db"] > 18
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) < 50
