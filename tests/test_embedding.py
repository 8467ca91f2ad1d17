"""The speech embedding that comes with the package."""

from __future__ import annotations

from pathlib import Path

import formant_voice
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from talkhead_cli.jobs import backends
from talkhead_cli.store import weights
from talkhead_cli.track import embedding, voice

EAR = backends.voice_of("embedding")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return formant_voice.speak(4.0, seed=3).sound


def by_torch(mel: np.ndarray) -> np.ndarray:
    """Mel rows (T, 32) in decibels / 10 + 2 -> (T', 576), by torch's own convolutions."""
    held = {k: torch.from_numpy(v).float() for k, v in weights.shipped(embedding.WEIGHTS).items()}
    x, read = torch.from_numpy(mel).float()[None, None], {}
    for layer in range(embedding.N_LAYERS):
        kernel = held[f"weight{layer}"]
        x = F.conv2d(x, kernel, held[f"bias{layer}"], padding=(0, kernel.shape[3] // 2))
        x = F.leaky_relu(x, 0.2).clamp(min=-0.4)
        read[layer] = x[0].permute(1, 2, 0).flatten(1)
        if layer in embedding.POOLED:
            x = F.max_pool2d(x, embedding.POOLED[layer])
    fine, coarse = read[embedding.FINE], read[embedding.COARSE]
    return torch.cat([fine[2 : 2 + len(coarse)], coarse], 1).numpy()


def test_rows_are_what_the_published_layers_say(speech: np.ndarray) -> None:
    n_rows, first = 20, 30
    n_mel = 4 * (n_rows - 1) + embedding.FIELD
    power = voice.power_spectra(speech * 32768, 4 * first - embedding.BEFORE, n_mel, 1.0)
    mel = 10 * np.log10(power @ voice.mel_filters(32, 60.0, 3800.0).T + 1e-10)
    expected = by_torch(np.maximum(mel, 30) / 10 + 2)
    assert expected.shape == (n_rows, EAR.n_features)
    np.testing.assert_allclose(EAR.features(speech, n_rows, first=first), expected, atol=2e-3)


@pytest.mark.parametrize(("first", "n_rows"), [(0, 100), (17, 40), (90, 10), (95, 20)])
def test_rows_of_a_part_equal_those_of_the_whole(
    speech: np.ndarray, first: int, n_rows: int
) -> None:
    whole = EAR.features(speech, 130)
    part = EAR.features(speech, n_rows, first=first)
    assert part.shape == (n_rows, EAR.n_features)
    np.testing.assert_allclose(part, whole[first : first + n_rows], atol=1e-3)


def test_there_is_a_row_for_every_frame_and_silence_beyond_the_sound(speech: np.ndarray) -> None:
    assert len(EAR.features(speech)) == 100
    assert EAR.features(np.zeros(0), 3).shape == (3, EAR.n_features)
    assert EAR.features(np.zeros(0)).shape == (0, EAR.n_features)
    rows = EAR.features(speech, 160)
    np.testing.assert_allclose(rows[130:], rows[[130]].repeat(30, 0), atol=1e-5)


def test_what_a_row_hears_lies_evenly_round_the_middle_of_its_frame() -> None:
    """A click changes as many rows before the frame that it falls into as after it."""
    quiet = np.random.default_rng(0).normal(0, 1e-3, 3 * 16_000).astype(np.float32)
    still = EAR.features(quiet)
    for frame in (30, 37):
        click = quiet.copy()
        click[frame * 640 + 320] += 0.5
        rows = np.flatnonzero(np.abs(EAR.features(click) - still).max(1) > 1e-3)
        assert list(rows) == list(range(rows[0], rows[-1] + 1)) and 12 < len(rows) < 16
        assert abs((rows[0] + rows[-1]) / 2 - frame) <= 0.5


def test_samples_count_the_same_in_either_unit(speech: np.ndarray) -> None:
    pcm = (speech * 32767).astype(np.int16)
    np.testing.assert_allclose(
        EAR.features(pcm, scale=1 / 32767), EAR.features(pcm / np.float32(32767)), atol=1e-2
    )


def test_vowels_are_told_apart_better_than_loudness_is() -> None:
    """The same vowel, twice as quiet, stays nearer to itself than to another."""
    rng = np.random.default_rng(1)

    def vowel(resonances: list[float], gain: float) -> np.ndarray:
        from scipy.signal import lfilter

        sound = np.zeros(16_000)
        sound[::130] = 1
        sound += rng.normal(0, 0.002, len(sound))
        for hz in resonances:
            r = np.exp(-np.pi * 80 / 16_000)
            sound = lfilter([1], [1, -2 * r * np.cos(2 * np.pi * hz / 16_000), r * r], sound)
        return (gain * sound / np.abs(sound).max()).astype(np.float32)

    def heard(resonances: list[float], gain: float) -> np.ndarray:
        return EAR.features(vowel(resonances, gain))[8:17].mean(0)

    ah, ee = [730.0, 1090.0, 2440.0], [270.0, 2290.0, 3010.0]
    same = np.linalg.norm(heard(ah, 0.5) - heard(ah, 0.25))
    other = np.linalg.norm(heard(ah, 0.5) - heard(ee, 0.5))
    assert 2 * same < other


def test_the_weights_are_small_and_of_the_published_shapes() -> None:
    held = weights.shipped(embedding.WEIGHTS)
    assert Path(embedding.WEIGHTS).stat().st_size < 700_000
    assert sum(v.size for v in held.values()) == 328_128 - 96 * 96 * 3, "all but the last layer"
    assert held["weight0"].shape == (24, 1, 3, 3) and held["weight18"].shape == (96, 96, 3, 1)
