"""Whatever a file or an option holds: a result or one sentence, and nothing half-written."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from talkhead_cli import media
from talkhead_cli.cli.app import app
from talkhead_cli.cli.console import speaking
from talkhead_cli.contracts import TalkheadError
from talkhead_cli.jobs import drive, landmark_track, photo, portraits
from talkhead_cli.jobs import preset as presets
from talkhead_cli.store import Run, Workspace
from talkhead_cli.store.parcel import RUN_FILES, pack, unpack

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
often = settings(max_examples=300, deadline=None, suppress_health_check=QUIET, derandomize=True)
seldom = settings(max_examples=15, deadline=None, suppress_health_check=QUIET, derandomize=True)

words = st.text(max_size=12)
numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers()
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
KEYS = ["method", "data", "march", "train", "train.stages", "train.stages.speech", "avatar.size",
        "train.stages.speech.steps", "train.stages.speech.rates", "pretrain", "render.crf",
        ]  # fmt: skip


def flipped(draw: Any, whole: bytes) -> bytes:
    """A file with some of its bytes changed, or cut short."""
    data = bytearray(whole)
    for at in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
        data[at] ^= draw(st.integers(1, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


# -- presets --------------------------------------------------------------------------------------


@often
@given(key=st.sampled_from(KEYS) | words, value=values)
def test_any_setting_is_a_preset_or_a_sentence(key: str, value: Any) -> None:
    try:
        presets.load(["lokitalk", "tiny"], [f"{key}={yaml.safe_dump(value).strip()}"])
    except TalkheadError as error:
        assert str(error)


@often
@given(value=values, raw=st.binary(max_size=60))
def test_any_file_is_a_preset_or_a_sentence(tmp_path: Path, value: Any, raw: bytes) -> None:
    file = tmp_path / "wild.yaml"
    for data in (yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace"), raw):
        file.write_bytes(data)
        for names in (["lokitalk", str(file)], [str(file)]):
            try:
                presets.load(names)
            except TalkheadError as error:
                assert str(error)


# -- arrays ---------------------------------------------------------------------------------------


def archive(arrays: dict[str, np.ndarray]) -> bytes:
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()


@often
@given(data=st.data())
def test_a_damaged_track_is_answered(tmp_path: Path, data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    marks = (0.01 * rng.standard_normal((4, 68, 3))).astype(np.float32)
    file = tmp_path / "track.npz"
    file.write_bytes(flipped(data.draw, archive({"landmarks": marks, "neutral": marks[0]})))
    try:
        track = landmark_track.read(file)
    except TalkheadError:
        return
    assert track.landmarks.shape[1:] == (68, 3) and np.isfinite(track.landmarks).all()


@often
@given(
    name=st.sampled_from(["pictures", "labels", "relief", "c2w", "pose", "size_px", "moment"]),
    shape=st.lists(st.integers(0, 3), max_size=4),
    kind=st.sampled_from(["f4", "u1", "i8", "U3"]),
    missing=st.booleans(),
)
def test_a_portrait_of_another_shape_is_answered(
    name: str, shape: list[int], kind: str, missing: bool
) -> None:
    rng = np.random.default_rng(0)
    real = {"relief": (1, 4, 4, 2), "c2w": (1, 4, 4), "k": (1, 3, 3), "eye": (1, 2),
            "gaze": (1, 2), "brow": (1, 2), "landmarks": (1, 68, 3), "landmarks_2d": (1, 68, 2),
            "pose": (1, 6), "body": (1, 4)}  # fmt: skip
    arrays: dict[str, Any] = {k: rng.random(s, np.float32) for k, s in real.items()}
    arrays |= {
        "pictures": np.zeros((1, 8, 8, 3), np.uint8),
        "size_px": np.array(8),
        "labels": np.zeros((1, 6, 4, 4), np.uint8),
        "person": np.zeros(1, np.int64),
        "moment": np.zeros(1, np.int64),
    }
    assert len(portraits.from_arrays(arrays)) == 1
    arrays[name] = np.zeros(shape, kind)
    if missing:
        del arrays[name]
    try:
        portraits.from_arrays(arrays)
    except TalkheadError as error:
        assert "portrait.npz" in str(error)


@often
@given(
    text=st.text(max_size=80) | st.lists(st.lists(numbers, max_size=3), max_size=4).map(str),
    suffix=st.sampled_from([".csv", ".txt", ".npy"]),
)
def test_any_table_is_numbers_or_a_sentence(tmp_path: Path, text: str, suffix: str) -> None:
    file = tmp_path / f"table{suffix}"
    file.write_bytes(text.encode("utf-8", "replace"))
    try:
        table = drive.read_table(file, (1, 2, 6), "--pose")
    except TalkheadError:
        return
    assert table.ndim == 2 and table.shape[1] in (1, 2, 6) and np.isfinite(table).all()


# -- containers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parcel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("parcel")
    space = Workspace(folder / "home", "alice")
    run = Run(space.runs / "lokitalk")
    run.root.mkdir(parents=True)
    for name in RUN_FILES:
        (run.root / name).write_bytes(np.random.default_rng(0).bytes(200))
    space.note(finished=True, source={"sha256": "a" * 64}, stages={})
    return pack(space, run, folder / "alice.talkhead").read_bytes()


@often
@given(data=st.data())
def test_a_damaged_parcel_brings_all_or_nothing(
    parcel: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    file, home = tmp_path / "wild.talkhead", tmp_path / "home"
    file.write_bytes(flipped(data.draw, parcel))
    shutil.rmtree(home, ignore_errors=True)
    try:
        space, run = unpack(file, home)
    except TalkheadError:
        left = [p for p in home.rglob("*") if p.is_file() and p.name != ".lock"]
        assert not left, left
        return
    assert all((run.root / name).is_file() for name in RUN_FILES) and space.id == "alice"


@pytest.fixture(scope="module")
def film(speaker_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    short = tmp_path_factory.mktemp("film") / "short.mp4"
    with media.VideoWriter(short, (64, 64)) as out:
        for frame in media.frames(speaker_clip, size=(64, 64), n_frames=10):
            out.write(frame)
    return short.read_bytes()


@seldom
@given(data=st.data())
def test_a_damaged_film_is_read_or_answered(
    film: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    file = tmp_path / "wild.mp4"
    file.write_bytes(flipped(data.draw, film))
    try:
        media.probe(file)
        for frame in media.frames(file, size=(32, 32), n_frames=10):
            assert frame.shape == (32, 32, 3)
    except TalkheadError as error:
        assert str(error)


@seldom
@given(raw=st.binary(max_size=200), kind=st.sampled_from(["png", "jpg", "webp", "gif", "tif"]))
def test_any_bytes_are_a_picture_or_a_sentence(tmp_path: Path, raw: bytes, kind: str) -> None:
    heads = {
        "png": b"\x89PNG\r\n\x1a\n",
        "jpg": b"\xff\xd8\xff\xe0",
        "webp": b"RIFF",
        "gif": b"GIF89a",
        "tif": b"II*\x00",
    }
    file = tmp_path / f"wild.{kind}"
    file.write_bytes(heads[kind] + raw)
    try:
        assert photo.read(file).ndim == 3
    except TalkheadError as error:
        assert "JPEG or PNG" in str(error)


def test_a_picture_with_a_broken_chunk_is_a_sentence(tmp_path: Path) -> None:
    """Pillow raises SyntaxError at what follows a block that says it is shorter than it is."""
    path = tmp_path / "broken.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(path), noise)
    raw = path.read_bytes()
    at = raw.index(b"IDAT")
    path.write_bytes(raw[: at - 4] + (5).to_bytes(4, "big") + raw[at:])
    with pytest.raises(TalkheadError, match="cannot be read as a picture") as caught:
        photo.read(path)
    assert isinstance(caught.value.__cause__, SyntaxError)


def test_a_full_gpu_is_a_sentence_and_other_faults_are_faults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, speaking(verbose=False):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert ended.value.code == 1
    assert "memory is full" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(RuntimeError, match="of ours"), speaking(verbose=False):
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_nobody_can_sow_is_misuse(seed: str) -> None:
    words = ["finetune", "--id", "nobody", "--seed", seed]
    assert CliRunner().invoke(app, words).exit_code == 2
