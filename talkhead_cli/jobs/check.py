"""Is a film worth hours of training?  A verdict beforehand, point by point, with the cure.

Looks at pieces of ten seconds, spread over the film, at their own size; nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, Progress, TalkheadError
from talkhead_cli.track import face, lipsync, pose, voice
from talkhead_cli.track.scout import scout
from talkhead_cli.track.shots import THUMB, CutFinder, thumb

Array = NDArray[np.floating[Any]]

PIECE, MAX_PIECES = 10 * FPS, 4
MAX_SIDE = 1280
FACE_PX = 220  # height of a face at which sharpness is judged: what training at 512 px sees
# What counts, and from where on: (warn, fail).  Looked at on a handful of clips that track well,
# and on the synthetic speaker blurred, darkened and shaken; not fitted to outcomes of training.
LIMITS = {
    "seconds": (12.0, 3.0), "head": (150.0, 48.0), "found": (0.95, 0.5), "sharp": (0.045, 0.02),
    "dark": (55.0, 30.0), "burnt": (0.05, 0.25), "turn": (25.0, 45.0), "lips": (0.03, 0.008),
    "level": (-40.0, -60.0), "snr": (15.0, 6.0), "clipped": (0.001, 0.02), "late": (0.06, 1.0),
    "moving": (6.0, 25.0),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One point: verdict is pass, warn, fail or unknown; cure says what to do about it."""

    name: str
    verdict: str
    found: str
    cure: str = ""


@dataclass
class Report:
    """What was found, and the figures it rests on."""

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        said = {finding.verdict for finding in self.findings}
        return next((v for v in ("fail", "warn") if v in said), "pass")

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"verdict": self.verdict, "findings": [asdict(f) for f in self.findings],
                "figures": self.figures}  # fmt: skip

    def more(self, name: str, key: str, value: float, found: str, cure: str) -> None:
        """More is better."""
        self._add(name, key, value, found, cure, lambda limit: value < limit)

    def less(self, name: str, key: str, value: float, found: str, cure: str) -> None:
        """Less is better."""
        self._add(name, key, value, found, cure, lambda limit: value > limit)

    def _add(
        self, name: str, key: str, value: float, found: str, cure: str,
        misses: Callable[[float], bool],
    ) -> None:  # fmt: skip
        warn, fail = LIMITS[key]
        verdict = "fail" if misses(fail) else "warn" if misses(warn) else "pass"
        self.figures[key] = round(float(value), 4)
        self.findings.append(Finding(name, verdict, found, "" if verdict == "pass" else cure))


@dataclass(frozen=True)
class _Piece:
    """Ten seconds or less: where it begins, mesh (T, 478, 3) in pixels of the pictures looked at,
    found (T,), sharpness (T,), light (T, 2) mean and burnt share, thumbs."""

    first: int
    mesh: Array
    found: NDArray[np.bool_]
    sharpness: Array
    light: Array
    thumbs: Array


