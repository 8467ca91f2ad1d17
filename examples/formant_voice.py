"""A seeded synthetic voice: syllables through formant resonators, and the matching mouth motion.

Sound and mouth come from the same sequence of phones, so that the mouth can be learnt from the
sound. No recordings and no network are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import butter, lfilter, sosfilt

from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

BLOCK = 80  # samples (5 ms) during which the resonators are constant


@dataclass(frozen=True)
class Phone:
    """One sound: formants in Hz, loudness of voice and hiss, and the shape of the mouth.

    hiss_band 0 low (breath, f), 1 middle (k), 2 high (s) · jaw 0 shut ... 1 wide open ·
    width -1 rounded ... 1 spread · lips_shut: the lips must touch · duration in seconds
    """

    formants: tuple[float, float, float]
    voice: float
    hiss: float
    hiss_band: int
    jaw: float
    width: float
    lips_shut: bool = False
    duration: tuple[float, float] = (0.07, 0.11)


VOWEL_S = (0.14, 0.24)
PHONES = {
    "a": Phone((780, 1300, 2600), 1.0, 0.0, 0, 1.0, 0.0, duration=VOWEL_S),
    "e": Phone((520, 1850, 2550), 1.0, 0.0, 0, 0.6, 0.5, duration=VOWEL_S),
    "i": Phone((300, 2250, 3000), 0.8, 0.0, 0, 0.28, 1.0, duration=VOWEL_S),
    "o": Phone((480, 900, 2500), 1.0, 0.0, 0, 0.6, -0.7, duration=VOWEL_S),
    "u": Phone((320, 780, 2300), 0.8, 0.0, 0, 0.3, -1.0, duration=VOWEL_S),
    "m": Phone((250, 1000, 2200), 0.35, 0.0, 0, 0.0, 0.0, True, (0.09, 0.13)),
    "b": Phone((220, 800, 2200), 0.10, 0.0, 0, 0.0, 0.0, True, (0.09, 0.12)),
    "p": Phone((300, 800, 2200), 0.0, 0.0, 0, 0.0, 0.0, True, (0.09, 0.12)),
    "f": Phone((300, 1100, 2300), 0.0, 0.10, 0, 0.05, 0.1),
    "s": Phone((300, 1700, 2600), 0.0, 0.16, 2, 0.16, 0.4),
    "t": Phone((300, 1700, 2600), 0.0, 0.0, 2, 0.2, 0.2),
    "n": Phone((280, 1600, 2500), 0.35, 0.0, 0, 0.22, 0.1),
    "l": Phone((360, 1200, 2700), 0.55, 0.0, 0, 0.35, 0.1),
    "k": Phone((300, 1900, 2500), 0.0, 0.0, 1, 0.3, 0.0),
    "-": Phone((450, 1450, 2500), 0.0, 0.0, 0, 0.0, 0.0, True),
}
VOWELS, CONSONANTS, BURSTS = "aeiou", "mbpfstnlk", "ptkb"


@dataclass(frozen=True)
class Speech:
    """sound (T*640,) float32 at 16 kHz · per frame: jaw (T,) 0 ... 1, width (T,) -1 ... 1."""

    sound: np.ndarray
    jaw: np.ndarray
    width: np.ndarray


def _score(seconds: float, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Return random phones and their durations (s): phrases of syllables between pauses."""
    score, clock, stop = [("-", 0.32)], 0.32, seconds - 0.45
    while clock < stop:
        for _ in range(int(rng.integers(4, 10))):
            for letters, wanted in ((CONSONANTS, 0.88), (VOWELS, 1.0)):
                if rng.random() < wanted and clock < stop:
                    name = letters[int(rng.integers(len(letters)))]
                    score.append((name, float(rng.uniform(*PHONES[name].duration))))
                    clock += score[-1][1]
        score.append(("-", float(rng.uniform(0.36, 0.8))))
        clock += score[-1][1]
    return [*score, ("-", max(0.0, seconds - clock) + 1.0)]


