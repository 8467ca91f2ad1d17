"""Runs: weights, resume states and records that come back, or are named if damaged."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from talkhead_cli.contracts import TalkheadError
from talkhead_cli.store import (
    Run,
    list_runs,
)
from talkhead_cli.store import pictures as picture_files

Pixels = NDArray[np.uint8]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "lokitalk+tiny")


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
