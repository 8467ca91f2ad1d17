"""Preprocess: what cannot be tracked, and what must not be replaced, ends in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from films import beginning, lavfi
from typer.testing import CliRunner, Result

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import preprocess as job
from talkhead_cli.jobs import stages
from talkhead_cli.jobs.footage import split_rows
from talkhead_cli.media import ffmpeg
from talkhead_cli.store import Run, Workspace, list_runs, priors_folder
from talkhead_cli.track.spans import in_words


def talkhead(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def error_of(result: Result) -> str:
    """The one sentence of a failed command."""
    assert "Traceback" not in result.output
    assert result.exit_code in (1, 2), result.exception
    return " ".join(result.stderr.partition("error:")[2].split())


def test_a_film_without_a_face_is_refused_and_leaves_nothing(tmp_path: Path, shared: Path) -> None:
    film = shared / "hard" / "no_face.mp4"
    with pytest.raises(TalkheadError, match=r"no face was found in no_face\.mp4; film one person"):
        job.preprocess(film, tmp_path, SilentProgress())
    assert not list(tmp_path.iterdir())


def test_a_picture_is_no_film_and_a_films_avatar_no_person(
    tmp_path: Path, speaker_clip: Path
) -> None:
    picture = tmp_path / "face.png"
    cv2.imwrite(str(picture), next(media.frames(speaker_clip)))
    with pytest.raises(TalkheadError, match="is a picture; talkhead render --image"):
        job.preprocess(picture, tmp_path / "home", SilentProgress())
    for name in ("film.mp4", "film.mkv"):
        made = tmp_path / name
        with media.VideoWriter(made, (64, 64), metadata={"talkhead_synthetic": "true"}) as film:
            film.write(np.zeros((64, 64, 3), np.uint8))
        assert media.probe(made).is_synthetic
    assert not media.probe(speaker_clip).is_synthetic


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_audio.mp4", "has no sound track; .*--no-audio"),
        ("short_0p6s.mp4", "only 0.6 s long; at least 3 s"),
        ("truncated_no_index.mp4", "cannot be read as video or sound"),
    ],
)
def test_a_useless_film_is_refused_before_any_work(
    tmp_path: Path, shared: Path, name: str, sentence: str
) -> None:
    with pytest.raises(TalkheadError, match=sentence):
        job.preprocess(shared / "hard" / name, tmp_path, SilentProgress())
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_film_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "talk.mp4").write_text("This is no film.\n" * 50)
    result = talkhead("preprocess", tmp_path / "talk.mp4", "--home", tmp_path / "home")
    assert result.exit_code == 1 and "talk.mp4" in error_of(result)
    result = talkhead("preprocess", tmp_path / "nosuch.mp4", "--home", tmp_path / "home")
    assert result.exit_code == 1 and "nosuch.mp4" in error_of(result)
    assert not (tmp_path / "home").exists()


def test_sound_alone_is_no_film(tmp_path: Path) -> None:
    media.write_wav(tmp_path / "talk.wav", 0.1 * np.ones(64_000, np.float32))
    with pytest.raises(TalkheadError, match="has no picture"):
        job.preprocess(tmp_path / "talk.wav", tmp_path / "home", SilentProgress())


def test_a_stage_that_was_begun_anew_and_killed_is_not_done(
    tmp_path: Path, speaker_clip: Path
) -> None:
    space, probe = Workspace(tmp_path, "talk"), media.probe(speaker_clip)

    def begin(value: int, options: str, kill_at: int | None = None) -> None:
        def work() -> None:
            with space.pieces("labels") as pieces:
                for frame in range(250):
                    if frame == kill_at:
                        raise KeyboardInterrupt
                    pieces.add(labels=np.full((6, 2, 2), value, np.uint8))

        part = media.Part(speaker_clip, 0, None)
        material = stages.Material(space, part, probe, SilentProgress(), {})
        stages.Stages(material).do("labels", work, options)

    begin(1, "these")
    with pytest.raises(KeyboardInterrupt):
        begin(2, "others", kill_at=150)
    begin(1, "these")
    again = Workspace(tmp_path, "talk")
    assert {int(again.labels(frame)[0, 0, 0]) for frame in (0, 99, 100, 249)} == {1}


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden"])
def test_an_id_that_could_escape_is_misuse(tmp_path: Path, speaker_clip: Path, name: str) -> None:
    home = tmp_path / "deep" / "home"
    result = talkhead("preprocess", speaker_clip, "--id", name, "--home", home)
    assert result.exit_code == 2
    assert "cannot be an id" in error_of(result) and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_another_film_of_the_same_name_is_another_identity(
    tmp_path: Path, speaker_clip: Path
) -> None:
    space = Workspace(tmp_path, "talk")
    space.note(finished=True, source={"name": "talk.mp4", "sha256": "0" * 64})
    before = space.manifest()
    with pytest.raises(TalkheadError, match=r"another 'talk'.*--id.*--fresh.*remove talk"):
        job.preprocess(speaker_clip, tmp_path, SilentProgress(), name="talk")
    assert space.manifest() == before


def test_what_stays_when_footage_is_replaced_is_named(
    home: Path, speaker_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Workspace(home, "speaker")
    yes = tmp_path / "yes.txt"
    yes.write_text("I agree")
    kept = space.keep_consent(yes)
    (space.runs / "old").mkdir(parents=True)
    (space.runs / "old" / "meta.json").write_text("{}")

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.mesh, "run", give_up)
    for name, told in (("film.mp4", ["run 'old'", kept, "(film.mp4)", "--id"]), (None, [])):
        if name is not None:
            space.note(source={"name": name, "sha256": "0" * 64})
        else:
            (space.root / "manifest.json").unlink()
        progress = SilentProgress()
        with pytest.raises(KeyboardInterrupt) as stop:
            job.preprocess(speaker_clip, home, progress, name="speaker", fresh=True)
        assert ("as it was before" in str(getattr(stop.value, "__notes__", ""))) == bool(told)
        notes = [note for note in progress.notes if "came with other footage" in note]
        assert len(notes) == bool(told) and all(word in note for word in told for note in notes)
    assert space.consents() == [kept] and (space.runs / "old").is_dir()


def test_an_identity_is_replaced_only_by_a_film_that_will_do(home: Path, tmp_path: Path) -> None:
    """Neither a film without a face, nor an interrupt, nor a kill takes what is there."""
    space = Workspace(home, "speaker")
    before = {p: p.stat().st_mtime_ns for p in space.root.rglob("*") if p.is_file()}
    empty = tmp_path / "empty.mp4"
    words = ["-f", "lavfi", "-i", "color=gray:s=320x240:r=25:d=4"]
    words += ["-f", "lavfi", "-i", "sine=d=4", "-shortest", str(empty)]
    subprocess.run([ffmpeg.executable(), "-loglevel", "error", *words], check=True)
    with pytest.raises(TalkheadError, match="no face was found in empty.mp4"):
        job.preprocess(empty, home, SilentProgress(), name="speaker", fresh=True)

    def there() -> dict[Path, int]:
        files = (p for p in space.root.rglob("*") if p.is_file() and p.name != ".lock")
        return {p: p.stat().st_mtime_ns for p in files}

    before.pop(space.root / ".lock", None)
    assert there() == before and Workspace.open(home, "speaker")
    with space.locked():
        space.set_aside()
        (space.root / "mesh.npz").write_text("half of another film's")
    with pytest.raises(TalkheadError, match="there is another 'speaker' already"):
        job.preprocess(empty, home, SilentProgress(), name="speaker")
    assert there() == before


def test_nothing_is_left_of_who_was_not_found(
    tmp_path: Path, speaker_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: object) -> None:
        raise TalkheadError("no face was found")

    film = Path(shutil.copy(speaker_clip, tmp_path / "Zoë.mp4"))
    monkeypatch.setattr(stages.mesh, "run", nobody)
    for kept in (False, True):
        space, progress = Workspace(tmp_path / "home", "Zoe"), SilentProgress()
        if kept:  # a folder that was there before is never forgotten
            space.root.mkdir()
            (space.root / "mine.txt").write_text("a letter")
            (space.root / ".part-1.mp4").write_text("half")
        with pytest.raises(TalkheadError, match="no face"):
            job.preprocess(film, tmp_path / "home", progress, fresh=kept)
        assert (space.root / "mine.txt").exists() == space.root.exists() == kept
        assert not (space.root / ".part-1.mp4").exists()
        assert "id: Zoe (--id chooses another)" in progress.notes


def test_unknown_words_are_misuse(tmp_path: Path, speaker_clip: Path) -> None:
    with pytest.raises(MisuseError, match="largest, left, right"):
        job.preprocess(speaker_clip, tmp_path, SilentProgress(), which_face="middle")
    with pytest.raises(TalkheadError, match="--consent"):
        job.preprocess(speaker_clip, tmp_path, SilentProgress(), consent=tmp_path / "no.pdf")
    assert list(tmp_path.iterdir()) == []


def test_another_part_does_not_take_the_one_that_runs_learnt_from(
    speaker_clip: Path, tmp_path: Path
) -> None:
    space = job.preprocess(speaker_clip, tmp_path, SilentProgress(), name="a", end_s=4.0)
    run = Run.named(space.runs, "mine")
    run.write_meta(finished=True)
    with pytest.raises(TalkheadError, match="run 'mine' of 'a' learnt from another part.*--id"):
        job.preprocess(speaker_clip, tmp_path, SilentProgress(), name="a", start_s=2.0)
    assert space.manifest()["n_frames"] == 100
    job.preprocess(speaker_clip, tmp_path, SilentProgress(), name="a", end_s=4.0)  # the same
    run.write_meta(footage=space.fingerprint)
    progress = SilentProgress()
    job.preprocess(speaker_clip, tmp_path, progress, name="a", end_s=4.0, fresh=True)
    assert not any("learnt" in note for note in progress.notes), "nothing has changed"
    source = space.manifest()["source"]
    del source["part"]  # as older versions wrote it
    space.note(source=source)
    with pytest.raises(TalkheadError, match="another part"):
        job.preprocess(speaker_clip, tmp_path, progress, name="a", start_s=2.0, end_s=6.0)
    job.preprocess(speaker_clip, tmp_path, progress, name="a", start_s=2.0, end_s=6.0, fresh=True)
    assert any("run 'mine' of 'a' learnt what was tracked before" in n for n in progress.notes)


def test_sound_that_is_moved_out_of_the_film_is_not_called_silent(
    speaker_clip: Path, tmp_path: Path
) -> None:
    with pytest.raises(TalkheadError, match="nothing is heard.*moved by 9 s.*--offset"):
        job.preprocess(speaker_clip, tmp_path, SilentProgress(), name="a", offset="9", end_s=4.0)


def test_one_run_or_a_prior_can_be_removed(home: Path) -> None:
    space = Workspace.open(home, "speaker")
    for name in ("one", "two"):
        Run.named(space.runs, name).write_meta(finished=True)
    prior = Run.named(priors_folder(home), "crowd")
    prior.write_meta(finished=True, method="lokitalk", people={"a": "1", "b": "2"})
    listed = talkhead("list", "--home", home).stdout.splitlines()
    assert listed[-1] == "crowd\tprior of 2 people\tlokitalk"
    told = json.loads(talkhead("list", "--json", "--home", home).stdout.splitlines()[-1])
    assert told == {"prior": "crowd", "finished": True, "method": "lokitalk", "people": ["a", "b"]}
    for words in ([], ["speaker", "--prior", "crowd"], ["--prior", "crowd", "--run", "one"]):
        assert talkhead("remove", *words, "--yes", "--home", home).exit_code == 2
    assert "known: " in error_of(talkhead("remove", "speaker", "--run", "no", "--home", home))
    assert talkhead("remove", "speaker", "--run", "one", "--yes", "--home", home).exit_code == 0
    assert [run.name for run in list_runs(space.runs)] == ["two"]
    assert talkhead("remove", "--prior", "crowd", "--yes", "--home", home).exit_code == 0
    assert not prior.root.exists() and space.video.exists()
    kept = talkhead("remove", "speaker", "--run", "two", "--home", home)  # nobody is there to ask
    assert (
        kept.exit_code == 2
        and "--yes" in error_of(kept)
        and Run.named(space.runs, "two").root.exists()
    )


def test_an_identity_that_is_worked_on_is_not_removed(home: Path) -> None:
    space = Workspace(home, "speaker")
    Run.named(space.runs, "one").write_meta(steps=3)
    with space.locked():
        for words in ([], ["--run", "one"]):
            result = talkhead("remove", "speaker", *words, "--yes", "--home", home)
            assert "working on 'speaker'" in error_of(result)
    assert space.video.exists() and Run.named(space.runs, "one").meta()["steps"] == 3
    assert talkhead("remove", "speaker", "--yes", "--home", home).exit_code == 0
    assert not space.root.exists()


@pytest.mark.parametrize("command", ["info", "remove"])
def test_an_unknown_id_is_answered_with_the_known_ones(speaker_home: Path, command: str) -> None:
    result = talkhead(command, "nobody", "--home", speaker_home)
    assert result.exit_code == 1
    assert "'nobody'" in error_of(result) and "known: speaker" in error_of(result)
    assert (speaker_home / "speaker" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("alice", "alice"),
        ("My film (2)", "My-film-2"),
        ("..hidden", "hidden"),
        ("a..b", "a.b"),
        ("Zoë!", "Zoe"),
        ("x" * 90, "x" * 64),
    ],
)
def test_an_id_is_made_of_the_files_name(stem: str, name: str) -> None:
    assert job.id_from(Path("somewhere") / f"{stem}.mp4") == name


def test_names_without_latin_letters_are_told_apart(tmp_path: Path) -> None:
    names = [job.id_from(Path(f"{stem}.mp4")) for stem in ("王芳", "李明", "Анна", "---")]
    assert len(set(names)) == 4 and all(name.startswith("person-") for name in names)
    assert job.id_from(Path("elsewhere/王芳.mov")) == names[0]
    (tmp_path / "Obama.v2").mkdir()
    assert job.id_from(tmp_path / "Obama.v2") == "Obama.v2"


def test_a_film_that_shows_hardly_any_face_is_refused(tmp_path: Path) -> None:
    space = Workspace(tmp_path, "talk")
    found = np.zeros(300, bool)
    found[41:69] = True
    points = np.zeros((300, 4, 3), np.float32)
    space.save("mesh", {"points": points, "found": found, "n_faces": np.array(1)})
    space.save("shots", {"kept": np.ones(300, bool)})
    about = media.probe(lavfi(tmp_path / "talk.mkv", "testsrc=s=64x64:d=0.2"))
    material = stages.Material(space, media.Part(Path("talk.mp4")), about, SilentProgress(), {})
    with pytest.raises(TalkheadError, match=r"only 1.1 s of talk.mp4 show a face"):
        assert material.faces


@pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
def test_no_frame_that_is_scored_shows_the_background_that_is_learnt(share: float) -> None:
    """Whatever is held out: nothing of it counts where an earlier frame shows the background."""
    rng = np.random.default_rng(0)
    usable, kept = rng.random(500) < share, np.flatnonzero(rng.random(500) < 0.9)
    early, late = stages.film._plate_frames(kept, usable)
    for holdout in (1 / 11, 0.25):
        _, held = split_rows(usable, holdout)
        assert not early & set(held.tolist())
    assert early and not early & late and max(early) < min(late, default=500)


def test_ranges_of_frames() -> None:
    flags = np.array([1, 1, 0, 0, 1, 0, 1, 1, 1], bool)
    assert in_words(flags) == "0-1, 4-4, 6-8"
    assert in_words(np.zeros(3, bool)) == ""


@pytest.fixture
def only_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the stages out that come after the choice of the crop."""
    for stage in ("film", "tracks", "labels"):
        monkeypatch.setattr(getattr(stages, stage), "run", lambda *_, **__: None)


