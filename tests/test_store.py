"""The store: names that cannot escape, writes that are whole or absent, damage that is named."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import ROOT
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.store import (
    Run,
    Workspace,
    check_id,
    home_folder,
    list_ids,
    list_runs,
)
from talkhead_cli.store import pictures as picture_files
from talkhead_cli.store.files import (
    atomic,
    digest,
    exclusive,
    read_arrays,
    read_json,
    sha256_of,
    write_arrays,
    write_json,
)
from talkhead_cli.store.workspace import PIECE, STAGE_FILES

Pixels = NDArray[np.uint8]


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path, "alice")
    made.mark_done("mesh", "k1")
    return made


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "lokitalk+tiny")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["../../x", "", ".", "..", "a/b", ".hidden", "a..b", "a" * 70, "/etc", "a b", "a\n", "-x", "ä"],
)
def test_an_id_that_could_escape_or_hide_is_misuse(name: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError):
        check_id(name)
    with pytest.raises(MisuseError):
        Workspace(tmp_path, name)


@pytest.mark.parametrize("name", ["alice", "A", "7", "take-2_final.v3", "a" * 64])
def test_a_plain_id_is_itself(name: str, tmp_path: Path) -> None:
    assert check_id(name) == name
    assert Workspace(tmp_path, name).root == tmp_path / name


@pytest.mark.parametrize("name", ["..", ".part", "a b", "a:b", "ä", "", "a/b", "/a"])
def test_a_run_has_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="cannot be the name"):
        Run.named(tmp_path, name)


def test_home_is_given_or_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TALKHEAD_HOME", str(tmp_path))
    assert home_folder(None) == tmp_path
    assert home_folder(Path("x")) == Path("x")
    for unset in ("", None):
        monkeypatch.delenv("TALKHEAD_HOME") if unset is None else monkeypatch.setenv(
            "TALKHEAD_HOME", unset
        )
        assert home_folder(None) == Path("avatars")


# ---------------------------------------------------------------- files


def test_a_write_that_succeeds_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic(target) as part:
        part.write_text("whole")
        assert not target.exists() and part.suffix == target.suffix
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "no")])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(error)), atomic(target) as part:
        part.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TalkheadError, match="disk is full"), atomic(tmp_path / "a.npz"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_json_and_arrays_round_trip(tmp_path: Path) -> None:
    facts = {"name": "Zoë", "n": 3, "list": [1.5, None, True]}
    write_json(tmp_path / "a.json", facts)
    assert read_json(tmp_path / "a.json") == facts
    arrays = {"x": np.arange(6).reshape(2, 3), "flag": np.array(True), "empty": np.zeros((0, 2))}
    for compress in (False, True):
        write_arrays(tmp_path / "a.npz", arrays, compress=compress)
        read = read_arrays(tmp_path / "a.npz")
        assert set(read) == set(arrays)
        for name, value in arrays.items():
            assert read[name].dtype == value.dtype
            np.testing.assert_array_equal(read[name], value)


def test_names_that_are_no_text_come_back_from_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"Ren\xe9.mp4")
    write_json(tmp_path / "a.json", {"name": name, "other": "王芳"})
    assert read_json(tmp_path / "a.json") == {"name": name, "other": "王芳"}
    assert "王芳" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_missing_files_stay_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"no json"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(TalkheadError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"no arrays", b"\x93NUMPY"])
def test_damaged_arrays_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(TalkheadError, match=r"a\.npz is damaged"):
        read_arrays(tmp_path / "a.npz")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TalkheadError, match=r"a\.npz"):
        read_arrays(tmp_path / "a.npz")


def test_hashes_tell_contents_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")  # FIPS 180-2, B.1
    assert digest("x", {"a": 1, "b": [2]}) == digest("x", {"b": [2], "a": 1})
    assert len({digest("a", "b"), digest("ab"), digest(["a", "b"]), digest("b", "a")}) == 4


# ---------------------------------------------------------------- the workspace


def test_a_workspace_opens_once_it_is_finished(tmp_path: Path) -> None:
    with pytest.raises(TalkheadError, match="no identity 'alice'.*known: none yet"):
        Workspace.open(tmp_path, "alice")
    space = Workspace(tmp_path, "alice")
    space.mark_done("mesh", "k")
    with pytest.raises(TalkheadError, match="not preprocessed to the end"):
        Workspace.open(tmp_path, "alice")
    space.note(finished=True)
    assert Workspace.open(tmp_path, "alice").root == space.root
    with pytest.raises(TalkheadError, match="known: alice"):
        Workspace.open(tmp_path, "bob")
    space.mark_undone("mesh")  # begun anew, and perhaps killed
    with pytest.raises(TalkheadError, match="not preprocessed to the end"):
        Workspace.open(tmp_path, "alice")


def test_ids_are_folders_with_a_manifest(tmp_path: Path) -> None:
    for name in ("ben", "alice"):
        Workspace(tmp_path, name).note(finished=False)
    (tmp_path / "other").mkdir()
    assert list_ids(tmp_path) == ["alice", "ben"]
    assert list_ids(tmp_path / "nowhere") == []


def test_a_stage_is_done_from_exactly_its_inputs(space: Workspace) -> None:
    space.save("mesh", {"a": np.zeros(1)})
    assert not space.is_done("mesh", "k1")  # the other of its files is not there
    space.save("shots", {"a": np.zeros(1)})
    assert space.is_done("mesh", "k1")
    assert not space.is_done("mesh", "k2") and not space.is_done("film", "k1")
    before = space.fingerprint
    space.mark_done("film", "f1")
    assert space.fingerprint != before
    assert not space.is_done("film", "f1")  # its files are not there
    for file in STAGE_FILES["film"]:
        (space.root / file).touch()
    space.note(size_px=512)
    assert space.is_done("mesh", "k1") and space.is_done("film", "f1")
    assert space.manifest()["size_px"] == 512
    assert Workspace(space.root.parent, "alice").is_done("film", "f1")


def test_fingerprint_follows_stages_only(space: Workspace) -> None:
    before = space.fingerprint
    space.note(seconds=3.0, version="9")
    assert space.fingerprint == before
    space.mark_done("mesh", "k2")
    assert space.fingerprint != before


def test_only_one_job_writes_at_a_time(space: Workspace) -> None:
    with space.locked(), pytest.raises(TalkheadError, match="another talkhead"):  # noqa: SIM117
        with Workspace(space.root.parent, "alice").locked():
            pass
    with (space.root / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TalkheadError, match="'alice'"), space.locked():
            pass
    with space.locked():  # free again, also after a failure
        pass
    with pytest.raises(ValueError), space.locked():
        raise ValueError
    with space.locked():
        pass


def test_what_killed_jobs_left_is_swept_up(space: Workspace) -> None:
    """A killed import leaves a folder; one that makes pixels leaves them to the next one."""
    for folder in ("", "consent", "labels", "cache"):
        (space.root / folder).mkdir(exist_ok=True)
        (space.root / folder / ".part-1.npz").write_text("half")
    (space.root / ".part-2").mkdir()
    (space.root / ".part-2" / "run.zip").write_text("half")
    with space.locked():
        assert [p.parent.name for p in space.root.rglob(".part-*")] == ["cache"]
    space.save_pixels("rgb", 4, (1, 4, 4, 3), iter([np.zeros((4, 4, 3), np.uint8)]))
    assert not list(space.root.rglob(".part-*"))


def test_what_somebody_writes_at_the_moment_is_not_swept_up(space: Workspace) -> None:
    """Whoever reads footage makes pixels, and waits for nobody who does so, too."""
    with atomic(space.root / "cache" / "other.npy") as part:
        space.save_pixels("rgb", 4, (1, 4, 4, 3), iter([np.zeros((4, 4, 3), np.uint8)]))
        part.write_bytes(b"whole")
    assert (space.root / "cache" / "other.npy").read_bytes() == b"whole"


def test_where_locks_cannot_be_had_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with atomic(tmp_path / "a") as part:
        part.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with (
        pytest.warns(UserWarning, match="run no second .* 'alice'"),
        exclusive(tmp_path / "l", "alice"),
    ):
        assert (tmp_path / "l").exists()


def test_files_have_the_rights_that_the_user_s_mask_leaves(tmp_path: Path) -> None:
    """Consent records and portraits are nobody else's business where the mask says so."""
    script = (
        "import os, sys; os.umask(0o077)\n"
        "from pathlib import Path\n"
        "from talkhead_cli.store.files import write_json\n"
        "write_json(Path(sys.argv[1]), {})\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.json"], check=True, cwd=ROOT)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600


