"""Preprocess: hard films end in one sentence, a killed job is finished by the same command."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import n_frames_in
from typer.testing import CliRunner, Result

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import preprocess as job
from talkhead_cli.jobs import stages
from talkhead_cli.jobs.footage import split_rows
from talkhead_cli.media import ffmpeg
from talkhead_cli.store import Run, Workspace, list_runs, priors_folder
from talkhead_cli.track import face, matte
from talkhead_cli.track.scout import Scene
from talkhead_cli.track.spans import in_words

STAGES = ["mesh", "sound", "film", "tracks", "labels"]


def talkhead(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def error_of(result: Result) -> str:
    """The one sentence of a failed command."""
    assert "Traceback" not in result.output
    assert result.exit_code in (1, 2), result.exception
    return " ".join(result.stderr.partition("error:")[2].split())


# ---------------------------------------------------------------- what cannot be tracked


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
        with pytest.raises(KeyboardInterrupt):
            job.preprocess(speaker_clip, home, progress, name="speaker", fresh=True)
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
    about = media.Probe(64, 64, 12.0, False, 25, True, True, 0, "", 0.0, 0.0, False, True, False)
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


# ---------------------------------------------------------------- hard films


@pytest.fixture
def only_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the stages out that come after the choice of the crop."""
    for stage in ("film", "tracks", "labels"):
        monkeypatch.setattr(getattr(stages, stage), "run", lambda *_, **__: None)


def beginning(film: Path, n_frames: int, out: Path, sound: Path | None = None) -> Path:
    """The first frames of a film, with another sound."""
    about = media.probe(film)
    size = (about.width, about.height)
    with media.VideoWriter(out, size, audio=sound, preset="ultrafast") as writer:
        for frame in media.frames(film, n_frames=n_frames):
            writer.write(frame)
    return out


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


# ---------------------------------------------------------------- stages


class KnownMesh:
    """Stands in for the face mesh with what it once found in the speaker's film."""

    points: Any

    def __init__(self) -> None:
        self.index = -1

    def __enter__(self) -> KnownMesh:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, _rgb: object) -> Any:
        self.index += 1
        return self.points[self.index]


