"""A report as one self-contained HTML page."""

from __future__ import annotations

import base64
import math
import os
from html import escape
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError
from talkhead_cli.jobs.check.report import Curve, Report

WIDTH, HEIGHT, MARGIN = 880, 110, 44
MARK = '<meta name="generator" content="talkhead check">'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3em .6em;
       border-bottom: 1px solid #ddd; vertical-align: top }
.pass { color: #17703a } .warn { color: #a15c00 } .fail { color: #b3261e } .unknown { color: #666 }
.verdict { font-weight: 600 } figure { display: inline-block; margin: 0 .5em .5em 0 }
figcaption, text { font-size: 12px; fill: #555; color: #555 } img { border-radius: 4px }
"""


def refuse_page(path: Path) -> None:
    """MisuseError where a page cannot be written, or would replace a file that is none of ours."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        raise MisuseError(f"--page {path} must name a file in a folder that is there")
    if not os.access(folder, os.W_OK):
        raise MisuseError(f"--page {path}: nothing may be written in {folder}")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(4096):
                raise MisuseError(
                    f"--page {path} is there already, and is no page of talkhead check; give "
                    "another name"
                )


def page(report: Report, name: str) -> str:
    """Return the report on the video `name` as HTML with embedded pictures and plots."""
    points = "".join(
        f'<tr><td class="verdict {f.verdict}">{f.verdict}</td><td>{escape(f.name)}</td>'
        f"<td>{escape(f.found)}</td><td>{escape(f.cure)}</td></tr>"
        for f in report.findings
    )
    shown = "".join(
        f'<figure><img alt="" src="{_data(picture)}"><figcaption>from {second:.0f} s on'
        "</figcaption></figure>"
        for second, picture in report.pictures
    )
    segments = "".join(
        f"<tr><td>{s.start_s:.0f} to {s.end_s:.0f} s</td><td>{s.score:.2f}</td>"
        f"<td>{s.lips:.3f}</td><td>{s.speech:.2f}</td><td>{s.views:.0f}</td><td>{s.found:.0%}</td></tr>"
        for s in report.segments
    )
    plots = "".join(f"<h3>{escape(c.name)}</h3>{_plot(c)}" for c in report.curves)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">{MARK}<title>{escape(name)}</title><style>{STYLE}</style>
<h1>{escape(name)}: <span class="{report.verdict}">{report.verdict}</span></h1>
{shown}
<table><tr><th></th><th>point</th><th>found</th><th>what to do</th></tr>{points}</table>
<h2>Which part shows most</h2>
<table><tr><th>part</th><th>score</th><th>mouth opens, face heights</th><th>sounds differ</th>
<th>head turns, degrees</th><th>face seen</th></tr>{segments}</table>
<h2>In the course of the video</h2>
{plots}
</html>
"""


def _data(picture: NDArray[np.uint8]) -> str:
    """Return a picture (H, W, 3) as a data URL."""
    done, packed = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(packed.tobytes()).decode()


def _plot(curve: Curve) -> str:
    """Return a line plot over time as SVG, with gaps at NaN and dashed lines at the limits."""
    seen = np.isfinite(curve.values)
    if not seen.any():
        return "<p>nothing seen</p>"
    low, high = (float(f(curve.values[seen])) for f in (np.min, np.max))
    for limit in curve.limits:
        if low - (high - low) <= limit <= high + (high - low):
            low, high = min(low, limit), max(high, limit)
    high = max(high, low + 1e-6)
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    first, last = float(curve.seconds[0]), max(float(curve.seconds[-1]), curve.seconds[0] + 1e-6)

    def at(second: float, value: float) -> str:
        x = MARGIN + (WIDTH - MARGIN) * (second - first) / (last - first)
        return f"{x:.1f},{HEIGHT - (HEIGHT - 8) * (value - low) / (high - low):.1f}"

    gap = max(0.5, 3 * float(np.median(np.diff(curve.seconds)))) if len(curve.seconds) > 1 else 0.5
    lines: list[list[str]] = []
    run: list[str] = []
    before = float("-inf")
    for second, value in zip(curve.seconds.tolist(), curve.values.tolist(), strict=True):
        if not np.isfinite(value) or second - before > gap:
            lines, run = [*lines, run], []
        if np.isfinite(value):
            run.append(at(second, value))
        before = second
    drawn = "".join(
        f'<polyline points="{" ".join(line)}" fill="none" stroke="#2a5db0" stroke-width="1.2"/>'
        for line in [*lines, run]
        if len(line) > 1
    )
    dashes = "".join(
        f'<polyline points="{at(first, limit)} {at(last, limit)}" stroke="#b3261e" '
        'stroke-dasharray="5 4"/>'
        for limit in curve.limits
        if low <= limit <= high
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" role="img" aria-label="{escape(curve.name)}">'
        f'{dashes}{drawn}<text x="0" y="14">{high:.{digits}f}</text>'
        f'<text x="0" y="{HEIGHT}">{low:.{digits}f}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT + 16}">{first:.0f} s</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 16}" text-anchor="end">{last:.0f} s, '
        f"{escape(curve.unit)}</text></svg>"
    )
