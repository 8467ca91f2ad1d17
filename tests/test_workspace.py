"""An identity's folder: what is done, replaced and removed, and pixels kept at a training size."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray

from talkhead_cli.contracts import TalkheadError
from talkhead_cli.store import (
    Run,
    Workspace,
    list_ids,
    list_runs,
)
from talkhead_cli.store.files import (
    atomic,
    exclusive,
)
from talkhead_cli.store.workspace import PIECE, STAGE_FILES

Pixels = NDArray[np.uint8]


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path, "alice")
    made.mark_done("mesh", "k1")
    return made


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
    (space.root / "out.mp4").write_bytes(b"somebody's render")
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
    assert sorted(p.name for p in space.root.iterdir()) == [".lock", "consent", "out.mp4", "runs"]
    assert (space.root / "consent" / kept).read_bytes() == b"signed"
    assert [r.name for r in list_runs(space.runs)] == ["lokitalk"]
    assert not space.is_done("mesh", "k1")


@pytest.mark.parametrize("at", range(1, 12))
def test_whatever_interrupts_a_replacement_nothing_is_lost(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed at any of its renames and deletions, each of them once."""
    for name in ("maps", "labels", "cache"):
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
            (space.root / "maps").mkdir()
            (space.root / "maps" / "new").write_text("half")
            space.bring_back()
    space.bring_back()
    assert sorted(p.relative_to(space.root) for p in space.root.rglob("*")) == before


def test_a_replacement_that_is_kept_is_kept_whatever_interrupts_it(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (space.root / "maps").mkdir()
    space.set_aside()
    (space.root / "mesh.npz").write_text("new")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", stopped)
        space.forget_aside()
    with space.locked():
        space.bring_back()
        assert sorted(p.name for p in space.root.iterdir()) == [".lock", "mesh.npz"]


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
