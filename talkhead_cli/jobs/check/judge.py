"""The criteria that a video is judged by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from talkhead_cli import media
from talkhead_cli.contracts import FPS, SAMPLE_RATE_HZ, Progress, TalkheadError
from talkhead_cli.jobs.check.look import MAX_SIDE, Piece, pieces_of
from talkhead_cli.jobs.check.report import LIMITS, Array, Curve, Finding, Report, Segment
from talkhead_cli.jobs.stages import MIN_SECONDS
from talkhead_cli.track import face, lipsync, voice
from talkhead_cli.track.captions import CaptionFinder
from talkhead_cli.track.crop import ABOVE_CENTRE, HEIGHTS_PER_SIDE
from talkhead_cli.track.cuts import THUMB, CutFinder
from talkhead_cli.track.scout import scout

LONG_S = 60.0  # a video twice as long or longer gets a part of this length recommended
VIEWS = 15.0  # degrees; a larger range of head rotation scores no higher
MANY_BLINKS = 60.0  # a minute; people blink 10 to 30 times, so more are flutter or misreadings


def check(video: Path, progress: Progress) -> Report:
    """Judge a video.

    TalkheadError if the file cannot be read as a video; any other problem is a finding.
    """
    about = media.probe(video)
    if not about.has_video:
        raise TalkheadError(f"{video.name} has no picture; give a video of somebody talking")
    report = Report()
    report.more(
        "length",
        "seconds",
        about.duration_s,
        f"{about.duration_s:.1f} s",
        "film at least 20 s of talking; a minute looks good",
    )
    if report.verdict == "fail":
        return report
    progress.stage("looking for faces")
    size = (about.width, about.height)
    scene = scout(media.frames(video, max_side=640, stride=FPS // 2), size)
    if scene.n_faces > 1:
        report.findings.append(
            Finding(
                "faces", "warn", f"{scene.n_faces} people", "preprocess --face left|right|largest"
            )
        )
    captions = CaptionFinder()
    pieces = pieces_of(report, video, about.duration_s, scene.roi, captions, progress)
    scale = max(scene.roi[2], scene.roi[3]) / min(MAX_SIDE, max(scene.roi[2], scene.roi[3]))
    found = np.concatenate([p.found for p in pieces])
    report.more(
        "face",
        "found",
        float(found.mean()),
        f"in {found.mean():.0%} of the frames",
        "film one person who faces the camera all the time",
    )
    if not found.any():
        return report
    _picture(report, pieces, scale)
    _motion(report, pieces)
    _captions(report, pieces, captions, scene.roi[3] / scale)
    samples = _sound(report, video, about)
    stream = None if samples is None else voice.features(samples)
    if stream is not None and report.figures["level"] >= LIMITS["level"][1]:
        _lips_and_sound(report, stream, pieces)
    report.pictures = [(p.first / FPS, p.shown) for p in pieces]
    report.segments = _segments(pieces, stream)
    report.curves = _curves(pieces, samples)
    _best_part(report, about.duration_s)
    return report


def _picture(report: Report, pieces: list[Piece], scale: float) -> None:
    """Judge the size, sharpness and lighting of the face."""
    points = np.concatenate([p.mesh[p.found] for p in pieces])
    height = face.face_height(points[..., :2]) * scale
    tall = float(np.median(height))
    report.more(
        "head", "head", tall, f"face {tall:.0f} px tall", "film closer, or at a larger size"
    )
    sharp = float(np.nanmedian(np.concatenate([p.sharpness for p in pieces])))
    report.more(
        "sharpness",
        "sharp",
        sharp,
        f"{sharp:.3f} at eyes and mouth",
        "focus on the eyes, hold the camera still, keep the bit rate up",
    )
    light, burnt = np.nanmedian(np.concatenate([p.light for p in pieces]), axis=0)
    report.more(
        "light",
        "dark",
        float(light),
        f"face at {light:.0f} of 255",
        "light the face from the front",
    )
    report.less(
        "highlights",
        "burnt",
        float(burnt),
        f"{burnt:.1%} of the face burnt out",
        "soften the light, or expose less",
    )


def _motion(report: Report, pieces: list[Piece]) -> None:
    """Judge head rotation, mouth range, blinks, cuts and background motion."""
    turns, gaps, cuts, still = [], [], [], []
    lips = np.concatenate([face.lip_aperture(p.mesh[p.found]) for p in pieces])
    for piece in pieces:
        cuts += [piece.first + at for at in _cuts(piece)]
        if len(piece.found) > FPS:
            still.append(_background_motion(piece))
        if piece.found.sum() < FPS:
            continue
        turns.append(piece.angles)
        gaps.append(face.lid_gap(piece.mesh[piece.found]).mean(1))
    if turns:
        angles = np.concatenate(turns)
        away = np.percentile(np.abs(angles - np.median(angles, 0))[:, :2].max(1), 98)
        facing = float(np.abs(np.median(angles[:, 0])))
        report.less(
            "turns",
            "turn",
            max(away, facing),
            f"up to {away:.0f} degrees from a middle that is turned by {facing:.0f}",
            "face the camera; views beyond 30 degrees are learnt badly",
        )
    spread = float(np.percentile(lips, 95) - np.percentile(lips, 5))
    report.more(
        "mouth shapes",
        "lips",
        spread,
        f"opens by {spread:.3f} face heights",
        "talk, clearly and all the time",
    )
    blinks = sum(face.n_blinks(gap) for gap in gaps)
    minutes = sum(len(gap) for gap in gaps) / FPS / 60
    rate = blinks / max(minutes, 1e-6)
    report.figures["blinks_per_minute"] = round(rate, 2)
    cure = "shut eyes are never shown and will be guessed; film longer" if not blinks else ""
    if rate > MANY_BLINKS:
        cure = "the lids are hard to see, or flutter: light the eyes, keep the head up"
    report.findings.append(
        Finding("blinks", "warn" if cure else "pass", f"{rate:.0f} a minute", cure)
    )
    report.figures["cuts"] = len(cuts)
    where = " at " + ", ".join(f"{cut / FPS:.1f} s" for cut in cuts[:5]) if cuts else ""
    where += ", ..." if len(cuts) > 5 else ""
    report.findings.append(
        Finding(
            "cuts",
            "warn" if cuts else "pass",
            f"{len(cuts)} found{where}",
            "preprocess keeps the picture that shows most of the face; better film in one go"
            if cuts
            else "",
        )
    )
    moving = float(np.median(still)) if still else 0.0
    report.less(
        "background",
        "moving",
        moving,
        f"changes by {moving:.1f} of 255 within a second",
        "put the camera on a stand, before something that does not move",
    )


def _captions(
    report: Report, pieces: list[Piece], captions: CaptionFinder, height_px: float
) -> None:
    """Judge whether captions cover the crop; `height_px`: height of the analysed pictures."""
    if captions.lines is None:
        return
    top, bottom = (share * height_px for share in captions.lines)
    points = np.concatenate([p.mesh[p.found] for p in pieces])[..., 1]
    middle = float(np.median(points.min(1) + points.max(1))) / 2
    tall = float(np.median(points[:, face.CHIN] - points[:, face.TOP]))
    above, below = (HEIGHTS_PER_SIDE * (0.5 + by) * tall for by in (-ABOVE_CENTRE, ABOVE_CENTRE))
    over = middle - above < bottom and top < middle + below
    report.findings.append(
        Finding(
            "captions",
            "warn" if over else "pass",
            "burnt in over the chest" if over else "burnt in, below what is cut out",
            "take the video without them: they are learnt as if they were part of the person"
            if over
            else "",
        )
    )


def _cuts(piece: Piece) -> list[int]:
    """Return the frames that begin a shot."""
    begins = CutFinder()
    return [i for i, small in enumerate(piece.thumbs) if begins(small)]


def _background_motion(piece: Piece) -> float:
    """Return the change of the upper corners, which rarely show the person, in 1 s, of 255."""
    away = min(FPS, len(piece.thumbs) - 1)
    if away < 1:
        return 0.0
    height = THUMB[1] // 3
    sides = np.concatenate([piece.thumbs[:, :height, :10], piece.thumbs[:, :height, -10:]], 2)
    return float(np.median(np.abs(sides[away:] - sides[:-away]).mean((1, 2, 3))))


def _sound(report: Report, video: Path, about: media.Probe) -> NDArray[np.float32] | None:
    """Judge level, noise and clipping of the sound; return the samples, if there are any."""
    if not about.has_audio:
        report.findings.append(
            Finding(
                "sound",
                "fail",
                "none",
                "film with sound; preprocess --no-audio tracks pictures alone",
            )
        )
        return None
    try:
        samples = media.sound(video, n_samples=int(about.duration_s * SAMPLE_RATE_HZ))
    except TalkheadError as error:
        cure = "save the video again, or film anew; preprocess --no-audio tracks pictures alone"
        report.findings.append(Finding("sound", "fail", str(error), cure))
        return None
    loud = np.sqrt((_blocks(samples) ** 2).mean(1) + 1e-12)
    level = 20 * np.log10(np.percentile(loud, 90))
    report.more(
        "sound",
        "level",
        float(level),
        f"{level:.0f} dBFS",
        "come nearer to the microphone, or raise its gain",
    )
    if level < LIMITS["level"][1]:
        return samples
    noise = 20 * np.log10(np.percentile(loud, 90) / max(np.percentile(loud, 5), 1e-6))
    report.more(
        "noise",
        "snr",
        float(noise),
        f"speech {noise:.0f} dB above the background",
        "film in a quiet room, without music",
    )
    dead = float(1 - voice.is_audible(samples, int(about.duration_s * FPS)).mean())
    report.less(
        "dead sound",
        "dead",
        dead,
        f"in {dead:.0%} of the video",
        "check the microphone; speech is not learnt from that part",
    )
    over = float((np.abs(samples) > 0.985).mean())
    report.less("clipping", "clipped", over, f"{over:.2%} of the samples", "lower the gain")
    return samples


def _blocks(samples: NDArray[np.float32]) -> Array:
    """Return samples in blocks of 50 ms, (n, 800)."""
    n = SAMPLE_RATE_HZ // 20
    usable = len(samples) // n * n
    return samples[:usable].reshape(-1, n).astype(np.float64)


def _lips_and_sound(report: Report, stream: NDArray[np.float32], pieces: list[Piece]) -> None:
    """Judge lip sync by speech features (rows, A) of the video and the lips of its pieces."""
    frames, lips = [], []
    for piece in pieces:
        rows = np.flatnonzero(piece.found)
        if len(rows) >= FPS:
            lips.append(lipsync.lip_motion(face.fill_gaps(piece.mesh, piece.found))[rows])
            frames.append(piece.first + rows)
    found = lipsync.measure(stream, np.concatenate(frames), np.concatenate(lips)) if lips else None
    if found is None or not found.is_sure:
        why = "too little to tell by" if found is None else "not clear"
        report.findings.append(
            Finding(
                "lip sync",
                "unknown",
                why,
                "watch whether the lips go with the sound; "
                "preprocess --offset SECONDS puts it right",
            )
        )
        return
    late = found.sound_after_lips_s
    report.figures |= {"sync_margin": round(found.margin, 4), "sound_after_lips_s": round(late, 4)}
    report.less("lip sync", "late", abs(late), f"sound {found}", "preprocess puts it right")


def _segments(pieces: list[Piece], stream: NDArray[np.float32] | None) -> list[Segment]:
    """Score the pieces and return them best first.

    The criteria of ISExplore (arXiv 2511.07940): range of the lips, variety of sounds, range of
    views; each relative to the best piece's, their geometric mean times the share of frames found.
    """
    mel = None if stream is None else stream[:, : voice.N_MEL]
    rows = []
    for piece in pieces:
        if piece.found.sum() < FPS or len(piece.found) < MIN_SECONDS * FPS:
            continue  # too little to learn from
        rate = voice.RATE_HZ // FPS
        end = piece.first + len(piece.found)
        heard = None if mel is None else mel[piece.first * rate : end * rate]
        views = np.linalg.norm([_range(turn) for turn in piece.angles[piece.found, :2].T])
        rows.append(
            Segment(
                start_s=piece.first / FPS,
                end_s=end / FPS,
                lips=_range(face.lip_aperture(piece.mesh[piece.found])),
                speech=0.0 if heard is None or len(heard) < 2 else float(heard.std(0).mean()),
                views=min(VIEWS, float(views)),
                found=float(piece.found.mean()),
            )
        )
    best = {k: max((getattr(r, k) for r in rows), default=0.0) for k in ("lips", "speech", "views")}
    best = {k: top for k, top in best.items() if top > 0}  # leave out criteria without data
    scored = [
        replace(
            r,
            score=round(
                r.found
                * float(np.prod([max(getattr(r, k), 1e-3 * top) / top for k, top in best.items()]))
                ** (1 / max(1, len(best))),
                3,
            ),
        )
        for r in rows
    ]
    return sorted(scored, key=lambda r: -r.score)


def _curves(pieces: list[Piece], samples: NDArray[np.float32] | None) -> list[Curve]:
    """Return the curves over time that the page shows."""
    seconds = np.concatenate([p.seconds for p in pieces])
    turns = np.concatenate([np.where(p.found[:, None], p.angles, np.nan) for p in pieces])
    curves = [
        Curve("Mouth", "opening in face heights", seconds,
              np.concatenate([face.lip_aperture(p.mesh) for p in pieces])),
        Curve("Head, to the side", "degrees", seconds, turns[:, 0],
              (-LIMITS["turn"][0], LIMITS["turn"][0])),
        Curve("Head, up and down", "degrees", seconds, turns[:, 1]),
        Curve("Sharpness at eyes and mouth", "share of fine detail", seconds,
              np.concatenate([p.sharpness for p in pieces]), LIMITS["sharp"]),
        Curve("Light on the face", "of 255", seconds,
              np.concatenate([p.light[:, 0] for p in pieces]), LIMITS["dark"]),
    ]  # fmt: skip
    if samples is not None and len(samples) >= SAMPLE_RATE_HZ:
        loud = 10 * np.log10((_blocks(samples) ** 2).mean(1) + 1e-9)
        step = max(1, len(loud) // 2000)  # a plot resolves no more
        curves.append(
            Curve("Sound", "dBFS", np.arange(len(loud))[::step] / 20, loud[::step], LIMITS["level"])
        )
    return curves


def _range(values: Array) -> float:
    low, high = np.percentile(values, (5, 95))
    return float(high - low)


def _best_part(report: Report, seconds: float) -> None:
    """Recommend, for a long video, the minute around the best piece."""
    if not report.segments or seconds < 2 * LONG_S:
        return
    best = report.segments[0]
    start = min(max(0.0, (best.start_s + best.end_s - LONG_S) / 2), seconds - LONG_S)
    start = float(np.floor(start))  # whole seconds, inside the video
    report.figures |= {"best_from_s": start, "best_to_s": start + LONG_S}
    report.findings.append(
        Finding(
            "best part",
            "pass",
            f"round {best.start_s:.0f} s, of {len(report.segments)} looked at",
            f"a minute is enough: preprocess --from {start:.0f} --to {start + LONG_S:.0f}",
        )
    )
