"""Find ffmpeg, run it, and probe files with it (ffprobe does not come with every build)."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import tempfile
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ffmpeg as graphs

from talkhead_cli.contracts import FPS, TalkheadError

# How far into a file its tracks are looked for: of one that begins later, ffmpeg tells no start.
PATIENCE = ("-analyzeduration", "120M", "-probesize", "500M")


@cache
def executable() -> str:
    """Return the ffmpeg of imageio-ffmpeg (IMAGEIO_FFMPEG_EXE names another), else the system's.

    TalkheadError if there is none, or only ones that do not print when a track begins, such as
    7.0: late sound would come out early.
    """
    wrong = []
    for each in (_installed_with_us(), shutil.which("ffmpeg")):
        if each is None:
            continue
        try:
            told = _said(each, "-f", "lavfi", "-i", _LATE_SILENCE)
        except OSError as error:
            wrong.append(f"{each} cannot be run ({error.strerror})")
            continue
        if re.search(r"Audio: .*, start 1\.0", told):
            return each
        wrong.append(f"{each} does not say when a track begins: it is too old, or lacks lavfi")
    why = "; ".join(wrong) or "ffmpeg was not found"
    raise TalkheadError(f"{why}; get another one: pip install -U imageio-ffmpeg")


_LATE_SILENCE = "anullsrc=r=8000,asetpts=PTS+8000"


def _installed_with_us() -> str | None:
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def _ask(*words: str) -> str:
    """Return what ffmpeg prints on both streams when called with `words`."""
    return _said(executable(), *words)


def _said(program: str, *words: str) -> str:
    done = subprocess.run(
        [program, "-hide_banner", "-nostdin", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout.decode("utf-8", "replace")


@cache
def version() -> str:
    """Return ffmpeg's version, for example "7.0.2-static"."""
    found = re.search(r"ffmpeg version (\S+)", _ask("-version"))
    return found[1] if found else "unknown version"


@cache
def knows(kind: str, name: str) -> bool:
    """Whether this build has `name` among its `kind` ("encoders", "filters")."""
    return re.search(rf"^ \S+ +{re.escape(name)} ", _ask(f"-{kind}"), re.M) is not None


def url(path: Path | str) -> str:
    """Return `path` such that ffmpeg sees no protocol in a name like `talk: one.mp4`;
    TalkheadError if the name is no text, which ffmpeg-python needs."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise TalkheadError(
            f"the name of {str(path)!r} is not UTF-8; rename the file or its folder"
        ) from None
    return f"file:{path}"


class Run:
    """One ffmpeg process made of an ffmpeg-python output `graph`.

    `out` is its standard output, `feed` its standard input when `fed`. Its messages go to
    an unnamed file, because a pipe of messages could fill up and block it.
    """

    def __init__(self, graph: Any, *, fed: bool = False) -> None:
        quiet = [executable(), "-hide_banner", "-nostdin", "-loglevel", "error"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - close() does it
        self._process = subprocess.Popen(
            graph.compile(cmd=quiet, overwrite_output=True),
            stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.out: Any = self._process.stdout
        self.feed: Any = self._process.stdin
        self.messages: list[str] = []

    def finish(self) -> bool:
        """Wait for the process and collect its messages; return whether it succeeded."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        self.messages = [line.strip() for line in lines if line.strip()]
        if code and not self.messages:
            self.messages = [f"ffmpeg ended with code {code}"]
        return code == 0

    def finish_reading(self, path: Path | str) -> None:
        """`finish`; TalkheadError if the process was killed or crashed: what was read may be a
        beginning."""
        self.finish()
        if self._process.returncode < 0:
            raise TalkheadError(
                f"ffmpeg was killed (signal {-self._process.returncode}) while it read {path}; run "
                "the command again, with more free memory if it ran out"
            )

    @property
    def complaint(self) -> str:
        """The last informative message, without memory addresses; "" when there is none."""
        said = [line for line in self.messages if line != "Conversion failed!"]
        return re.sub(r"^(\[[^]]*\] *)+", "", said[-1]).rstrip(".") if said else ""

    def close(self) -> None:
        """Kill the process if it still runs, and close its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in filter(None, (self.feed, self.out, self._log)):
            with suppress(BrokenPipeError):  # data was still buffered for the process
                pipe.close()


def beside(path: Path) -> Path:
    """Return a new hidden name beside `path` with its suffix, to be renamed when finished."""
    return path.with_name(f".part-{secrets.token_hex(4)}{path.suffix}")


@dataclass(frozen=True)
class Probe:
    """What a media file holds.

    width, height  of the picture as displayed: upright, square pixels
    duration_s     of the longest track, as declared (a truncated file may hold less)
    is_estimated   no duration is declared: ffmpeg estimates it from bit rate and size
    fps            nominal; 0 without video
    rotation_deg   clockwise turn that makes the stored picture upright: 0, 90, 180, 270
    is_synthetic   made by talkhead; is_render: by `render`, not by `evaluate`
    colour         pixel format and colour tags as ffmpeg writes them, e.g.
                   "yuv420p10le(tv, bt2020nc/bt2020/smpte2084, progressive)"
    origin_s       what the file's time stamps call time 0 of its common clock
    video_start_s, audio_start_s  declared start of the track on that clock
    has_index      the container indexes its keyframes; seeks in other containers are inexact
    restarts       ffmpeg begins at 0 with the first track that is read of such a container
    """

    width: int
    height: int
    duration_s: float
    is_estimated: bool
    fps: float
    has_video: bool
    has_audio: bool
    rotation_deg: int
    colour: str
    origin_s: float
    video_start_s: float
    audio_start_s: float
    is_synthetic: bool
    is_render: bool
    has_index: bool
    restarts: bool


def probe(path: Path | str) -> Probe:
    """Probe the first track of each kind; a cover picture does not count as video.

    Raises TalkheadError when the file is missing or holds neither picture nor sound.
    """
    if not Path(path).is_file():
        raise TalkheadError(f"{path} is not there or is not a file; give the path of a media file")
    if not os.access(path, os.R_OK):
        raise TalkheadError(f"{path} may not be read by you; change its permissions")
    text = _ask(*PATIENCE, "-i", url(path))
    head, *streams = re.split(r"^  Stream #", text, flags=re.M)
    # ffmpeg reads any text file as a terminal recording
    tracks = [] if re.search(r"^Input #0, tty,", head, re.M) else streams
    # Only a track's first line is ffmpeg's own; metadata below it may contain anything.
    lines = [track.partition("\n")[0] for track in tracks]
    shown = (
        s
        for s, line in zip(tracks, lines, strict=True)
        if _VIDEO.search(line) and "(attached pic)" not in line
    )
    video = next(shown, "")
    audio = next((line for line in lines if ": Audio: " in line), "")
    if not (video or audio):
        raise TalkheadError(
            f"{path} cannot be read as video or sound: it is not a media file or its index is "
            "missing; copy or export it again"
        )
    origin_s = _number(r"^  Duration: .*?, start: (-?[\d.]+)", head)
    nominal = video.partition("\n")[0]
    fps = _number(r"([\d.]+) fps", nominal) or _number(r"([\d.]+) tbr", nominal)
    width, height, rotation_deg, colour = _picture(video)
    return Probe(
        width=width,
        height=height,
        duration_s=_duration_s(head, path, fps),
        is_estimated="Estimating duration from bitrate" in head,
        fps=fps,
        has_video=bool(video),
        has_audio=bool(audio),
        rotation_deg=rotation_deg,
        colour=colour,
        origin_s=origin_s,
        video_start_s=_start_s(nominal, origin_s),
        audio_start_s=_start_s(audio, origin_s),
        is_synthetic=_SYNTHETIC.search(text) is not None,
        is_render=_RENDER.search(text) is not None,
        has_index=_INDEXED.search(head) is not None,
        restarts=_RESTARTING.search(head) is not None,
    )


def opened(path: Path | str, about: Probe, track: str, **options: Any) -> Any:
    """Return an ffmpeg-python stream of a track ("V:0", "a:0") on the file's common clock."""
    start_s = about.audio_start_s if track.startswith("a") else about.video_start_s
    late = {"itsoffset": start_s} if start_s and about.restarts else {}
    return graphs.input(url(path), **late, **options)[track]


