"""Predict landmarks from speech and write them as a track that users can view and edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli import march
from talkhead_cli.contracts import FPS, MisuseError, Progress, Signals, TalkheadError
from talkhead_cli.jobs import landmark_track, script
from talkhead_cli.jobs.drive import MotionOptions
from talkhead_cli.jobs.landmark_track import LandmarkTrack
from talkhead_cli.jobs.player import Player, eight_bits
from talkhead_cli.jobs.runs import pick_run
from talkhead_cli.store import Workspace
from talkhead_cli.store.files import refuse_foreign
from talkhead_cli.store.pictures import software_of, write_png

MAX_GAIN = 5.0
N_SHOWN, SHOWN_PX, CURVE_PX = 8, 256, 128
# The iBUG order as lines: jaw, brows, nose, eyes, lips; eyes and lips (CLOSED on) are closed.
LINES = ((0, 17), (17, 22), (22, 27), (27, 31), (31, 36), (36, 42), (42, 48), (48, 60), (60, 68))
CLOSED = 36
INK, PAPER = (80, 255, 80), 24
SOFTWARE = "talkhead landmarks"  # in the pictures, which are known by it


def landmarks(
    home: Path,
    name: str,
    speech: Path,
    progress: Progress,
    *,
    out: Path | None = None,
    run_name: str | None = None,
    moves: MotionOptions | None = None,
    lips: float = 1.0,
    jaw: float = 1.0,
    picture: bool = True,
    device: str = "auto",
) -> list[Path]:
    """Predict identity `name`'s landmarks from `speech`; return the paths of track and picture.

    lips, jaw: gains on their displacement from the neutral face.
    """
    for option, gain in (("--lips", lips), ("--jaw", jaw)):
        if not 0 <= gain <= MAX_GAIN:  # nan is refused too
            raise MisuseError(f"{option} must lie between 0 and {MAX_GAIN:.0f}")
    space = Workspace.open(home, name)
    run = pick_run(space, run_name, progress)
    out = out or Path(f"{name}-{speech.stem}.npz")
    if out.suffix != ".npz":
        raise MisuseError(f"{out}: a landmark track is a .npz file")
    ours = {out: _is_track, out.with_suffix(".png"): _is_sheet}
    refuse_foreign(ours if picture else {out: _is_track}, SOFTWARE)
    player = Player.load(run, march.device_of(device))
    moves = script.with_available_motion(player, moves or MotionOptions(), progress)
    neutral = script.neutral_of(player)
    marks, eyes = [], []
    with script.open_script(player, speech, moves, progress) as told:
        progress.stage("listen", told.n_frames)
        for signals in told.chunks():
            marks.append(signals.landmarks.numpy())
            eyes.append(signals.eye.numpy())
            progress.advance(len(signals))
        track = LandmarkTrack(np.concatenate(marks), neutral, np.concatenate(eyes))
        track = track.louder(lips, jaw)
        out.parent.mkdir(parents=True, exist_ok=True)
        landmark_track.write(out, track)
        made = [out]
        if picture:
            shown = np.unique(np.linspace(0, told.n_frames - 1, N_SHOWN).round().astype(int))
            progress.stage("picture", len(shown))
            tiles = []
            for frame in shown:
                signals = told.signals(np.array([frame]))
                tiles.append(
                    _drawn(
                        player,
                        signals.with_(
                            landmarks=signals.landmarks.new_tensor(
                                track.landmarks[frame : frame + 1]
                            )
                        ),
                    )
                )
                progress.advance()
            made.append(out.with_suffix(".png"))
            sheet = np.concatenate([np.concatenate(tiles, 1), _curve(track, shown)], 0)
            write_png(made[-1], sheet, software=SOFTWARE)
    return made


def _is_track(path: Path) -> bool:
    try:
        landmark_track.read(path)
    except TalkheadError:
        return False
    return True


def _is_sheet(path: Path) -> bool:
    return software_of(path) == SOFTWARE


def _drawn(player: Player, signals: Signals) -> NDArray[np.uint8]:
    """Render one frame (SHOWN_PX, SHOWN_PX, 3) and draw its landmarks over it."""
    frame, _ = next(player.pictures(signals))
    canvas = cv2.resize(eight_bits(frame), (SHOWN_PX, SHOWN_PX), interpolation=cv2.INTER_CUBIC)
    camera = signals.camera.resized(SHOWN_PX)
    c2w, k = camera.c2w[0].numpy(), camera.k[0].numpy()
    seen = (signals.landmarks[0].numpy() - c2w[:3, 3]) @ c2w[:3, :3] @ k.T
    at = seen[:, :2] / seen[:, 2:]
    for first, end in LINES:
        points = (at[first:end] * 16).round().astype(np.int32)[:, None]
        cv2.polylines(canvas, [points], first >= CLOSED, INK, 1, cv2.LINE_AA, shift=4)
    return np.asarray(canvas, np.uint8)


def _curve(track: LandmarkTrack, shown: NDArray[Any]) -> NDArray[np.uint8]:
    """Plot the opening of the lips over time; the shown frames are marked, in seconds."""
    width = SHOWN_PX * len(shown)
    canvas = np.full((CURVE_PX, width, 3), PAPER, np.uint8)
    gap = track.lip_gap
    top = max(float(gap.max()), 1e-6)
    x = (np.arange(len(gap)) + 0.5) / len(gap) * width
    y = CURVE_PX - 24 - gap.clip(0) / top * (CURVE_PX - 34)
    line = (np.stack([x, y], 1) * 16).round().astype(np.int32)[:, None]
    cv2.polylines(canvas, [line], False, INK, 1, cv2.LINE_AA, shift=4)
    for frame in shown:
        at = int(x[frame])
        cv2.line(canvas, (at, 0), (at, CURVE_PX - 20), (110, 110, 110), 1)
        where = (min(at + 3, width - 60), CURVE_PX - 6)
        text = f"{frame / FPS:.2f} s"
        cv2.putText(canvas, text, where, cv2.FONT_HERSHEY_PLAIN, 0.9, (200,) * 3, 1, cv2.LINE_AA)
    return canvas
