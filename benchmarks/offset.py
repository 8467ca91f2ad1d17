"""Train and test the map from speech to lips that measures how late a film's sound is.

    python benchmarks/offset.py HOME            leave one out: how often it is right
    python benchmarks/offset.py HOME --write    ... and write the map of all people to the package

HOME holds preprocessed people (preprocess --offset none, or films would be corrected twice).
Pieces of each film are shifted by up to +- 400 ms, in steps of 100 ms, and measured with a map
trained without the person; right is within one frame of the shift plus the whole film's own offset.
Sound of other people must not come out as sure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from talkhead_cli import media
from talkhead_cli.contracts import FPS
from talkhead_cli.store import Workspace
from talkhead_cli.track import lipsync, voice
from talkhead_cli.track.lipsync import Talk

SHIFTS = range(-40, 41, 10)  # rows of 10 ms
PIECES_S = (5, 8, 15)


def talk(home: Path, name: str) -> Talk:
    space = Workspace.open(home, name)
    if space.manifest().get("offset", {}).get("corrected_s"):
        raise SystemExit(f"{name} was corrected; preprocess with --offset none")
    tracks = space.load("tracks")
    seen = np.flatnonzero(tracks["usable"] & space.load("voice")["heard"])
    stream = voice.features(media.sound(space.audio))
    return Talk(stream, seen, lipsync.lip_motion(tracks["mesh_fractions"])[seen])


def leave_one_out(talks: dict[str, Talk]) -> dict[str, Any]:
    """Return own offsets, and the shares of shifted pieces found and of wrong sound believed."""
    maps, own = {}, {}
    for name in talks:
        maps[name], _ = lipsync.train([t for n, t in talks.items() if n != name], rounds=2)
        own[name] = lipsync.measure(
            talks[name].stream,
            talks[name].frames,
            talks[name].lips,
            maps[name],
            min_seconds=lipsync.MIN_LEARN_SECONDS,
        )
    table = {}
    for seconds in PIECES_S:
        found = [
            hit
            for n, whole in own.items()
            if whole is not None
            for hit in _pieces(talks[n], maps[n], whole.sound_after_lips_s, seconds)
        ]
        sure = [right for right, is_sure in found if is_sure]
        table[f"{seconds} s"] = {
            "pieces": len(found) // len(SHIFTS),
            "shifted": len(found),
            "within_a_frame": _share([right for right, _ in found]),
            "sure": _share([is_sure for _, is_sure in found]),
            "within_a_frame_when_sure": _share(sure),
            "wrong_sound_believed": _share(list(_wrong(talks, maps, seconds))),
        }
    offsets = {
        n: None
        if o is None
        else {
            "sound_after_lips_ms": round(1000 * o.sound_after_lips_s),
            "agreement": round(o.agreement, 3),
            "margin": round(o.margin, 3),
        }
        for n, o in own.items()
    }
    return {"people": len(talks), "own_offsets": offsets, "shifted_copies": table}


def _pieces(one: Talk, weight: Any, own_s: float, seconds: int) -> list[tuple[bool, bool]]:
    n, hits = seconds * FPS, []
    for first in range(0, int(one.frames[-1]) - n + 2, n // 2):
        inside = (one.frames >= first) & (one.frames < first + n)
        if inside.sum() < 0.9 * n:
            continue
        for shift in SHIFTS:
            # the piece's sound alone, late by `shift` rows, as in a film that was cut and shifted
            rows = np.arange(4 * n) + 4 * first - shift
            stream = one.stream[np.clip(rows, 0, len(one.stream) - 1)]
            found = lipsync.measure(
                stream, one.frames[inside] - first, one.lips[inside], weight, min_seconds=0
            )
            if found is not None:
                error = found.sound_after_lips_s - own_s - shift / voice.RATE_HZ
                hits.append((abs(error) <= 1 / FPS, found.is_sure))
    return hits


def _wrong(talks: dict[str, Talk], maps: dict[str, Any], seconds: int) -> Any:
    for name, one in talks.items():
        inside = one.frames < seconds * FPS
        for other, sound in talks.items():
            if other != name and len(sound.stream) >= seconds * voice.RATE_HZ:
                found = lipsync.measure(
                    sound.stream[: seconds * voice.RATE_HZ],
                    one.frames[inside],
                    one.lips[inside],
                    maps[name],
                    min_seconds=0,
                )
                if found is not None and inside.sum() >= 0.9 * seconds * FPS:
                    yield found.is_sure


def _share(flags: list[bool]) -> float | None:
    return round(float(np.mean(flags)), 4) if flags else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    names = sorted(p.parent.name for p in options.home.glob("*/voice.npz"))
    talks = {name: talk(options.home, name) for name in names}
    print(json.dumps(leave_one_out(talks), indent=1))
    if options.write:
        weight, _ = lipsync.train(list(talks.values()))
        np.save(lipsync.WEIGHTS, weight.astype(np.float16))


if __name__ == "__main__":
    main()