def test_left_and_right_choose_different_faces(
    tmp_path: Path, shared: Path, only_faces: None
) -> None:
    film = beginning(shared / "hard" / "two_faces.mp4", 80, tmp_path / "two.mp4")
    middle = {}
    for side in ("left", "right"):
        progress = SilentProgress()
        space = job.preprocess(
            film, tmp_path, progress, name=side, which_face=side, with_audio=False
        )
        manifest = space.manifest()
        assert manifest["faces_seen"] == 2
        assert any(f"2 faces are in the video; following the {side}" in n for n in progress.notes)
        middle[side] = manifest["crop"]["x"] + manifest["crop"]["side"] / 2
    width = media.probe(film).width
    assert middle["left"] < width / 2 < middle["right"]


def test_frames_without_the_face_are_reported(
    tmp_path: Path, shared: Path, only_faces: None
) -> None:
    progress = SilentProgress()
    film = shared / "hard" / "face_leaves.mp4"
    space = job.preprocess(film, tmp_path, progress, with_audio=False)
    mesh = space.load("mesh")
    lost, cut_away = ~mesh["found"], ~space.load("shots")["kept"]
    assert 0 < lost.sum() < len(lost) / 2
    assert space.manifest()["n_found"] == len(lost) - lost.sum()
    notes = " ".join(progress.notes)
    for span in (in_words(lost & ~cut_away), in_words(cut_away)):
        assert span in notes


