"""Speech features: bands, formants and clocks, against librosa and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import get_window

from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from talkhead_cli.track import voice

Array = NDArray[np.floating[Any]]
INNER = slice(5, -5)  # rows whose windows lie inside the sound
F1 = voice.FEATURE_NAMES.index("f1")
VOICING = voice.FEATURE_NAMES.index("voicing")
ENERGY = voice.FEATURE_NAMES.index("energy")
FLATNESS = voice.FEATURE_NAMES.index("flatness")


def tone(hz: float, seconds: float = 0.5, peak: float = 0.3) -> Array:
    t = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return peak * np.sin(2 * np.pi * hz * t)


def noise(seconds: float = 0.5, peak: float = 0.1, seed: int = 0) -> Array:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * SAMPLE_RATE_HZ))
    return peak * samples


def vowel(formants_hz: list[float], pitch_hz: float = 110.0, seconds: float = 0.6) -> Array:
    """Pulses through resonators of 80 Hz bandwidth in a row (Klatt 1980)."""
    n = int(seconds * SAMPLE_RATE_HZ)
    sound = np.zeros(n)
    sound[(np.arange(0, seconds, 1 / pitch_hz) * SAMPLE_RATE_HZ).astype(int)] = 1.0
    for hz in formants_hz:
        r = np.exp(-np.pi * 80 / SAMPLE_RATE_HZ)
        b, c = 2 * r * np.cos(2 * np.pi * hz / SAMPLE_RATE_HZ), -(r**2)
        out = np.zeros(n + 2)
        for i in range(n):
            out[i + 2] = sound[i] + b * out[i + 1] + c * out[i]
        sound = out[2:]
    return 0.3 * sound / np.abs(sound).max()


def test_every_column_has_a_name() -> None:
    assert voice.features(noise()).shape == (50, voice.N_FEATURES)
    assert len(set(voice.FEATURE_NAMES)) == voice.N_FEATURES


@pytest.mark.parametrize("hz", [200.0, 440.0, 1000.0, 2500.0, 6000.0])
def test_a_tone_peaks_in_its_own_band(hz: float) -> None:
    librosa = pytest.importorskip("librosa")
    middle = librosa.mel_frequencies(voice.N_MEL + 2, fmin=60.0, fmax=7600.0)[1:-1]
    mel = voice.features(tone(hz))[INNER, : voice.N_MEL]
    assert np.abs(middle[mel.argmax(1)] - hz).max() <= np.abs(middle - hz).min() + 0.5 * (
        SAMPLE_RATE_HZ / voice.N_FFT
    )


def test_mel_filters_are_those_of_librosa() -> None:
    librosa = pytest.importorskip("librosa")
    theirs = librosa.filters.mel(
        sr=SAMPLE_RATE_HZ, n_fft=voice.N_FFT, n_mels=voice.N_MEL, fmin=60.0, fmax=7600.0
    )
    np.testing.assert_allclose(voice.mel_filters(), theirs, atol=1e-6)


def test_log_mel_is_the_filtered_power_around_each_row() -> None:
    librosa = pytest.importorskip("librosa")  # its own melspectrogram compiles for 13 s
    filters = librosa.filters.mel(
        sr=SAMPLE_RATE_HZ, n_fft=voice.N_FFT, n_mels=voice.N_MEL, fmin=60.0, fmax=7600.0
    )
    samples = noise(0.2) + tone(700, 0.2)
    ours = voice.features(samples)[:, : voice.N_MEL]
    hann = get_window("hann", voice.WINDOW)
    for row in range(2, 18):
        middle = row * voice.HOP
        piece = samples[middle - voice.WINDOW // 2 : middle + voice.WINDOW // 2] * hann
        expected = np.log(filters @ np.abs(np.fft.rfft(piece, voice.N_FFT)) ** 2 + 1e-6)
        np.testing.assert_allclose(ours[row], expected, atol=1e-3)


@pytest.mark.parametrize(
    "resonances", [[700.0, 1200.0], [500.0, 1800.0], [450.0, 900.0], [650.0, 2200.0]]
)
def test_formants_of_a_synthetic_vowel(resonances: list[float]) -> None:
    found = voice.features(vowel(resonances))[INNER, F1 : F1 + 2] * 1000
    np.testing.assert_allclose(np.median(found, 0), resonances, rtol=0.08)


def test_formants_of_silence_are_those_of_the_neutral_tube() -> None:
    rows = voice.features(np.zeros(8000))
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(rows[:, F1 : F1 + 3], np.tile([0.5, 1.5, 2.5], (50, 1)))


def test_a_voice_is_voiced_and_noise_is_not() -> None:
    spoken, hiss = voice.features(vowel([700.0, 1200.0]))[INNER], voice.features(noise())[INNER]
    assert spoken[:, VOICING].mean() > 1.5 * hiss[:, VOICING].mean()
    assert hiss[:, FLATNESS].mean() > spoken[:, FLATNESS].mean() + 1
    silent = voice.features(np.zeros(8000))
    assert (silent[:, VOICING] == 0).all()


def test_twice_as_loud_is_log_two_more_energy() -> None:
    quiet, loud = (voice.features(noise(peak=p))[INNER, ENERGY] for p in (0.05, 0.1))
    np.testing.assert_allclose(loud - quiet, np.log(2), atol=2e-3)


def test_scale_turns_integers_into_the_same_features() -> None:
    whole = np.round(noise(0.3) * 32767).astype(np.int16)
    floats = voice.features(whole.astype(np.float32) / 32767)
    np.testing.assert_allclose(voice.features(whole, scale=1 / 32767), floats, atol=1e-3)


@pytest.mark.parametrize(("first", "n_rows"), [(0, 20), (13, 40), (90, 10), (97, 8)])
def test_rows_of_a_part_equal_those_of_the_whole(first: int, n_rows: int) -> None:
    samples = noise(1.0) + tone(300, 1.0)
    whole = voice.features(samples, 110)
    part = voice.features(samples, n_rows, first=first)
    np.testing.assert_allclose(part, whole[first : first + n_rows], rtol=1e-5, atol=1e-5)


def test_long_sound_has_no_seam() -> None:
    samples = noise(42.0)  # more than one block of 4096 rows
    around = voice.features(samples, 12, first=4090)
    np.testing.assert_allclose(voice.features(samples)[4090:4102], around, rtol=1e-5, atol=1e-5)


def test_number_of_rows() -> None:
    assert len(voice.features(noise(0.5))) == 50
    assert len(voice.features(noise(0.5), first=20)) == 30
    assert len(voice.features(np.zeros(0))) == 0
    assert voice.features(np.zeros(0), 4).shape == (4, voice.N_FEATURES)


def test_a_click_is_centred_on_its_row() -> None:
    samples = np.zeros(8000)
    samples[25 * voice.HOP] = 1.0
    energy = voice.features(samples)[:, ENERGY]
    assert energy.argmax() == 25
    assert energy[24] == pytest.approx(energy[26], abs=0.02)


@pytest.mark.parametrize("n_steps", [1, 5, 33])
def test_windows_are_centred_on_the_middle_of_the_frame(n_steps: int) -> None:
    stream = np.arange(400.0)[:, None]  # row number as feature
    frames = np.array([20, 50, 51])
    found = voice.windows(stream, frames, n_steps)
    assert found.shape == (3, n_steps, 1)
    middle_s = (frames + 0.5) / FPS
    np.testing.assert_allclose(found[:, n_steps // 2, 0] / voice.RATE_HZ, middle_s)
    np.testing.assert_allclose(np.diff(found[..., 0]), 1)


def test_windows_repeat_the_ends() -> None:
    stream = np.arange(40.0)[:, None]
    found = voice.windows(stream, np.array([0, 9]), 17)[..., 0]
    assert found[0, 0] == 0 and found[1, -1] == 39
    assert (np.diff(found) >= 0).all()


def test_windows_of_a_whole_film_share_their_memory_and_are_the_same() -> None:
    stream = np.random.default_rng(0).random((4000, 3))
    frames = np.arange(1000)
    found = voice.windows(stream, frames, 33)
    apart = np.stack([voice.windows(stream, frames[i : i + 1], 33)[0] for i in frames])
    np.testing.assert_array_equal(found, apart)
    held = found.base
    while held is not None and held.base is not None:
        held = held.base
    assert found.nbytes > 8 * (held.nbytes if held is not None else found.nbytes)


def sound_of(parts: list[tuple[float, float]]) -> Array:
    """Noise of (seconds, peak) after each other."""
    return np.concatenate([noise(s, p, seed=i) for i, (s, p) in enumerate(parts)])


def test_all_of_a_talk_with_pauses_is_heard() -> None:
    samples = sound_of([(2, 0.1), (2, 0), (2, 0.1)])
    assert voice.is_audible(samples, 150).all()


def test_silence_is_not_heard() -> None:
    assert not voice.is_audible(np.zeros(100 * SAMPLES_PER_FRAME), 100).any()
    assert not voice.is_audible(noise(4.0, peak=1e-5), 100).any()


def test_a_dead_end_is_heard_only_for_the_hold() -> None:
    alive = voice.is_audible(sound_of([(4, 0.1), (6, 0)]), 250)
    hold = round(1.5 * FPS)
    assert alive[: 100 + hold - 1].all() and not alive[100 + hold + 1 :].any()
    late = voice.is_audible(sound_of([(6, 0), (4, 0.1)]), 250)
    np.testing.assert_array_equal(late, alive[::-1])


def test_the_middle_of_a_long_gap_is_dead() -> None:
    alive = voice.is_audible(sound_of([(2, 0.1), (6, 0), (2, 0.1)]), 250)
    assert alive[:85].all() and not alive[92:158].any() and alive[165:].all()
