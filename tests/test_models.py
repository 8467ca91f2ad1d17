"""Weights of other people's networks: found, checked, loaded as they are published."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import backends
from talkhead_cli.store import weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TALKHEAD_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture(scope="module")
def hubert_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the published file."""
    from torchaudio.models import hubert_base

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("w") / "hubert_fairseq_base_ls960.pth"
    torch.save(hubert_base().state_dict(), path)
    return path


def test_auto_takes_what_is_there_and_never_downloads(cache: Path, hubert_file: Path) -> None:
    assert backends.choose() == {
        "voice": "embedding",
        "detector": "mediapipe",
        "mesh": "mediapipe",
        "landmarks": "mesh",
        "labels": "colour+motion",
    }
    with pytest.raises(TalkheadError, match="models import hubert"):
        backends.choose(["voice=hubert"])
    weights.import_file("hubert", hubert_file)
    assert backends.choose()["voice"] == "hubert"
    assert backends.choose(["voice=mel"])["voice"] == "mel"
    assert backends.choose(["voice=auto", "labels=auto"])["voice"] == "hubert"
    assert weights.verify("hubert") == "unchanged" and weights.verify("wav2vec2") == "missing"
    for wrong in ("voice=deepspeech", "deepspeech", "ears=mel", "voice=", "landmarks=mel"):
        with pytest.raises(MisuseError, match="--backend"):
            backends.choose([wrong])


def test_a_file_with_another_hash_is_refused(cache: Path, hubert_file: Path) -> None:
    with pytest.raises(TalkheadError, match="sha256"):
        weights.import_file("wav2vec2", hubert_file)
    assert weights.find("wav2vec2") is None


def test_a_file_that_holds_no_weights_is_refused(cache: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pth"
    junk.write_text("junk")
    with pytest.raises(TalkheadError, match="cannot be read"):
        weights.import_file("hubert", junk)
    assert weights.find("hubert") is None and weights.verify("hubert") == "missing"


def test_a_changed_file_is_noticed(cache: Path, hubert_file: Path) -> None:
    path = weights.import_file("hubert", hubert_file)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert weights.verify("hubert") == "WRONG"


def test_ssl_rows_of_a_part_equal_those_of_the_whole(cache: Path, hubert_file: Path) -> None:
    weights.import_file("hubert", hubert_file)
    ear = backends.voice_of("hubert")
    sound = np.random.default_rng(0).standard_normal(16_000 * 10).astype(np.float32) * 0.1
    whole = ear.features(sound)
    assert whole.shape == (1000, 768) and ear.n_features == 768
    part = ear.features(sound, 60, first=770)
    assert np.allclose(part, whole[770:830], atol=1e-5)


def test_a_file_that_holds_something_else_is_refused(cache: Path) -> None:
    place = weights.folder() / weights.KNOWN["hubert"].file
    place.parent.mkdir(parents=True)
    torch.save({"a": torch.zeros(2)}, place)
    with pytest.raises(TalkheadError, match="torchaudio"):
        backends.voice_of("hubert")


# -- fetched ---------------------------------------------------------------------------------


@pytest.fixture
def mirror(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the face landmarker under its published name, and its hash is known."""
    folder = cache / "mirror"
    folder.mkdir()
    known = weights.KNOWN["face-landmarker"]
    (folder / known.file).write_bytes(b"a model" * 1000)
    digest = hashlib.sha256(b"a model" * 1000).hexdigest()
    monkeypatch.setitem(weights.KNOWN, known.name, replace(known, sha256=digest))
    return folder


def test_weights_are_pulled_from_a_folder(mirror: Path) -> None:
    got = weights.pull("face-landmarker", SilentProgress(), source=str(mirror))
    assert got == weights.find("face-landmarker") and got.parent == weights.folder()
    assert weights.verify("face-landmarker") == "ok"
    got.write_bytes(b"another")
    with pytest.raises(TalkheadError, match="face-landmarker.*models pull"):
        weights.verified("face-landmarker")


def test_what_is_pulled_has_to_be_what_was_published(mirror: Path) -> None:
    file = mirror / weights.KNOWN["face-landmarker"].file
    file.write_bytes(b"a virus")
    with pytest.raises(TalkheadError, match="face_landmarker.task is not face-landmarker"):
        weights.pull("face-landmarker", SilentProgress(), source=str(mirror))
    file.unlink()
    with pytest.raises(TalkheadError, match="no face_landmarker.task in the folder"):
        weights.pull("face-landmarker", SilentProgress(), source=str(mirror))
    assert not list(weights.folder().glob("*"))


def test_weights_are_pulled_from_where_they_are_published(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, asked = weights.KNOWN["face-landmarker"], []

    def answer(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO((mirror / known.file).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    weights.pull("face-landmarker", SilentProgress())
    weights.pull("face-landmarker", SilentProgress(), source="https://mirror.example/models")
    assert asked == [known.url + known.file, "https://mirror.example/models/" + known.file]

    def dead(address: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", dead)
    with pytest.raises(TalkheadError, match="no route to host.*--from"):
        weights.pull("lpips", SilentProgress())
    with pytest.raises(MisuseError, match="https"):
        weights.pull("lpips", SilentProgress(), source="http://mirror.example")
    assert weights.find("lpips") is None


def test_weights_without_a_published_hash_need_one(cache: Path, hubert_file: Path) -> None:
    digest = hashlib.sha256(hubert_file.read_bytes()).hexdigest()
    from_folder = str(hubert_file.parent)
    with pytest.raises(MisuseError, match="--sha256"):
        weights.pull("hubert", SilentProgress(), source=from_folder)
    with pytest.raises(MisuseError, match="64"):
        weights.pull("hubert", SilentProgress(), source=from_folder, sha256=digest[:8])
    with pytest.raises(TalkheadError, match="asked for"):
        weights.pull("hubert", SilentProgress(), source=from_folder, sha256="0" * 64)
    weights.pull("hubert", SilentProgress(), source=from_folder, sha256=digest.upper())
    assert weights.verify("hubert") == "unchanged"


def test_weights_lie_where_their_libraries_keep_them_too(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = cache / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / weights.KNOWN["lpips"].file).write_bytes(b"x")
    assert weights.find("lpips") == hub / weights.KNOWN["lpips"].file
    assert weights.verify("lpips") == "WRONG"