def test_silent_sound_is_refused_unless_told_otherwise(
    tmp_path: Path, shared: Path, only_faces: None
) -> None:
    film = shared / "hard" / "silent_audio.mp4"
    with pytest.raises(TalkheadError, match=r"silent_audio\.mp4 is silent; .*--no-audio"):
        job.preprocess(film, tmp_path, SilentProgress())
    space = job.preprocess(film, tmp_path, SilentProgress(), with_audio=False)
    assert space.manifest()["has_audio"] is False
    assert space.manifest()["backends"]["voice"] == "none"


def test_a_part_of_a_film_is_tracked_as_if_it_were_all(
    speaker_clip: Path, speaker_home: Path, tmp_path: Path
) -> None:
    words = ["preprocess", str(speaker_clip), "--from", "2", "--to", "6.4", "--home", str(tmp_path)]
    assert CliRunner().invoke(app, words).exit_code == 0
    part, whole = Workspace.open(tmp_path, "speaker"), Workspace.open(speaker_home, "speaker")
    about = part.manifest()
    assert about["n_frames"] == 110 and about["source"]["first_frame"] == 50
    seen, known = part.load("mesh")["points"], whole.load("mesh")["points"][50:160]
    assert np.abs(seen - known)[..., :2].mean() < 1
    heard, known = part.load("voice")["stream"], whole.load("voice")["stream"]
    np.testing.assert_allclose(heard[10:-10], known[60:150], atol=1e-4)


@pytest.mark.parametrize(
    ("option", "second"),
    [
        ("--from", "7"),
        ("--from", "-1"),
        ("--from", "9"),
        ("--from", "nan"),
        ("--to", "2"),
        ("--to", "nan"),
        ("--to", "inf"),
        ("--to", "60"),
    ],
)
def test_a_part_that_is_none_is_refused(
    speaker_clip: Path, tmp_path: Path, option: str, second: str
) -> None:
    words = ["preprocess", str(speaker_clip), option, second, "--home", str(tmp_path / "home")]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 2 and "--from and --to must lie in the 8.0 s" in said.stderr
    assert not (tmp_path / "home").exists()