def count_packets(path: Path | str, track: str) -> tuple[int, float]:
    """Return frame count and end (seconds) of a track ("V:0", "a:0"), without decoding it."""
    graph = graphs.input(url(path))[track].output("-", format="null", c="copy", progress="pipe:1")
    with closing(Run(graph)) as run:
        report = run.out.read().decode()
        run.finish()
    frames = re.findall(r"^frame=(\d+)", report, re.M)
    micros = re.findall(r"^out_time_us=(\d+)", report, re.M)
    return int(frames[-1]) if frames else 0, int(micros[-1]) / 1e6 if micros else 0.0


_RENDER = re.compile(r"^ +talkhead_avatar *: ", re.M | re.I)
_SYNTHETIC = re.compile(r"^ +talkhead_synthetic *: true", re.M | re.I)
_RESTARTING = re.compile(r"^Input #0, (mpegts|mpeg|ogg),", re.M)
_INDEXED = re.compile(r"^Input #0, (mov|matroska),", re.M)
# The pixel format's parentheses may be nested: "yuv420p(tv, bottom coded first (swapped))".
_VIDEO = re.compile(r": Video: .*?, (\w+(?:\((?:[^()]|\([^()]*\))*\))?), (\d+)x(\d+)")


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.M)
    return float(found[1]) if found else 0.0


def _start_s(stream: str, origin_s: float) -> float:
    found = re.search(r", start (-?[\d.]+)", stream)
    return max(0.0, float(found[1]) - origin_s) if found else 0.0


def _duration_s(head: str, path: Path | str, fps: float) -> float:
    if found := re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", head, re.M):
        return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
    # recordings made in browsers declare no duration, raw streams not even times
    n_frames, end_s = count_packets(path, "V:0")
    return max(end_s or n_frames / (fps or FPS), count_packets(path, "a:0")[1])


def _picture(stream: str) -> tuple[int, int, int, str]:
    """Parse width, height, rotation_deg and colour from a video stream's description."""
    found = _VIDEO.search(stream)
    if not found:
        return 0, 0, 0, ""
    colour, width, height = found[1], int(found[2]), int(found[3])
    # ffmpeg's angle is anticlockwise
    rotation_deg = (
        round(-_number(r"^ *[dD]isplay ?[mM]atrix: rotation of (-?[\d.]+) deg", stream)) % 360
    )
    aspects = re.findall(r"SAR (\d+):(\d+)", stream.splitlines()[0])
    over, under = map(int, aspects[-1]) if aspects else (1, 1)  # the container's aspect comes last
    if rotation_deg in (90, 270):
        width, height, over, under = height, width, under, over
    return round(width * over / under) if over and under else width, height, rotation_deg, colour
