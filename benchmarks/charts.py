"""Line charts of benchmark results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Line = tuple[Sequence[float], Sequence[float]]


def line_chart(path: Path, across: str, up: str, lines: Mapping[str, Line]) -> None:
    """Plot labelled lines (x, y); both axes begin at zero, but the vertical one not for dB."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for label, (x, y) in lines.items():
        order = np.argsort(x)
        axes.plot(np.array(x)[order], np.array(y)[order], "o-", label=label)
    axes.set(xlabel=across, ylabel=up)
    axes.set_xlim(left=0)
    if "dB" not in up:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
