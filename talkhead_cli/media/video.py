"""Read a media file's pictures at 25 frames per second, and write pictures to one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ffmpeg as graphs
import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import FPS, MisuseError, TalkheadError
from talkhead_cli.media.audio import TRUNCATION_S, on_common_clock
from talkhead_cli.media.ffmpeg import Probe, Run, beside, knows, opened, probe, url

Picture = NDArray[np.uint8]

EXACT = "accurate_rnd+full_chroma_int+full_chroma_inp"
HDR = ("smpte2084", "arib-std-b67")
SUFFIXES = {
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm"),
    "transparency": (".webm", ".mov"),
    "depth": (".mkv",),
}


def frames(
    path: Path | str,
    *,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    max_side: int | None = None,
    start_s: float = 0.0,
    n_frames: int | None = None,
    stride: int = 1,
    on_warning: Callable[[str], None] | None = None,
) -> Generator[Picture, None, None]:
    """Yield upright (H, W, 3) uint8 sRGB frames at 25 per second, in constant memory.

    Frame 0 is at time 0 of the file, the clock of `sound`; before a video track that starts
    later its first frame is repeated.

    size      (w, h) to scale to
    crop      (x, y, w, h) cut out before, in pixels as `probe` counts them
    max_side  without `size`: shrink until no side is longer
    start_s   where to begin, rounded to a frame · n_frames: at most so many are yielded
    stride    yield every stride-th of the 25 per second
    on_warning  gets one sentence when the file ends before its declared duration

    TalkheadError when the file holds no readable video; ValueError for a crop outside of it.
    """
    about = probe(path)
    if not about.has_video:
        raise TalkheadError(f"{path} has no picture; give a file that has a video track")
    crop = crop or (0, 0, about.width, about.height)
    width, height = size or _within(crop[2], crop[3], max_side)
    first = round(start_s * FPS)
    graph = _graph(path, about, crop, (width, height), first, stride)
    limit = {} if n_frames is None else {"frames:v": n_frames}
    n_read = 0
    with closing(Run(graph.output("pipe:1", format="rawvideo", pix_fmt="rgb24", **limit))) as run:
        while True:
            frame = np.empty((height, width, 3), np.uint8)
            if run.out.readinto(frame.data.cast("B")) < frame.nbytes:
                break
            n_read += 1
            yield frame
        run.finish_reading(path)
    if not n_read and n_frames != 0:
        why = run.complaint or f"there are no frames at {start_s:g} s"
        raise TalkheadError(f"{path} cannot be read as video: {why}")
    end_s = (first + n_read * stride) / FPS
    complete = n_read == n_frames or end_s > about.duration_s - TRUNCATION_S
    if run.messages and not complete and on_warning:
        on_warning(
            f"the file is truncated: {end_s:.1f} of {about.duration_s:.1f} seconds could be read"
        )


class VideoWriter:
    """Writes frames one by one; the file appears under its name only when it is complete.

        with VideoWriter("out.mp4", (512, 512), audio="speech.wav") as video:
            video.write(frame)

    size_px  (w, h); even numbers, except for .mov with `alpha` and for `gray16`
    audio    a media file whose sound is padded or cut to the length of the pictures
    crf      quality, lower is better · preset: of libx264, default medium (intra: ultrafast)
    intra    every frame is a keyframe, for random access
    alpha    frames have transparency: .webm (VP9) or .mov (ProRes 4444)
    gray16   one 16-bit channel, lossless: .mkv (FFV1)
    metadata written into the container, any keys

    By default H.264 yuv420p, tagged BT.709, and AAC in .mp4, .m4v, .mov or .mkv; VP9 and Opus
    in .webm. TalkheadError when the format is not available or ffmpeg cannot write.
    """

    def __init__(
        self,
        path: Path | str,
        size_px: tuple[int, int],
        *,
        audio: Path | str | None = None,
        crf: int = 18,
        preset: str | None = None,
        intra: bool = False,
        alpha: bool = False,
        gray16: bool = False,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.n_frames = 0
        self._shape: tuple[int, ...]
        width, height = size_px
        self._shape = (height, width) if gray16 else (height, width, 4 if alpha else 3)
        self._dtype = np.dtype("<u2" if gray16 else "u1")
        pix_fmt = "gray16le" if gray16 else "rgba" if alpha else "rgb24"
        refuse_container(self.path, alpha=alpha, gray16=gray16)
        codec = _codec(self.path.suffix.lower(), crf, preset, intra, alpha, gray16)
        if "420" in codec["pix_fmt"] and (width % 2 or height % 2):
            raise TalkheadError(
                f"{self.path.name} needs even width and height, not {width}x{height}; "
                "choose an even size"
            )
        pictures = graphs.input(
            "pipe:0", format="rawvideo", pix_fmt=pix_fmt, s=f"{width}x{height}", r=FPS
        )
        if not gray16:
            pictures = pictures.filter(
                "scale", out_color_matrix="bt709", out_range="tv", flags=f"bicubic+{EXACT}"
            )
            pictures = pictures.filter("format", codec["pix_fmt"]).filter(
                "setparams", color_primaries="bt709", color_trc="bt709", colorspace="bt709"
            )
        tracks = [pictures]
        if audio is not None:
            heard = on_common_clock(audio, probe(audio), 48_000)
            heard = heard.filter("aformat", channel_layouts="stereo|mono")  # all coders take these
            tracks.append(heard.filter("apad"))
            codec["shortest"] = None
        for i, (key, text) in enumerate((metadata or {}).items()):
            codec[f"metadata:g:{i}"] = f"{key}={text}"  # ffmpeg-python takes each option name once
        self._part = beside(self.path)
        self._run = Run(graphs.output(*tracks, url(self._part), **codec), fed=True)

    def write(self, frame: NDArray[Any]) -> None:
        """Append (H, W, 3) uint8; (H, W, 4) with `alpha`; (H, W) uint16 with `gray16`."""
        if frame.shape != self._shape or frame.dtype != self._dtype:
            raise ValueError(
                f"frame is {frame.shape} {frame.dtype}, not {self._shape} {self._dtype}"
            )
        try:
            self._run.feed.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            self._run.finish()
            raise self._failure() from None
        self.n_frames += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._run.close()
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self.n_frames:
            raise TalkheadError(f"{self.path} was not written: there were no frames")
        with suppress(BrokenPipeError):  # finish() collects the reason
            self._run.feed.close()
        if not self._run.finish():
            raise self._failure()
        os.replace(self._part, self.path)

    def _failure(self) -> TalkheadError:
        return TalkheadError(f"{self.path} could not be written: {self._run.complaint}")


def _within(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    share = min(1.0, (max_side or width + height) / max(width, height))
    return max(1, round(width * share)), max(1, round(height * share))


def _graph(
    path: Path | str,
    about: Probe,
    crop: tuple[int, int, int, int],
    size: tuple[int, int],
    first: int,
    stride: int,
) -> Any:
    """Build the graph from stored to requested pictures; ffmpeg itself turns them upright."""
    sought = first > 0 and about.has_index
    # Seek to the keyframe before the target: an accurate seek drops the picture still on display
    # there.  Seek to whole seconds: fractions are often no whole number of the file's ticks, which
    # would round pictures half-way between two of our frames to the other one.
    skipped = first % FPS if sought else first
    seek = {"ss": first // FPS, "noaccurate_seek": None} if sought else {}
    # The filters go on where the size or range of the pictures changes: begun again, `fps` would
    # fill the time before with repeated pictures.
    stream = opened(path, about, "V:0", reinit_filter=0, **seek)
    if re.search(r"\b(top|bottom) (coded )?first\b", about.colour):  # interlaced
        # pictures of other sizes to that of the first, which is all that the next filter takes
        stream = stream.filter("scale", "iw", "ih", interl=-1)
        stream = stream.filter("bwdif", mode="send_frame", deint="interlaced")
    # rounds to the nearest: takes the picture on display in the middle of each frame's time
    stream = stream.filter("fps", FPS, start_time=0)
    if skipped:
        stream = stream.filter("trim", start_frame=skipped).filter("setpts", "PTS-STARTPTS")
    if stride > 1:
        stream = stream.filter("framestep", stride)
    x, y, width, height = crop
    if crop != (0, 0, about.width, about.height):
        if min(x, y) < 0 or x + width > about.width or y + height > about.height:
            raise ValueError(f"crop {crop} leaves the picture of {about.width}x{about.height}")
        # stored pixels (iw, ih) need not be square
        across, down = f"*iw/{about.width}", f"*ih/{about.height}"
        # pictures of other sizes to that of the first
        stream = stream.filter("scale", "iw", "ih", flags=f"bicubic+{EXACT}")
        if any(number % 2 for number in crop):
            stream = _with_all_colours(stream, about)
        stream = stream.filter(
            "crop", f"{width}{across}", f"{height}{down}", f"{x}{across}", f"{y}{down}", exact=1
        )
    matrix, primaries, transfer = _colour_tags(about)
    if transfer in HDR or primaries == "bt2020":  # the filter `scale` converts the matrix alone
        convert = _tone_mapped if transfer in HDR else _narrowed
        stream = convert(_with_all_colours(stream, about), matrix, primaries, transfer)
    untagged_hd = matrix == "unknown" and (about.height >= 720 or about.width >= 1280)
    how = "area" if size[0] * size[1] < width * height else "lanczos"
    return stream.filter(
        "scale",
        *size,
        in_color_matrix="bt709" if untagged_hd and _is_yuv(about) else "auto",
        flags=f"{how}+{EXACT}",
    )


def _is_yuv(about: Probe) -> bool:
    return not re.match(r"[0xa]?(rgb|bgr)|gbr|gray|ya\d|pal|mono", about.colour)


def _with_all_colours(stream: Any, about: Probe) -> Any:
    """Give every pixel its own colour where two by two share one: a crop at an odd place would
    shift them, or read them wrongly, and zscale takes no odd sizes."""
    if not _is_yuv(about) or "444" in about.colour:
        return stream
    deep = re.match(r"\w*?(9|10|12|14|16)[lb]e", about.colour)
    return stream.filter("format", "yuv444p10le" if deep else "yuv444p")


def _colour_tags(about: Probe) -> tuple[str, str, str]:
    """Return matrix, primaries, transfer; ffmpeg writes one word where all three agree."""
    word = re.search(r"[(, ]((?:[\w-]+/){2}[\w-]+|bt709|bt470bg|smpte\d+m)[,)]", about.colour)
    matrix, primaries, transfer = (word[1] if word else "unknown").split("/") * (
        1 if word and "/" in word[1] else 3
    )
    return matrix, primaries, transfer


def _narrowed(stream: Any, matrix: str, primaries: str, transfer: str) -> Any:
    """Convert BT.2020 to BT.709; their transfers are the same."""
    _refuse_without("zscale")
    told = {
        "pin": primaries,
        "tin": "2020_10",
        "min": matrix if matrix != "unknown" else "2020_ncl",
    }
    stream = stream.filter("zscale", **told, p="709", t="709", m="709", r="tv")
    return stream.filter("format", "yuv444p")


def _refuse_without(*filters: str) -> None:
    if missing := [name for name in filters if not knows("filters", name)]:
        raise TalkheadError(
            f"these colours need ffmpeg's {' and '.join(missing)}, which this build lacks; "
            "pip install -U imageio-ffmpeg"
        )


def _tone_mapped(stream: Any, matrix: str, primaries: str, transfer: str) -> Any:
    """Tone-map HDR to BT.709; missing tags are taken as BT.2020."""
    _refuse_without("zscale", "tonemap")
    stream = stream.filter(
        "zscale",
        tin=transfer,
        pin="2020" if primaries == "unknown" else primaries,
        min="2020_ncl" if matrix == "unknown" else matrix,
        t="linear",
        npl=100,
    )
    stream = stream.filter("format", "gbrpf32le").filter("zscale", p="709")
    stream = stream.filter("tonemap", "hable", desat=0)
    return stream.filter("zscale", t="709", m="709", r="tv").filter("format", "yuv444p")


def refuse_container(path: Path, *, alpha: bool = False, gray16: bool = False) -> None:
    """Raise MisuseError if a file of that name cannot hold what `VideoWriter` would write."""
    kind = "depth" if gray16 else "transparency" if alpha else "video"
    suffix, allowed = path.suffix.lower(), SUFFIXES[kind]
    if suffix not in allowed:
        raise MisuseError(
            f"{kind} cannot be stored as {suffix or 'a file without suffix'}; "
            f"use a name that ends in {' or '.join(allowed)}"
        )


def _codec(
    suffix: str, crf: int, preset: str | None, intra: bool, alpha: bool, gray16: bool
) -> dict[str, Any]:
    """Return ffmpeg's output options for a kind of file."""
    if gray16:
        return {"vcodec": "ffv1", "pix_fmt": "gray16le", "acodec": "aac"}
    if suffix == ".webm":
        vp9 = {
            "vcodec": "libvpx-vp9",
            "pix_fmt": "yuv420p",
            "row-mt": 1,
            "crf": crf,
            "video_bitrate": 0,
            "cpu-used": 4,
            "acodec": "libopus",
        }
        # VP9 loses transparency with alternate reference frames
        return vp9 | ({"pix_fmt": "yuva420p", "auto-alt-ref": 0} if alpha else {})
    codec: dict[str, Any] = {"acodec": "aac", "audio_bitrate": "128k"}
    if suffix != ".mkv":
        codec["movflags"] = "+faststart+use_metadata_tags"
    if alpha:
        prores: dict[str, Any] = {
            "vcodec": "prores_ks",
            "profile:v": "4444",
            "pix_fmt": "yuva444p10le",
        }
        return codec | prores | {"alpha_bits": 16, "vendor": "apl0"}
    codec |= {"vcodec": "libx264", "pix_fmt": "yuv420p", "crf": crf}
    codec["preset"] = preset or ("ultrafast" if intra else "medium")
    return codec | ({"g": 1} if intra else {})
