"""The store: names that cannot escape, writes that are whole or absent, damage that is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.store import (
    Run,
    Workspace,
    check_id,
    home_folder,
)
from talkhead_cli.store.files import (
    atomic,
    digest,
    read_arrays,
    read_json,
    sha256_of,
    write_arrays,
    write_json,
)

Pixels = NDArray[np.uint8]


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