def _resonate(x: np.ndarray, hz: np.ndarray, width_hz: float) -> np.ndarray:
    """Filter x (n,) by one formant whose frequency `hz` (n_blocks,) changes per block."""
    y, state = np.empty_like(x), np.zeros(2)
    r = np.exp(-np.pi * width_hz / SAMPLE_RATE_HZ)
    for block, f in enumerate(hz):
        a1, a2 = -2 * r * np.cos(2 * np.pi * f / SAMPLE_RATE_HZ), r * r
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        y[part], state = lfilter([1 + a1 + a2], [1.0, a1, a2], x[part], zi=state)
    return y


def speak(seconds: float = 20.0, seed: int = 0) -> Speech:
    """Synthesise an utterance of round(25 * seconds) frames and its mouth motion."""
    rng = np.random.default_rng([seed, 0x51])
    n_frames = round(FPS * seconds)
    n = n_frames * SAMPLES_PER_FRAME
    n_blocks = n // BLOCK
    score = _score(seconds, rng)
    ends = np.cumsum([duration for _, duration in score])
    clock = (np.arange(n_blocks) + 0.5) * BLOCK / SAMPLE_RATE_HZ
    index = np.searchsorted(ends, clock)
    said = [PHONES[score[i][0]] for i in index]

    def track(values: list[float] | np.ndarray, sigma_s: float) -> np.ndarray:
        """Smooth values (n_blocks,) over `sigma_s` seconds, the inertia of an articulator."""
        return gaussian_filter1d(
            np.asarray(values, float), sigma_s * SAMPLE_RATE_HZ / BLOCK, mode="nearest"
        )

    def sampled(values: np.ndarray) -> np.ndarray:
        """Interpolate values (n_blocks,) to samples (n,)."""
        return np.interp((np.arange(n) + 0.5) / BLOCK - 0.5, np.arange(n_blocks), values)

    shut = track([p.lips_shut for p in said], 0.028)
    jaw = track([p.jaw for p in said], 0.036) * (1 - np.clip(1.25 * shut - 0.1, 0, 1))
    lip_width = track([p.width for p in said], 0.045)

    # voice: glottal pulses whose pitch falls during each phone, then five formants
    pitch = 185 + 22 * track(rng.standard_normal(n_blocks), 0.12) * 5
    began = np.array([0.0, *ends[:-1]])[index]
    pitch *= 1.06 - 0.05 * np.clip(clock - began, 0, 1)
    turn = np.cumsum(sampled(pitch)) / SAMPLE_RATE_HZ % 1.0
    opening, closing = np.clip(turn / 0.4, 0, 1), np.clip((turn - 0.4) / 0.2, 0, 1)
    flow = 0.5 * (1 - np.cos(np.pi * opening)) * np.cos(0.5 * np.pi * closing)
    white = rng.standard_normal(n)
    voice = np.diff(flow, prepend=0.0) * 6 + 0.02 * white
    voice *= sampled(track([p.voice for p in said], 0.012))
    for k, width_hz in enumerate((70, 100, 150)):
        voice = _resonate(voice, track([p.formants[k] for p in said], 0.02), width_hz)
    for hz, width_hz in ((3600.0, 220), (4600.0, 300)):
        voice = _resonate(voice, np.full(n_blocks, hz), width_hz)

    # noise: hiss during a phone, and a burst at the end of a stop
    bands = ((600, 6500), (1500, 4000), (4200, 7600))
    stop_ends = [(e, score[i][0]) for i, e in enumerate(ends) if score[i][0] in BURSTS]
    noise = np.zeros(n)
    for band, edges in enumerate(bands):
        hiss = np.array([p.hiss * (p.hiss_band == band) for p in said])
        loud = track(hiss, 0.01)
        for at, name in stop_ends:
            if PHONES[name].hiss_band == band:
                burst = np.exp(-(((clock - at) / 0.012) ** 2))
                loud += burst * (0.05 if name == "b" else 0.14)
        sos = butter(2, edges, "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
        noise += sosfilt(sos, white) * sampled(loud)

    voice /= max(float(np.abs(voice).max()), 1e-6)
    sound = 0.7 * voice + 0.5 * noise + 2e-4 * rng.standard_normal(n)
    at_frame = (np.arange(n_frames) + 0.5) * SAMPLES_PER_FRAME / BLOCK - 0.5
    return Speech(
        np.clip(sound, -1, 1).astype(np.float32),
        np.interp(at_frame, np.arange(n_blocks), jaw),
        np.interp(at_frame, np.arange(n_blocks), lip_width),
    )
