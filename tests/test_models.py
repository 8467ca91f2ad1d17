"""Weights of other people's networks: found, checked, loaded as they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.jobs import hearing
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
    assert hearing.choose("auto") == "mel"
    with pytest.raises(TalkheadError, match="models import hubert"):
        hearing.choose("hubert")
    weights.import_file("hubert", hubert_file)
    assert hearing.choose("auto") == "hubert"
    assert weights.verify("hubert") == "ok" and weights.verify("wav2vec2") == "missing"
    with pytest.raises(MisuseError):
        hearing.choose("deepspeech")


def test_a_file_with_another_hash_is_refused(cache: Path, hubert_file: Path) -> None:
    with pytest.raises(TalkheadError, match="sha256"):
        weights.import_file("wav2vec2", hubert_file)
    assert weights.find("wav2vec2") is None


def test_a_changed_file_is_noticed(cache: Path, hubert_file: Path) -> None:
    path = weights.import_file("hubert", hubert_file)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert weights.verify("hubert") == "WRONG"


def test_ssl_rows_of_a_part_equal_those_of_the_whole(cache: Path, hubert_file: Path) -> None:
    weights.import_file("hubert", hubert_file)
    ear = hearing.voice_of("hubert")
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
        hearing.voice_of("hubert")