@pytest.fixture
def short(
    tmp_path: Path, speaker_clip: Path, speaker_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The speaker's first 3.2 s, in which her face need not be looked for."""
    KnownMesh.points = Workspace(speaker_home, "speaker").load("mesh")["points"]
    monkeypatch.setattr(face, "FaceMesh", KnownMesh)
    monkeypatch.setattr(stages.mesh, "scout", lambda _frames, size, *_: Scene(1, (0, 0, *size)))
    crop_to(64, monkeypatch)
    return beginning(speaker_clip, 80, tmp_path / "short.mp4", speaker_clip)


def track(film: Path, home: Path, **options: Any) -> Workspace:
    return job.preprocess(film, home, SilentProgress(), **options)


def files(space: Workspace) -> dict[str, int]:
    """When each file was written; the manifest is looked at by its content."""
    return {
        str(p.relative_to(space.root)): p.stat().st_mtime_ns
        for p in space.root.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", ".lock")
    }


def arrays(space: Workspace) -> dict[str, Any]:
    names = ("mesh", "voice", "film", "tracks")
    out = {f"{n}.{key}": value for n in names for key, value in space.load(n).items()}
    n_frames = space.manifest()["n_frames"]
    return out | {"labels": np.stack([space.labels(i) for i in range(n_frames)])}


def crop_to(size_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stages.film, stages.material, stages.order, stages.tracks):
        monkeypatch.setattr(module, "FILM_PX", size_px)


def crash(*_: object, **__: object) -> None:
    raise RuntimeError("power cut")


def test_what_a_crash_left_is_finished_by_the_same_command(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    done: dict[str, int] = {}
    for stage in STAGES:  # each time, one stage further
        with monkeypatch.context() as patched:
            patched.setattr(getattr(stages, stage), "run", crash)
            with pytest.raises(RuntimeError):
                track(short, home)
        with pytest.raises(TalkheadError, match="not preprocessed to the end|no identity"):
            Workspace.open(home, "short")
        space = Workspace(home, "short")
        assert list(space.manifest()["stages"]) == STAGES[: STAGES.index(stage)]
        assert done.items() <= files(space).items()  # nothing was made twice
        done = files(space)
    resumed = track(short, home)
    assert Workspace.open(home, "short").manifest()["n_frames"] == 80
    whole = arrays(track(short, tmp_path / "other"))
    for name, value in arrays(resumed).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_a_film_that_is_half_written_is_not_there(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(matte.Segmenter):
        n_frames = 0

        def __call__(self, rgb: Any) -> Any:
            self.n_frames += 1
            if self.n_frames == 40:
                raise KeyboardInterrupt
            return super().__call__(rgb)

    home = tmp_path / "home"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(matte, "Segmenter", Dying)
        track(short, home)
    space = Workspace(home, "short")
    assert not space.video.exists()
    assert [p for p in space.root.rglob(".part-*")] == []
    assert n_frames_in(track(short, home).video) == 80


def test_another_size_redoes_the_film_and_keeps_the_faces(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = track(short, tmp_path / "home")
    before, mesh = files(space), space.load("mesh")["points"]
    crop_to(96, monkeypatch)
    track(short, tmp_path / "home")
    after = files(space)
    same = {name for name in before if before[name] == after[name]}
    assert {"mesh.npz", "voice.npz", "audio.wav"} <= same
    assert not same & {"video.mp4", "tracks.npz", "plate.png"}
    assert space.manifest()["size_px"] == media.probe(space.video).width == 96
    np.testing.assert_array_equal(space.load("mesh")["points"], mesh)


# ---------------------------------------------------------------- once more


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture or sound can be looked at."""
    for stage in STAGES:
        monkeypatch.setattr(getattr(stages, stage), "run", crash)


def test_the_same_command_again_does_nothing(home: Path, speaker_clip: Path, idle: None) -> None:
    space = Workspace(home, "speaker")
    before, manifest = files(space), space.manifest()
    again = talkhead("preprocess", speaker_clip, "--id", "speaker", "--home", home)
    assert again.exit_code == 0, again.output
    assert again.stdout.split() == [str(space.root)]
    assert files(space) == before
    assert space.manifest() == manifest  # also the seconds that it took


def test_json_says_what_is_known(home: Path, speaker_clip: Path, idle: None) -> None:
    words = ["preprocess", speaker_clip, "--id", "speaker", "--home", home, "--json"]
    said = json.loads(talkhead(*words).stdout)
    assert said["paths"] == [str(home / "speaker")]
    assert said["manifest"] == Workspace(home, "speaker").manifest()
    assert json.loads(talkhead("info", "speaker", "--home", home).stdout)["n_frames"] == 200


def test_consent_is_kept(home: Path, speaker_clip: Path, tmp_path: Path, idle: None) -> None:
    words = ["preprocess", speaker_clip, "--id", "speaker", "--home", home]
    for name in ("yes.txt", "also.txt"):
        (tmp_path / name).write_text(f"I agree ({name})")
        assert talkhead(*words, "--consent", tmp_path / name).exit_code == 0
    assert talkhead(*words).exit_code == 0
    space = Workspace(home, "speaker")
    also, yes = space.manifest()["consent"]
    assert also.startswith("also-") and yes.startswith("yes-") and yes.endswith(".txt")
    assert (space.root / "consent" / yes).read_text() == "I agree (yes.txt)"


def test_two_jobs_do_not_write_at_once(home: Path, speaker_clip: Path, idle: None) -> None:
    with Workspace(home, "speaker").locked():
        result = talkhead("preprocess", speaker_clip, "--id", "speaker", "--home", home)
    assert result.exit_code == 1 and "another talkhead" in error_of(result)


# ---------------------------------------------------------------- parts


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