def test_pixels_that_find_no_room_are_refused_in_a_sentence(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map that is written into holes of a file would end the process where the disk ends."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TalkheadError, match="the disk is full"):
        space.save_pixels("rgb", 4, (1, 4, 4, 3), iter([np.zeros((4, 4, 3), np.uint8)]))
    assert not list(space.root.rglob("*.npy"))


def test_what_is_set_aside_can_be_brought_back_but_for_runs_and_consent(
    space: Workspace, tmp_path: Path
) -> None:
    record = tmp_path / "yes.pdf"
    record.write_bytes(b"signed")
    kept = space.keep_consent(record)
    assert kept.startswith("yes-") and kept.endswith(".pdf")
    record.write_bytes(b"signed again")
    assert space.keep_consent(record) != kept and len(space.consents()) == 2
    Run(space.runs / "lokitalk").write_meta(finished=True)
    space.save("tracks", {"a": np.zeros(2)})
    with space.pieces("labels") as labels:
        labels.add(labels=np.zeros(2, np.uint8))
    before = sorted(p.relative_to(space.root) for p in space.root.rglob("*"))
    with space.locked():
        space.set_aside()
        (space.root / "maps").mkdir()
        (space.root / "tracks.npz").write_bytes(b"of another film")
        space.bring_back()
        left = {p.relative_to(space.root) for p in space.root.rglob("*")}
        assert sorted(left - {Path(".lock")}) == before
        assert len(space.load("tracks")["a"]) == 2
        space.set_aside()
        space.forget_aside()
        space.bring_back()  # of which nothing is left
    assert sorted(p.name for p in space.root.iterdir()) == [".lock", "consent", "runs"]
    assert (space.root / "consent" / kept).read_bytes() == b"signed"
    assert [r.name for r in list_runs(space.runs)] == ["lokitalk"]
    assert not space.is_done("mesh", "k1")


@pytest.mark.parametrize("at", range(1, 12))
def test_whatever_interrupts_a_replacement_nothing_is_lost(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed at any of its renames and deletions, each of them once."""
    for name in ("a", "b", "c"):
        (space.root / name).mkdir()
        (space.root / name / "old").write_text(name)
    before = sorted(p.relative_to(space.root) for p in space.root.rglob("*"))
    n_left = at

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def work(*given: Any, **options: Any) -> Any:
            nonlocal n_left
            n_left -= 1
            if n_left == 0:
                raise KeyboardInterrupt
            return act(*given, **options)

        return work

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            space.set_aside()
            (space.root / "a").mkdir()
            (space.root / "a" / "new").write_text("half")
            space.bring_back()
    space.bring_back()
    assert sorted(p.relative_to(space.root) for p in space.root.rglob("*")) == before


def test_a_replacement_that_is_kept_is_kept_whatever_interrupts_it(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (space.root / "a").mkdir()
    space.set_aside()
    (space.root / "b").write_text("new")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", stopped)
        space.forget_aside()
    with space.locked():
        space.bring_back()
        assert sorted(p.name for p in space.root.iterdir()) == [".lock", "b"]


def test_removing_leaves_the_neighbours(space: Workspace, tmp_path: Path) -> None:
    Workspace(tmp_path, "ben").note(finished=True)
    space.remove()
    assert list_ids(tmp_path) == ["ben"]
    elsewhere = tmp_path / "disk" / "carl"
    Workspace(tmp_path / "disk", "carl").note(finished=True)
    (tmp_path / "carl").symlink_to(elsewhere)
    Workspace(tmp_path, "carl").remove()
    assert list_ids(tmp_path) == ["ben"] and not elsewhere.exists()
    assert not (tmp_path / "carl").is_symlink(), "or nobody could be called so again"


def test_missing_and_damaged_arrays_of_a_workspace_are_named(space: Workspace) -> None:
    with pytest.raises(TalkheadError, match=r"tracks\.npz is missing; run preprocess for 'alice'"):
        space.load("tracks")
    space.save("tracks", {"mesh_px": np.zeros(1)})
    with pytest.raises(TalkheadError, match="'alice' was preprocessed by an older version"):
        space.load("tracks")
    (space.root / "tracks.npz").write_bytes(b"not arrays")
    with pytest.raises(TalkheadError, match=r"tracks\.npz is damaged"):
        space.load("tracks")
    (space.root / "manifest.json").write_text("{")
    with pytest.raises(TalkheadError, match=r"manifest\.json is damaged"):
        space.manifest()


def test_pieces_give_each_frame_its_own_row(space: Workspace) -> None:
    n = PIECE + 7
    value = np.arange(n, dtype=np.uint16)
    with space.pieces("maps") as maps:
        for row in value:
            maps.add(matte=row, skin=2 * row)
    assert len(list((space.root / "maps").iterdir())) == 2
    for frame in (0, PIECE - 1, PIECE, n - 1, 3):  # back and forth over the seam
        arrays = space.piece("maps", frame)
        assert arrays["matte"] == frame and arrays["skin"] == 2 * frame
    with pytest.raises(TalkheadError, match=f"maps of frame {2 * PIECE} are missing"):
        space.piece("maps", 2 * PIECE)
    with pytest.raises(TalkheadError, match="labels of frame 0"):
        space.labels(0)


# ---------------------------------------------------------------- the pixel cache


def pictures(n: int) -> Iterator[Pixels]:
    for i in range(n):
        yield np.full((4, 4, 3), i, np.uint8)


def test_pixels_are_kept_until_a_stage_changes(space: Workspace) -> None:
    assert space.pixels("rgb", 4) is None
    made = space.save_pixels("rgb", 4, (5, 4, 4, 3), pictures(5))
    cached = space.pixels("rgb", 4)
    assert cached is not None and isinstance(cached, np.memmap)
    np.testing.assert_array_equal(cached, made)
    np.testing.assert_array_equal(cached[:, 0, 0, 0], np.arange(5))
    assert space.pixels("rgb", 8) is None and space.pixels("labels", 4) is None
    space.note(finished=True)
    assert space.pixels("rgb", 4) is not None
    space.mark_done("film", "other")
    assert space.pixels("rgb", 4) is None


def test_pixels_of_footage_that_is_replaced_meanwhile_are_not_its_own(space: Workspace) -> None:
    def rows() -> Iterator[Pixels]:
        yield from pictures(1)
        space.mark_done("film", "other")

    space.save_pixels("rgb", 4, (1, 4, 4, 3), rows())
    assert space.pixels("rgb", 4) is None


def test_pixels_whose_key_was_not_written_are_nobody_s(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    space.mark_done("film", "one")
    space.save_pixels("rgb", 4, (1, 4, 4, 3), pictures(1))
    space.mark_done("film", "two")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_text", killed)
        space.save_pixels("rgb", 4, (1, 4, 4, 3), (2 + picture for picture in pictures(1)))
    space.mark_done("film", "one")  # again, whose key was there
    assert space.pixels("rgb", 4) is None


def test_too_few_pictures_are_refused_and_nothing_is_kept(space: Workspace) -> None:
    with pytest.raises(TalkheadError, match="holds 3 of 5 frames"):
        space.save_pixels("rgb", 4, (5, 4, 4, 3), pictures(3))
    assert space.pixels("rgb", 4) is None
    assert list((space.root / "cache").iterdir()) == []


def test_an_interrupted_cache_leaves_nothing(space: Workspace) -> None:
    def broken() -> Iterator[Pixels]:
        yield from pictures(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        space.save_pixels("rgb", 4, (5, 4, 4, 3), broken())
    assert list((space.root / "cache").iterdir()) == []


# ---------------------------------------------------------------- runs


def test_weights_come_back_as_they_were(run: Run) -> None:
    grid = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "a.weight": torch.nn.Parameter(torch.randn(3, 2)),
        "strided": grid.transpose(0, 2),
        "half": torch.ones(2, dtype=torch.float16),
        "mask": torch.tensor([True, False]),
        "n": torch.tensor(7),
    }
    run.save_weights(tensors)
    read = run.weights()
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
        assert not read[name].requires_grad


def test_missing_and_damaged_weights_are_named(run: Run) -> None:
    with pytest.raises(TalkheadError, match="has no weights"):
        run.weights()
    run.save_weights({"a": torch.zeros(1000)})
    whole = (run.root / "avatar.safetensors").read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2], b"\xff" * 64):
        (run.root / "avatar.safetensors").write_bytes(content)
        with pytest.raises(TalkheadError, match="damaged.*--fresh"):
            run.weights()


def test_a_damaged_run_stands_last_and_hides_no_other(tmp_path: Path) -> None:
    for name, at in (("old", 1.0), ("new", 2.0)):
        Run(tmp_path / name).write_meta(finished=True, finished_at=at)
    damaged = Run(tmp_path / "damaged")
    damaged.write_meta(finished=True, finished_at=3.0)
    (damaged.root / "meta.json").write_text('{"finished": tr')
    found = list_runs(tmp_path)
    assert [(run.name, run.is_finished) for run in found] == [
        ("new", True),
        ("old", True),
        ("damaged", False),
    ]
    with pytest.raises(TalkheadError, match=r"meta.json is damaged"):
        damaged.meta()


def test_resume_state_comes_back(run: Run) -> None:
    assert run.resume_state() is None
    state: dict[str, Any] = {"step": 3, "weights": {"a": torch.ones(2)}, "rates": [0.1, 0.2]}
    run.save_resume(state)
    read = run.resume_state()
    assert read is not None and read["step"] == 3 and read["rates"] == [0.1, 0.2]
    assert torch.equal(read["weights"]["a"], torch.ones(2))


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_resume_state_runs_no_code(run: Run, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    run.root.mkdir(parents=True)
    torch.save({"step": Evil(marker)}, run.root / "optim.pt")
    with pytest.raises(TalkheadError, match="damaged"):
        run.resume_state()
    assert not marker.exists()
    (run.root / "optim.pt").write_bytes(b"torn")
    with pytest.raises(TalkheadError, match="damaged"):
        run.resume_state()


def test_meta_and_preset_and_drive_of_a_run(run: Run) -> None:
    assert run.meta() == {} and not run.is_finished and run.preset_text() is None
    run.write_meta(steps=5)
    run.write_meta(finished=True)
    assert run.meta() == {"steps": 5, "finished": True} and run.is_finished
    run.write_preset("method: lokitalk\n")
    assert run.preset_text() == "method: lokitalk\n"
    run.save_drive({"pose": np.eye(6)})
    np.testing.assert_array_equal(run.drive()["pose"], np.eye(6))
    assert json.loads(run.write_figures({"psnr": 30.0}).read_text()) == {"psnr": 30.0}
    run.clear()
    assert not run.root.exists()
    run.clear()  # twice does no harm


@pytest.mark.parametrize("content", ["5", "[]", '"finished"', "{"])
def test_a_damaged_run_is_listed_as_unfinished_and_named_when_opened(
    run: Run, content: str
) -> None:
    run.write_meta(finished=True)
    (run.root / "meta.json").write_text(content)
    assert [r.name for r in list_runs(run.root.parent)] == [run.name] and not run.is_finished
    with pytest.raises(TalkheadError, match="meta.json is damaged"):
        run.meta()


def test_pictures_are_written_whole_and_say_what_made_them(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    path = tmp_path / "new" / "picture.png"
    picture_files.write_png(path, rgb, software="a test")
    np.testing.assert_array_equal(picture_files.read_picture(path, cure="-"), rgb)
    assert picture_files.software_of(path) == "a test"
    picture_files.write_png(path, rgb)
    assert picture_files.software_of(path) == "" and list(path.parent.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:60])
    assert picture_files.software_of(path) == "" == picture_files.software_of(tmp_path / "none.png")
    for missing in (path, tmp_path / "none.png"):
        with pytest.raises(TalkheadError, match="missing or damaged; draw it again"):
            picture_files.read_picture(missing, cure="draw it again")


def test_a_disk_that_fills_up_in_a_picture_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PIL.Image.Image, "save", full)
    with pytest.raises(TalkheadError, match="disk is full while writing plate.png"):
        picture_files.write_png(tmp_path / "plate.png", np.zeros((4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_runs_are_listed_newest_finished_first(tmp_path: Path) -> None:
    facts: dict[str, dict[str, Any]] = {
        "old": {"finished": True, "finished_at": 1.0},
        "new": {"finished": True, "finished_at": 3.0},
        "middle": {"finished": True, "finished_at": 2.0},
        "stopped": {"steps": 9},
    }
    for name, meta in facts.items():
        Run(tmp_path / name).write_meta(**meta)
    Run(tmp_path / "my run").write_meta(finished=True)  # a name that no command takes
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert [r.name for r in list_runs(tmp_path)] == ["new", "middle", "old", "stopped"]
    assert list_runs(tmp_path / "nowhere") == []
