"""Any speech -> a finished film of the person, frame by frame, in constant memory."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkhead_cli import __version__, march, media
from talkhead_cli.contracts import (
    FPS,
    SAMPLES_PER_FRAME,
    Frame,
    MisuseError,
    Progress,
    Signals,
    TalkheadError,
)
from talkhead_cli.jobs import drive as drives
from talkhead_cli.jobs import hearing, player
from talkhead_cli.jobs.footage import SpeechStats, read_plate
from talkhead_cli.jobs.hearing import Voice
from talkhead_cli.jobs.player import Player
from talkhead_cli.store import Workspace
from talkhead_cli.store.files import sha256_of, write_json
from talkhead_cli.track import voice

PCM_SCALE = 1 / 32768
STATS_ROWS = 60 * voice.RATE_HZ
CHUNK = 50  # frames that hear together
OWN_STATS_S = 5.0  # speech shorter than this is standardised by the footage's statistics
DEPTH_UNIT = 1 / 8192  # face heights per step of the 16-bit depth film


@dataclass(frozen=True)
class Wishes:
    """What a render may be asked for, beside the speech."""

    pose: str = "footage"
    blink: str = "footage"
    background: str = "plate"
    alpha: bool = False
    depth: bool = False
    yaw_deg: float = 0.0
    pitch_deg: float = 0.0
    seed: int = 0


def render(
    home: Path,
    name: str,
    speech: Path,
    progress: Progress,
    *,
    out: Path | None = None,
    run_name: str | None = None,
    wishes: Wishes | None = None,
    device: str = "auto",
) -> list[Path]:
    """Film identity `name` saying `speech`; the paths of what was made, the film first.

    The film has round(25 * seconds of sound) frames.  A JSON sidecar and the container's
    metadata say that it is synthetic, and from what it was made.
    """
    wishes = wishes or Wishes()
    began = time.monotonic()
    space = Workspace.open(home, name)
    run, by_default = player.pick_run(space, run_name)
    if by_default:
        progress.note(f"run: {run.name}")
    out = out or Path(f"{name}-{speech.stem}").with_suffix(".webm" if wishes.alpha else ".mp4")
    if out.exists() and out.samefile(speech):
        raise MisuseError("the output would overwrite the speech file; give another -o")
    if not media.probe(speech).has_audio:
        raise TalkheadError(f"{speech.name} has no sound; give a file with speech")
    show = player.load(run, march.device_of(device))
    progress.note(f"marching: {show.note}")
    size = show.preset.data.size_px
    plate = _background(wishes.background, show.plate, size)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = [out]
    depth_out = out.with_name(out.stem + ".depth.mkv") if wishes.depth else None
    tags = _marks(space, show, speech)
    with tempfile.TemporaryDirectory(prefix="talkhead-") as folder:
        raw = Path(folder) / "speech.s16"
        n_samples = media.sound_to_file(speech, raw)
        n_frames = round(n_samples / SAMPLES_PER_FRAME)
        if n_frames < 1:
            raise TalkheadError(f"{speech.name} holds no sound to speak of; it is under 40 ms long")
        pcm: NDArray[np.int16] = np.memmap(raw, dtype=np.int16, mode="r", shape=(n_samples,))
        ear = hearing.voice_of(show.run.meta()["speech"]["backend"])
        stats, silent = speech_stats(pcm, ear, show.stats)
        if silent:
            progress.note("the speech file is silent: the mouth will stay at rest")
        moves = drives.make(
            show.run.drive(), n_frames, pose=wishes.pose, blink=wishes.blink,
            yaw_deg=wishes.yaw_deg, pitch_deg=wishes.pitch_deg, seed=wishes.seed,
        )  # fmt: skip
        if wishes.pose not in ("footage", "still") or wishes.yaw_deg or wishes.pitch_deg:
            at = np.unique(np.linspace(0, n_frames - 1, player.N_VIEWS).astype(int))
            show.open_views(_signals(show, pcm, ear, stats, moves, at))
        progress.stage("render", n_frames)
        with (
            media.VideoWriter(
                out, (size, size), audio=speech, crf=show.preset.render.crf, alpha=wishes.alpha,
                metadata=tags,
            ) as film,
            _maybe_depth(depth_out, size, tags) as depth_film,
        ):  # fmt: skip
            for frame in _frames(show, pcm, ear, stats, moves, n_frames, plate, wishes.alpha):
                film.write(_pixels(frame, wishes.alpha))
                if depth_film is not None:
                    depth_film.write(_depth(frame))
                progress.advance()
    if depth_out is not None:
        made.append(depth_out)
    seconds = time.monotonic() - began
    sidecar = out.with_name(out.name + ".json")
    write_json(sidecar, {
        "synthetic": True, **tags,
        "talkhead": __version__, "speech_sha256": sha256_of(speech), "film_sha256": sha256_of(out),
        "run_meta": {k: show.run.meta().get(k) for k in ("version", "steps", "source", "torch")},
        "consent": show.run.meta().get("consent", []),
        "options": vars(wishes), "frames": n_frames, "fps": FPS, "size_px": size,
        "depth_unit_face_heights": DEPTH_UNIT if depth_out else None,
        "seconds_taken": round(seconds, 2),
        "frames_per_second": round(n_frames / max(seconds, 1e-9), 2),
    })  # fmt: skip
    return [*made, sidecar]


def speech_stats(
    pcm: NDArray[np.int16], ear: Voice, footage: SpeechStats
) -> tuple[SpeechStats, bool]:
    """Statistics to standardise new speech by, and whether it is silent.

    A voice from another microphone has another spectrum: long enough speech is standardised
    by its own mean and spread, read in one pass of constant memory.
    """
    total = np.zeros(ear.n_features)
    square, count = total.copy(), 0
    for first in range(0, len(pcm) // voice.HOP, STATS_ROWS):
        n_rows = min(STATS_ROWS, len(pcm) // voice.HOP - first)
        rows = ear.features(pcm, n_rows, first=first, scale=PCM_SCALE).astype(np.float64)
        block = pcm[first * voice.HOP : (first + n_rows) * voice.HOP] * np.float32(PCM_SCALE)
        loud = rows[voice.heard(block, n_rows, hold_s=0)]
        total += loud.sum(0)
        square += (loud**2).sum(0)
        count += len(loud)
    if count < OWN_STATS_S * voice.RATE_HZ:
        return footage, count == 0
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0)) + 1e-3
    return SpeechStats(mean.astype(np.float32), std.astype(np.float32)), False


def _signals(
    show: Player,
    pcm: NDArray[np.int16],
    ear: Voice,
    stats: SpeechStats,
    moves: drives.Drive,
    frames: NDArray[Any],
) -> Signals:
    """Signals of chosen frames of the film, after listening."""
    n_steps = show.preset.data.window
    per_frame = voice.RATE_HZ // FPS
    low = max(0, int(frames.min()) - n_steps // (2 * per_frame) - 1)
    high = min(len(pcm) // voice.HOP, (int(frames.max()) + 2) * per_frame + n_steps)
    stream = ear.features(pcm, high - low * per_frame, first=low * per_frame, scale=PCM_SCALE)
    pose, body = moves.pose(frames)
    eye, gaze, brow = moves.eyes(frames)
    window = stats.windows(stream, frames - low, n_steps)
    tensor = {
        k: torch.from_numpy(np.asarray(v, np.float32))
        for k, v in {"pose": pose, "body": body, "eye": eye, "gaze": gaze, "brow": brow}.items()
    }
    camera = moves.camera(np.asarray(pose), show.preset.data.size_px)
    return show.listen(player.still_signals(torch.from_numpy(window), camera, **tensor))


def _frames(
    show: Player,
    pcm: NDArray[np.int16],
    ear: Voice,
    stats: SpeechStats,
    moves: drives.Drive,
    n_frames: int,
    plate: Tensor,
    alpha: bool,
) -> Iterator[Frame]:
    behind = torch.zeros_like(plate) if alpha else plate
    for first in range(0, n_frames, CHUNK):
        frames = np.arange(first, min(first + CHUNK, n_frames))
        for frame, _ in show.pictures(_signals(show, pcm, ear, stats, moves, frames), behind):
            yield frame


def _pixels(frame: Frame, alpha: bool) -> NDArray[np.uint8]:
    """(H, W, 3) or, with straight alpha, (H, W, 4) uint8."""
    rgb, opacity = frame.rgb[0].float(), frame.alpha[0].float()
    if alpha:
        rgb = torch.cat([rgb / opacity.clamp_min(1e-3), opacity], -1)
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _depth(frame: Frame) -> NDArray[np.uint16]:
    """Distance of what is hit in DEPTH_UNIT face heights (H, W), 65535 where nothing is."""
    opacity = frame.alpha[0, ..., 0].float().cpu()
    distance = frame.depth[0, ..., 0].float().cpu() / opacity.clamp_min(1e-3)
    steps = (distance / DEPTH_UNIT).round().clamp(0, 65_535)
    return torch.where(opacity > 0.5, steps, 65_535.0).numpy().astype(np.uint16)


def _background(wanted: str, plate: Tensor, size_px: int) -> Tensor:
    """plate, #rrggbb or a picture file -> (s, s, 3) in [0, 1]."""
    if wanted == "plate":
        return plate
    if re.fullmatch(r"#[0-9a-fA-F]{6}", wanted):
        colour = torch.tensor([int(wanted[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return colour.expand(size_px, size_px, 3).contiguous()
    path = Path(wanted)
    if not path.is_file():
        raise TalkheadError(
            f"--background {wanted}: give 'plate', a colour like #00ff00, or a picture file"
        )
    return read_plate(path, size_px)


def _maybe_depth(path: Path | None, size: int, tags: dict[str, str]) -> Any:
    from contextlib import nullcontext

    if path is None:
        return nullcontext()
    return media.VideoWriter(path, (size, size), gray16=True, metadata=tags)


def _marks(space: Workspace, show: Player, speech: Path) -> dict[str, str]:
    """What the container's metadata says."""
    return {
        "comment": "synthetic: made by talkhead, this person did not say this",
        "talkhead_synthetic": "true",
        "talkhead_version": __version__,
        "talkhead_avatar": f"{space.id}/{show.run.name}",
        "talkhead_speech": speech.name,
        "talkhead_consent": ", ".join(show.run.meta().get("consent", [])) or "none recorded",
    }
