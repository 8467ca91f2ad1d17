"""Avatars that travel in one file; parcels that are damaged or mean harm are refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.store import Run, Workspace
from talkhead_cli.store.parcel import RUN_FILES, pack, unpack


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """An identity with a run; contents matter to nobody here."""
    made = Workspace(tmp_path / "home", "alice")
    run = Run(made.runs / "lokitalk+tiny")
    run.root.mkdir(parents=True)
    for name in RUN_FILES:
        (run.root / name).write_bytes(np.random.default_rng(0).bytes(500) + name.encode())
    (run.root / "meta.json").write_text('{"finished": true}')
    (run.root / "optim.pt").write_text("stays here")
    (made.root / "video.mp4").write_text("stays here")
    (made.root / "consent").mkdir()
    (made.root / "consent" / "signed-1234.pdf").write_text("yes")
    made.note(finished=True, source={"sha256": "a" * 64}, stages={})
    return made


@pytest.fixture
def parcel(space: Workspace, tmp_path: Path) -> Path:
    return pack(space, Run(space.runs / "lokitalk+tiny"), tmp_path / "alice.talkhead")


def talkhead(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def test_an_avatar_arrives_as_it_left_without_the_footage(
    space: Workspace, parcel: Path, tmp_path: Path
) -> None:
    there, run = unpack(parcel, tmp_path / "there")
    assert there.id == "alice" and run.name == "lokitalk+tiny" and run.is_finished
    for name in RUN_FILES:
        assert (run.root / name).read_bytes() == (space.runs / run.name / name).read_bytes()
    assert there.consents() == ["signed-1234.pdf"] and there.manifest()["finished"]
    names = {p.name for p in there.root.rglob("*") if p.is_file()}
    assert not names & {"video.mp4", "optim.pt"} and not list(there.root.glob(".part-*"))


def test_a_portrait_travels_along(space: Workspace, tmp_path: Path) -> None:
    run = Run(space.runs / "lokitalk+tiny")
    run.save_portrait({"pictures": np.zeros((1, 4, 4, 3), np.uint8)})
    file = pack(space, run, tmp_path / "made of a picture.talkhead")
    _, there = unpack(file, tmp_path / "there")
    arrays = there.portrait()
    assert arrays is not None and arrays["pictures"].shape == (1, 4, 4, 3)


def test_an_avatar_may_take_another_name(parcel: Path, tmp_path: Path) -> None:
    there, _ = unpack(parcel, tmp_path / "there", "eve")
    assert there.id == "eve" and there.manifest()["id"] == "eve"
    with pytest.raises(MisuseError, match="cannot be an id"):
        unpack(parcel, tmp_path / "there", "../eve")


def test_packing_twice_gives_the_same_file(space: Workspace, parcel: Path, tmp_path: Path) -> None:
    again = pack(space, Run(space.runs / "lokitalk+tiny"), tmp_path / "again.talkhead")
    assert again.read_bytes() == parcel.read_bytes()
    with pytest.raises(TalkheadError, match="there already"):
        pack(space, Run(space.runs / "lokitalk+tiny"), again)


def test_a_run_joins_the_same_person_and_no_other(
    space: Workspace, parcel: Path, tmp_path: Path
) -> None:
    with pytest.raises(TalkheadError, match="has a run 'lokitalk\\+tiny' already"):
        unpack(parcel, space.root.parent)
    shutil.rmtree(space.runs / "lokitalk+tiny")
    unpack(parcel, space.root.parent)
    assert (space.root / "video.mp4").exists() and (space.runs / "lokitalk+tiny").is_dir()
    shutil.rmtree(space.runs / "lokitalk+tiny")
    space.note(source={"sha256": "b" * 64})
    with pytest.raises(MisuseError, match="another 'alice'"):
        unpack(parcel, space.root.parent)
    assert not (space.runs / "lokitalk+tiny").exists()


def rewritten(parcel: Path, change: Callable[[dict[str, bytes], dict], None]) -> Path:
    """The parcel with other contents; its record follows where the change lets it."""
    with zipfile.ZipFile(parcel) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    record = json.loads(files.pop("parcel.json"))
    change(files, record)
    out = parcel.with_name("changed.talkhead")
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("parcel.json", json.dumps(record))
        for name, data in files.items():
            archive.writestr(name, data)
    return out


def outside(files: dict[str, bytes], record: dict) -> None:
    files["../../evil"] = b"x"
    record["files"]["../../evil"] = {"size": 1, "sha256": "0"}


def below(files: dict[str, bytes], record: dict) -> None:
    """Lies in a folder that a parcel may have, and leads out of it."""
    files["consent/../../../evil"] = b"x"
    record["files"]["consent/../../../evil"] = {"size": 1, "sha256": sha256(b"x").hexdigest()}


def hidden(files: dict[str, bytes], record: dict) -> None:
    files["runs/lokitalk+tiny/more.pkl"] = b"x"


def swapped(files: dict[str, bytes], record: dict) -> None:
    name = "runs/lokitalk+tiny/avatar.safetensors"
    files[name] = files[name][::-1]


def longer(files: dict[str, bytes], record: dict) -> None:
    files["manifest.json"] += b" "


def led_out(files: dict[str, bytes], record: dict) -> None:
    record["id"] = "../alice"


def run_led_out(files: dict[str, bytes], record: dict) -> None:
    record["run"] = "../../x"


def emptied(files: dict[str, bytes], record: dict) -> None:
    del files["manifest.json"], record["files"]["manifest.json"]


def of_another_kind(files: dict[str, bytes], record: dict) -> None:
    record["format"] = "other/9"


def named_by_a_list(files: dict[str, bytes], record: dict) -> None:
    record["id"] = ["alice"]


@pytest.mark.parametrize("change", [
    outside, below, hidden, swapped, longer, led_out, run_led_out, emptied, of_another_kind,
    named_by_a_list,
])  # fmt: skip
def test_a_parcel_that_is_not_what_it_says_leaves_nothing(
    parcel: Path, tmp_path: Path, change: Callable[[dict[str, bytes], dict], None]
) -> None:
    there = tmp_path / "far" / "there"
    bad = rewritten(parcel, change)
    with pytest.raises(TalkheadError):
        unpack(bad, there)
    assert [p for p in (tmp_path / "far").rglob("*") if p.is_file()] == []
    assert not list(tmp_path.rglob("evil"))


def test_what_is_no_parcel_is_said_in_a_sentence(parcel: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.talkhead"
    torn.write_bytes(parcel.read_bytes()[:700])
    for wrong in (torn, tmp_path / "absent.talkhead", tmp_path):
        result = talkhead("import", wrong, "--home", tmp_path / "there")
        assert result.exit_code == 1, result.stderr
        assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "there").exists()


def test_an_archive_of_another_kind_is_refused(space: Workspace, tmp_path: Path) -> None:
    for name in (
        "avatar.talkhed",
        "avatar.7z",
    ):  # nor is footage written where an avatar was meant
        asked = talkhead(
            "export", "--id", space.id, "-o", tmp_path / name, "--home", space.root.parent
        )
        assert asked.exit_code == 2 and not (tmp_path / name).exists()
    asked = talkhead(
        "export", "--id", space.id, "-o", tmp_path / "avatar.zip", "--home", space.root.parent
    )
    assert asked.exit_code == 2 and "NAME.talkhead" in asked.stderr
    assert not (tmp_path / "avatar.zip").exists()


def test_a_run_is_asked_for_in_vain_where_footage_is_exported(
    space: Workspace, tmp_path: Path
) -> None:
    asked = talkhead("export", "--id", space.id, "--run", "any", "-o", tmp_path / "out",
                     "--home", space.root.parent)  # fmt: skip
    assert asked.exit_code == 2 and "--run" in asked.output and not (tmp_path / "out").exists()


def test_another_compression_is_refused(parcel: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.talkhead"
    with zipfile.ZipFile(parcel) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_BZIP2) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(TalkheadError, match="compressed in another way"):
        unpack(other, tmp_path / "there")


def test_the_commands_carry_nothing_that_cannot_be_played(space: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "a.talkhead"
    result = talkhead("export", "--id", "alice", "-o", out, "--home", space.root.parent)
    assert result.exit_code == 0 and result.stdout.strip() == str(out), result.stderr
    result = talkhead("import", out, "--id", "eve", "--home", tmp_path / "there")
    assert result.exit_code == 1 and "Traceback" not in result.stderr, "it holds no avatar"
    assert not list((tmp_path / "there").rglob("*"))