def check(video: Path, progress: Progress) -> Report:
    """Look at a film.

    A file that cannot be read as a film raises; all else is a finding.
    """
    about = media.probe(video)
    if not about.has_video:
        raise TalkheadError(f"{video.name} has no picture; give a video of somebody talking")
    report = Report()
    report.more("length", "seconds", about.duration_s, f"{about.duration_s:.1f} s",
                "film at least 20 s of talking; a minute looks good")  # fmt: skip
    if report.verdict == "fail":
        return report
    progress.stage("looking for faces")
    size = (about.width, about.height)
    scene = scout(media.frames(video, max_side=640, stride=FPS // 2), size)
    if scene.n_faces > 1:
        report.findings.append(Finding(
            "faces", "warn", f"{scene.n_faces} people", "preprocess --face left|right|largest"
        ))  # fmt: skip
    pieces = _pieces(report, video, about.duration_s, scene.roi, progress)
    scale = max(scene.roi[2], scene.roi[3]) / min(MAX_SIDE, max(scene.roi[2], scene.roi[3]))
    found = np.concatenate([p.found for p in pieces])
    report.more("face", "found", float(found.mean()), f"in {found.mean():.0%} of the frames",
                "film one person who faces the camera all the time")  # fmt: skip
    if not found.any():
        return report
    _picture(report, pieces, scale)
    _motion(report, pieces, (scene.roi[2] / scale, scene.roi[3] / scale))
    _sound(report, video, about, pieces)
    return report


def _pieces(
    report: Report, video: Path, seconds: float, roi: tuple[int, int, int, int],
    progress: Progress,
) -> list[_Piece]:  # fmt: skip
    """What can be looked at: the picture may end before the sound, or the file be cut short."""
    pieces: list[_Piece] = []
    for first, n in _spread(seconds):
        try:
            pieces.append(_look(video, first, n, roi, progress))
        except TalkheadError:
            if not pieces:
                raise
            if seconds - first / FPS > 1:
                report.findings.append(Finding(
                    "picture", "warn", f"none from {first / FPS:.0f} s on, of {seconds:.0f} s",
                    "copy the file anew from the camera, if it should be whole"
                ))  # fmt: skip
            break
    return pieces


def _spread(seconds: float) -> list[tuple[int, int]]:
    """First frame and number of frames of the pieces."""
    total = int(seconds * FPS)
    if total <= PIECE * MAX_PIECES:
        return [(a, min(PIECE, total - a)) for a in range(0, total, PIECE)]
    starts = np.linspace(0, total - PIECE, MAX_PIECES).astype(int)
    return [(int(a), PIECE) for a in starts]


def _look(
    video: Path, first: int, n: int, roi: tuple[int, int, int, int], progress: Progress
) -> _Piece:
    shrink = min(1.0, MAX_SIDE / max(roi[2], roi[3]))
    size = (max(2, round(roi[2] * shrink)), max(2, round(roi[3] * shrink)))
    progress.stage(f"frames from {first / FPS:.0f} s on", n)
    rows: dict[str, list[Any]] = {k: [] for k in ("mesh", "sharp", "light", "thumb")}
    blank = np.full((face.N_MESH, 3), np.nan, np.float32)
    with face.FaceMesh() as mesh:
        for rgb in _frames(video, first, n, roi, size):
            seen = mesh(rgb)
            rows["mesh"].append(blank if seen is None else seen)
            rows["thumb"].append(thumb(rgb))
            rows["sharp"].append(np.nan if seen is None else _sharpness(rgb, seen))
            rows["light"].append((np.nan, np.nan) if seen is None else _light(rgb, seen))
            progress.advance()
    if not rows["mesh"]:
        raise TalkheadError(f"{video.name} cannot be read from {first / FPS:.0f} s on")
    points = np.stack(rows["mesh"])
    return _Piece(
        first, points, ~np.isnan(points[:, 0, 0]), np.array(rows["sharp"]),
        np.array(rows["light"]), np.stack(rows["thumb"]),
    )  # fmt: skip


def _frames(
    video: Path, first: int, n: int, roi: tuple[int, int, int, int], size: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    return media.frames(video, start_s=first / FPS, n_frames=n, crop=roi, size=size)


def _sharpness(rgb: NDArray[np.uint8], mesh: Array) -> float:
    """Fine detail at eyes and mouth against all detail there, in [0, 1]: 0 is blurred."""
    height = float(np.linalg.norm(mesh[face.TOP, :2] - mesh[face.CHIN, :2]))
    points = face.to_68(mesh)[36:68, :2]
    low, high = points.min(0) - 0.05 * height, points.max(0) + 0.05 * height
    x0, y0 = np.maximum(low.astype(int), 0)
    x1, y1 = np.minimum(high.astype(int) + 1, rgb.shape[1::-1])
    if x1 - x0 < 8 or y1 - y0 < 8:
        return 0.0
    grey = cv2.cvtColor(np.ascontiguousarray(rgb[y0:y1, x0:x1]), cv2.COLOR_RGB2GRAY)
    scale = FACE_PX / height
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=way).astype(np.float32)
    fine = grey - cv2.GaussianBlur(grey, (0, 0), 1.2)
    return float(fine.std() / max(grey.std(), 1e-3))


def _light(rgb: NDArray[np.uint8], mesh: Array) -> tuple[float, float]:
    """Mean brightness of the face, 0 to 255, and the share of it that is burnt out."""
    low, high = mesh[:, :2].min(0).astype(int).clip(0), mesh[:, :2].max(0).astype(int)
    part = rgb[low[1] : high[1] : 2, low[0] : high[0] : 2]
    if part.size == 0:
        return 0.0, 0.0
    return float(part.mean()), float((part >= 252).all(-1).mean())


def _picture(report: Report, pieces: list[_Piece], scale: float) -> None:
    """Size, sharpness, light."""
    points = np.concatenate([p.mesh[p.found] for p in pieces])
    height = np.linalg.norm(points[:, face.TOP, :2] - points[:, face.CHIN, :2], axis=1) * scale
    tall = float(np.median(height))
    report.more(
        "head", "head", tall, f"face {tall:.0f} px tall", "film closer, or at a larger size"
    )
    sharp = float(np.nanmedian(np.concatenate([p.sharpness for p in pieces])))
    report.more("sharpness", "sharp", sharp, f"{sharp:.3f} at eyes and mouth",
                "focus on the eyes, hold the camera still, keep the bit rate up")  # fmt: skip
    light, burnt = np.nanmedian(np.concatenate([p.light for p in pieces]), axis=0)
    report.more("light", "dark", float(light), f"face at {light:.0f} of 255",
                "light the face from the front")  # fmt: skip
    report.less("highlights", "burnt", float(burnt), f"{burnt:.1%} of the face burnt out",
                "soften the light, or expose less")  # fmt: skip


def _motion(report: Report, pieces: list[_Piece], size: tuple[float, float]) -> None:
    """Turns of the head, what the mouth does, blinks, cuts, what moves behind."""
    turns, gaps, cuts, still = [], [], [], []
    lips = np.concatenate([face.lip_aperture(p.mesh[p.found]) for p in pieces])
    for piece in pieces:
        cuts += [piece.first + at for at in _cuts(piece)]
        still.append(_background_motion(piece, size))
        if piece.found.sum() < FPS:
            continue
        points = face.fill_gaps(piece.mesh, piece.found)
        head = pose.fit_head(points, piece.found, (round(size[0]), round(size[1])))
        turns.append(Rotation.from_matrix(head.rotation).as_euler("yxz", degrees=True))
        gaps.append(face.lid_gap(piece.mesh[piece.found]).mean(1))
    if turns:
        angles = np.concatenate(turns)
        away = np.percentile(np.abs(angles - np.median(angles, 0))[:, :2].max(1), 98)
        facing = float(np.abs(np.median(angles[:, 0])))
        report.less("turns", "turn", max(away, facing),
                    f"up to {away:.0f} degrees from a middle that is turned by {facing:.0f}",
                    "face the camera; views beyond 30 degrees are learnt badly")  # fmt: skip
    spread = float(np.percentile(lips, 95) - np.percentile(lips, 5))
    report.more("mouth shapes", "lips", spread, f"opens by {spread:.3f} face heights",
                "talk, clearly and all the time")  # fmt: skip
    blinks = sum(_blinks(gap) for gap in gaps)
    minutes = sum(len(gap) for gap in gaps) / FPS / 60
    rate = blinks / max(minutes, 1e-6)
    report.figures["blinks_per_minute"] = round(rate, 2)
    report.findings.append(Finding(
        "blinks", "pass" if blinks else "warn", f"{rate:.0f} a minute",
        "" if blinks else "shut eyes are never shown and will be guessed; film longer"
    ))  # fmt: skip
    report.figures["cuts"] = len(cuts)
    where = " at " + ", ".join(f"{cut / FPS:.1f} s" for cut in cuts[:5]) if cuts else ""
    report.findings.append(Finding(
        "cuts", "warn" if cuts else "pass", f"{len(cuts)} found{where}",
        "preprocess keeps the picture that shows most of the face; better film in one go"
        if cuts else ""
    ))  # fmt: skip
    report.less("background", "moving", float(np.median(still)),
                f"changes by {np.median(still):.1f} of 255 within a second",
                "put the camera on a stand, before something that does not move")  # fmt: skip


def _cuts(piece: _Piece) -> list[int]:
    """Frames that begin a shot."""
    begins = CutFinder()
    return [i for i, small in enumerate(piece.thumbs) if begins(small)]


def _background_motion(piece: _Piece, size: tuple[float, float]) -> float:
    """How much the upper corners change within a second, of 255; they rarely hold anybody."""
    away = min(FPS, len(piece.thumbs) - 1)
    if away < 1:
        return 0.0
    height = THUMB[1] // 3
    sides = np.concatenate([piece.thumbs[:, :height, :10], piece.thumbs[:, :height, -10:]], 2)
    return float(np.median(np.abs(sides[away:] - sides[:-away]).mean((1, 2, 3))))


def _blinks(gap: Array) -> int:
    shut = gap < 0.5 * np.median(gap)
    return int((np.diff(np.concatenate([[False], shut]).astype(int)) == 1).sum())


def _sound(report: Report, video: Path, about: media.Probe, pieces: list[_Piece]) -> None:
    """Level, noise, clipping, and whether it goes with the lips."""
    if not about.has_audio:
        report.findings.append(Finding(
            "sound", "fail", "none", "film with sound; preprocess --no-audio tracks pictures alone"
        ))  # fmt: skip
        return
    samples = media.sound(video, n_samples=int(about.duration_s * SAMPLE_RATE_HZ))
    loud = np.sqrt((_blocks(samples) ** 2).mean(1) + 1e-12)
    level = 20 * np.log10(np.percentile(loud, 90))
    report.more("sound", "level", float(level), f"{level:.0f} dBFS",
                "come nearer to the microphone, or raise its gain")  # fmt: skip
    if level < LIMITS["level"][1]:
        return
    noise = 20 * np.log10(np.percentile(loud, 90) / max(np.percentile(loud, 5), 1e-6))
    report.more("noise", "snr", float(noise), f"speech {noise:.0f} dB above the background",
                "film in a quiet room, without music")  # fmt: skip
    over = float((np.abs(samples) > 0.985).mean())
    report.less("clipping", "clipped", over, f"{over:.2%} of the samples", "lower the gain")
    _lips_and_sound(report, samples, pieces)


def _blocks(samples: NDArray[np.float32]) -> Array:
    """Samples in blocks of 50 ms."""
    n = SAMPLE_RATE_HZ // 20
    usable = len(samples) // n * n
    return samples[:usable].reshape(-1, n).astype(np.float64)


def _lips_and_sound(
    report: Report, samples: NDArray[np.float32], pieces: list[_Piece]
) -> None:
    stream = voice.features(samples)
    frames, lips = [], []
    for piece in pieces:
        rows = np.flatnonzero(piece.found)
        if len(rows) >= FPS:
            lips.append(lipsync.lip_motion(face.fill_gaps(piece.mesh, piece.found))[rows])
            frames.append(piece.first + rows)
    found = lipsync.measure(stream, np.concatenate(frames), np.concatenate(lips)) if lips else None
    if found is None or not found.is_sure:
        why = "too short to tell" if found is None else "not clear"
        report.findings.append(Finding(
            "lip sync", "unknown", why,
            "watch whether the lips go with the sound; preprocess --offset SECONDS puts it right"
        ))  # fmt: skip
        return
    late = found.sound_after_lips_s
    report.figures |= {"sync_margin": round(found.margin, 4), "sound_after_lips_s": round(late, 4)}
    report.less("lip sync", "late", abs(late), f"sound {found}", "preprocess puts it right")
