"""The sound in sync with the lips, and its speech features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import SAMPLES_PER_FRAME, TalkheadError, UnfitError
from talkhead_cli.jobs import backends
from talkhead_cli.jobs.stages.material import Material
from talkhead_cli.track import lipsync, voice
from talkhead_cli.track.spans import in_words

MIN_OFFSET_S = 0.06  # smallest offset between sound and lips that is corrected


def require_audible(material: Material) -> None:
    """Raise TalkheadError if the sound is silent, before time is spent on tracking."""
    known = material.space.manifest()
    place = [material.part.first, material.part.n_frames]
    if known.get("has_audio") and known["source"].get("part") == place:
        return
    samples = material.part.heard()
    if not voice.is_audible(samples, -(-len(samples) // SAMPLES_PER_FRAME)).any():
        raise UnfitError(
            f"the sound of {material.name} is silent; film with a working microphone, or "
            "pass --no-audio to track the pictures alone (no avatar can be trained on them)"
        )


def run(material: Material, offset_s: float | None) -> None:
    """Save the 16 kHz sound, in sync with the lips, and its speech features."""
    material.progress.stage("sound", None)
    n_frames = material.n_frames
    n_samples = n_frames * SAMPLES_PER_FRAME
    found = {}
    if material.with_audio:
        samples = material.part.sound(n_samples)
        measured = _offset(material, samples)
        if offset_s is None:
            offset_s = _offset_to_correct(material, measured)
        if offset_s:
            samples = material.part.sound(n_samples, late_s=offset_s)
        if measured is not None:
            found = {"found": np.array([measured.sound_after_lips_s, measured.margin])}
    else:
        samples = np.zeros(n_samples, np.float32)
    heard = voice.is_audible(samples, n_frames)
    if material.with_audio and not heard.any():
        raise TalkheadError(
            f"nothing is heard of {material.name} while its picture lasts"
            + (f", when its sound is moved by {offset_s:g} s" if offset_s else "")
            + "; give another part of it, or another --offset"
        )
    if material.with_audio and not heard.all():
        material.progress.note(
            f"the sound is dead in frames {in_words(~heard)}; speech is not learnt from them"
        )
    media.write_wav(material.space.audio, samples)
    listener = backends.voice_of(material.chosen["voice"])
    material.space.save(
        "voice",
        {
            "stream": listener.features(samples),
            "rate_hz": np.array(listener.rate_hz),
            "heard": heard,
            "undone_s": np.array(offset_s or 0.0),
            **found,
        },
    )


def _offset(material: Material, samples: NDArray[np.float32]) -> lipsync.Offset | None:
    """Measure how late the sound is; None if there is too little lip motion or sound."""
    heard = voice.is_audible(samples, material.n_frames)
    frames = np.flatnonzero(material.faces.found & heard)
    lips = lipsync.lip_motion(material.faces.points)[frames]
    return lipsync.measure(voice.features(samples), frames, lips)


def _offset_to_correct(material: Material, found: lipsync.Offset | None) -> float:
    """Return the offset to correct, in s, to 10 ms; 0 if it is small or uncertain."""
    if found is None or not found.is_sure:
        material.progress.note(
            "whether lips and sound agree could not be told (too little is seen or heard); the "
            "sound is left as it is (--offset SECONDS shifts it)"
        )
        return 0.0
    if abs(found.sound_after_lips_s) < MIN_OFFSET_S:
        return 0.0
    material.progress.note(
        f"the sound comes {found}; it was shifted into step (--offset none leaves it as it is)"
    )
    return round(found.sound_after_lips_s, 2)


def recorded_offset(material: Material) -> dict[str, float | None]:
    """Return the measured and the corrected offset of sound and lips, for the manifest."""
    stored = material.space.load("voice")
    late, margin = stored["found"].tolist() if "found" in stored else (None, None)
    return {
        "sound_after_lips_s": None if late is None else round(late, 4),
        "margin": None if margin is None else round(margin, 4),
        "sure_from": lipsync.SURE,
        "corrected_s": round(float(stored["undone_s"]), 4),
    }
