"""Reading and writing media with ffmpeg; the only subpackage that starts another program.

A file's pictures and sound share one clock: time 0 is the earliest track's start, frame i is
the picture shown at (i + 0.5) / 25 s, and sample n is at n / 16000 s.
"""

from __future__ import annotations

from talkhead_cli.contracts import Need, TalkheadError
from talkhead_cli.media import ffmpeg
from talkhead_cli.media.audio import read_wav, sound, sound_to_file, write_wav
from talkhead_cli.media.ffmpeg import Probe, probe
from talkhead_cli.media.part import Part
from talkhead_cli.media.video import VideoWriter, frames, refuse_container

__all__ = [
    "Part",
    "Probe",
    "VideoWriter",
    "check",
    "frames",
    "probe",
    "read_wav",
    "refuse_container",
    "sound",
    "sound_to_file",
    "write_wav",
]


def check() -> list[Need]:
    """Return what this subpackage needs on the machine: ffmpeg and its encoders."""
    fix = "pip install -U imageio-ffmpeg, whose ffmpeg has all encoders"
    try:
        found = f"{ffmpeg.version()} ({ffmpeg.executable()})"
    except TalkheadError as error:
        return [Need("ffmpeg", False, str(error), fix)]
    needs = [Need("ffmpeg", True, found)]
    for kind, part, what_for, required in (
        ("encoders", "libx264", "H.264 pictures", True),
        ("encoders", "aac", "AAC sound", True),
        ("encoders", "libvpx-vp9", "transparent .webm", False),
        ("filters", "zscale", "HDR and BT.2020 colours", False),
        ("filters", "tonemap", "HDR colours", False),
    ):
        ok = ffmpeg.knows(kind, part)
        name = f"ffmpeg {part}"
        needs.append(Need(name, ok, what_for if ok else "missing", "" if ok else fix, required))
    return needs
