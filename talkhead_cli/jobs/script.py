"""Driving signals of a video of new speech: audio features, motion, predictions from speech."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from talkhead_cli import media
from talkhead_cli.contracts import (
    FPS,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_FRAME,
    Progress,
    Signals,
    TalkheadError,
    repacked,
    unpacked,
)
from talkhead_cli.jobs import backends, landmark_track
from talkhead_cli.jobs import drive as drives
from talkhead_cli.jobs.backends import Voice
from talkhead_cli.jobs.drive import MotionOptions
from talkhead_cli.jobs.footage import SpeechStats
from talkhead_cli.jobs.landmark_track import LandmarkTrack
from talkhead_cli.jobs.player import Player, still_signals
from talkhead_cli.track import voice

PCM_SCALE = 1 / 32768
STATS_S = 60  # seconds of audio that are read at once
CHUNK = 48  # frames per call of `listen`; a multiple of a GPU's batch (`player.MAX_ROWS`)
PAUSE_S, EASE_S = 0.2, 0.24  # silence up to which a mouth goes on; in which it comes to rest
OWN_STATS_S = 5.0  # speech with less sound than this is standardised by the footage's statistics


M = TypeVar("M", bound=MotionOptions)


@dataclass(frozen=True)
class Script:
    """Driving signals of any frames of the video; frames may be requested in any order."""

    player: Player
    pcm: NDArray[np.int16]
    ear: Voice
    stats: SpeechStats
    drive: drives.Drive
    n_frames: int
    track: LandmarkTrack | None
    lids: NDArray[np.float32] | None  # (n, 2) eye openness of `track`, if it overrules the drive
    talks: NDArray[np.float32]  # (n_frames,) 1 where there is sound, 0 in silence

    def signals(self, frames: NDArray[Any]) -> Signals:
        """Return the signals of frames (n,) after `listen`.  The `avatar.past` frames before the
        first are computed too, so that predictions equal those over the whole video."""
        asked, past = len(frames), self.player.avatar.past
        frames = np.concatenate([np.arange(max(0, frames[0] - past), frames[0]), frames])
        window = self.player.preset.data.window
        per_frame = self.ear.rate_hz // FPS
        room = voice.n_steps(window, self.ear.rate_hz) // per_frame + 1
        low = max(0, int(frames.min()) - room)
        high = min(self.n_frames, int(frames.max()) + 1 + room) * per_frame
        stream = self.ear.features(
            self.pcm, high - low * per_frame, first=low * per_frame, scale=PCM_SCALE
        )
        pose, body = self.drive.pose(frames)
        eye, gaze, brow = self.drive.eyes(frames)
        if self.lids is not None:
            eye = self.lids[np.minimum(frames, len(self.lids) - 1)]
        heard = self.stats.windows(stream, frames - low, window)
        driven = {"pose": pose, "body": body, "eye": eye, "gaze": gaze, "brow": brow}
        signals = still_signals(
            torch.from_numpy(heard),
            torch.from_numpy(np.asarray(frames, np.int64)),
            self.drive.camera(np.asarray(pose), self.player.preset.data.size_px, frames),
            **{k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in driven.items()},
        )
        said = self.player.listen(signals)[len(frames) - asked :]
        if self.track is None:
            return self._at_rest_in_silence(said, self.talks[frames[-asked:]])
        rows = np.minimum(frames[-asked:], len(self.track) - 1)
        return said.with_(landmarks=torch.from_numpy(self.track.landmarks[rows]))

    def _at_rest_in_silence(self, said: Signals, talks: NDArray[np.float32]) -> Signals:
        """Return the signals with mouths at rest as far as nobody talks, (n,).  Nobody falls silent
        in the footage as a file does: predicted from nothing, mouths hang open."""
        if talks.min() == 1:
            return said
        share = torch.from_numpy(talks)[:, None, None]
        rest = self.player.at_rest(said).landmarks
        return said.with_(landmarks=share * said.landmarks + (1 - share) * rest)

    def scattered(self, frames: NDArray[Any]) -> Signals:
        """As `signals`, for frames (n,) that lie far apart: each one is computed by itself."""
        rows = [self.signals(frames[i : i + 1]) for i in range(len(frames))]
        together = (torch.cat(tensors) for tensors in zip(*map(unpacked, rows), strict=True))
        return repacked(rows[0], together)

    def chunks(self) -> Iterator[Signals]:
        """Yield the signals of all frames in order, CHUNK at a time."""
        for first in range(0, self.n_frames, CHUNK):
            yield self.signals(np.arange(first, min(first + CHUNK, self.n_frames)))


def with_available_motion(player: Player, moves: M, progress: Progress) -> M:
    """Return `moves`, with "footage" replaced by "auto" if a single picture is all the footage, but
    for eyes that a landmark track moves."""
    if len(player.run.drive()["pose"]) > 1:
        return moves
    has_lids = moves.landmarks is not None and landmark_track.read(moves.landmarks).eye is not None
    replaced = ("pose",) if has_lids else ("pose", "blink")
    instead = {k: "auto" for k in replaced if getattr(moves, k) == "footage"}
    if instead:
        what = " and ".join({"pose": "head", "blink": "lids"}[k] for k in instead)
        progress.note(f"one picture has no motion to replay: {what} move by --seed")
    return replace(
        moves, pose=instead.get("pose", moves.pose), blink=instead.get("blink", moves.blink)
    )


def check_motion(moves: MotionOptions) -> None:
    """Raise MisuseError or TalkheadError for motion options that cannot be met, before loading."""
    drives.make(drives.MOTIONLESS, 1, moves)
    if moves.landmarks is not None:
        landmark_track.read(moves.landmarks)


def poses_in_grid(player: Player) -> tuple[str, ...]:
    """Return the values of `--pose` that the marcher's occupancy covers.  For a run made from
    pictures they include "auto", since `enroll` seeds it from both sides."""
    alone = len(player.run.drive()["pose"]) == 1
    return ("footage", "still", "auto") if alone else ("footage", "still")


@contextmanager
def open_script(
    player: Player,
    speech: Path,
    moves: MotionOptions,
    progress: Progress,
    *,
    as_filmed: NDArray[np.int64] | None = None,
) -> Iterator[Script]:
    """Yield the script of a video of `speech` (any file with sound), in constant memory.

    as_filmed: (T,) rows of the footage to replay in order, one for each frame of the video that the
    faces are pasted back into
    """
    require_audio_track(speech)
    with tempfile.TemporaryDirectory(prefix="talkhead-") as folder:
        raw = Path(folder) / "speech.s16"
        n_samples = media.sound_to_file(speech, raw, on_warning=progress.note)
        n_frames = round(n_samples / SAMPLES_PER_FRAME)
        if n_frames < 1:
            raise TalkheadError(f"{speech.name} holds no sound to speak of; it is under 40 ms long")
        pcm: NDArray[np.int16] = np.memmap(raw, dtype=np.int16, mode="r", shape=(n_samples,))
        ear = backends.voice_of(player.run.meta()["speech"]["backend"])
        stats, silent = speech_stats(pcm, ear, player.stats)
        if silent:
            progress.note("the speech file is silent: the mouth will stay at rest")
        drive = drives.make(player.run.drive(), n_frames, moves, as_filmed=as_filmed)
        track = _track(player, moves.landmarks, n_frames)
        own_eyes = moves.blink != "footage" or as_filmed is not None
        if track is not None and moves.blink != "footage" and player.avatar.lids_in_landmarks:
            own_eyes = False
            progress.note(
                f"--blink moves nothing: the lids of run '{player.run.name}' are where --landmarks "
                "has them (give --blink when the track is made)"
            )
        lids = None if track is None or own_eyes else track.eye
        yield Script(player, pcm, ear, stats, drive, n_frames, track, lids, talking(pcm, n_frames))


def talking(pcm: NDArray[np.int16], n_frames: int) -> NDArray[np.float32]:
    """Return where somebody talks: (n_frames,), 1 from PAUSE_S before a sound to PAUSE_S after it,
    0 in silence, in which not even a room is heard, and between them evenly in EASE_S.
    """
    alive = np.zeros(n_frames, bool)
    at_once = STATS_S * FPS
    for first in range(0, n_frames, at_once):
        n = min(at_once, n_frames - first)
        block = np.zeros(n * SAMPLES_PER_FRAME, np.float32)
        part = pcm[first * SAMPLES_PER_FRAME :][: len(block)]
        block[: len(part)] = part * np.float32(PCM_SCALE)
        alive[first : first + n] = voice.is_audible(block, n, hold_s=0)
    if not alive.any():
        return np.zeros(n_frames, np.float32)
    away = ndimage.distance_transform_edt(~alive) / FPS  # s, from the nearest sound
    return (1 - (away - PAUSE_S) / EASE_S).clip(0, 1).astype(np.float32)


def require_audio_track(speech: Path) -> None:
    """Raise TalkheadError if the file has no audio track."""
    if not media.probe(speech).has_audio:
        raise TalkheadError(f"{speech.name} has no sound; give a file with speech")


def _track(player: Player, path: Path | None, n_frames: int) -> LandmarkTrack | None:
    if path is None:
        return None
    track = landmark_track.read(path)
    landmark_track.fits_film(track, n_frames, path)
    return track.on(neutral_of(player))


def neutral_of(player: Player) -> NDArray[np.float32]:
    """Return the neutral landmarks (68, 3); TalkheadError if landmarks do not drive the avatar."""
    rest = player.avatar.neutral
    if rest is None:
        raise TalkheadError(
            f"run '{player.run.name}' is not driven by landmarks; use a run of another method"
        )
    return rest.cpu().numpy().astype(np.float32)


def speech_stats(
    pcm: NDArray[np.int16], ear: Voice, footage: SpeechStats
) -> tuple[SpeechStats, bool]:
    """Return the statistics to standardise new speech by, and whether it is silent.

    Another microphone gives another spectrum: speech with at least OWN_STATS_S of sound is
    standardised by its own mean and standard deviation, taken in one pass and constant memory.
    """
    total = np.zeros(ear.n_features)
    square, count = total.copy(), 0
    hop, at_once = SAMPLE_RATE_HZ // ear.rate_hz, STATS_S * ear.rate_hz
    for first in range(0, len(pcm) // hop, at_once):
        n_rows = min(at_once, len(pcm) // hop - first)
        rows = ear.features(pcm, n_rows, first=first, scale=PCM_SCALE).astype(np.float64)
        block = pcm[first * hop : (first + n_rows) * hop] * np.float32(PCM_SCALE)
        loud = rows[voice.is_audible(block, n_rows, hold_s=0)]
        total += loud.sum(0)
        square += (loud**2).sum(0)
        count += len(loud)
    if count < OWN_STATS_S * ear.rate_hz:
        return footage, count == 0
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0)) + 1e-3
    return SpeechStats(mean.astype(np.float32), std.astype(np.float32), ear.rate_hz), False
