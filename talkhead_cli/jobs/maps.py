"""A sheet of a method's auxiliary maps and depth beside the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import Signals
from talkhead_cli.jobs.player import Player, to_bytes
from talkhead_cli.store.pictures import write_png

N_COLUMNS = 6
MARGIN_PX, CELL_PX = 150, 192  # width of the column of names, side of a picture
TEXT_SCALE = 0.42
STRIP_PX = 20  # height of the names above pictures that stand side by side

Pixels = NDArray[np.uint8]
Array = NDArray[np.floating[Any]]


def draw(player: Player, signals: Signals, truth: Pixels, path: Path) -> Path:
    """Write a PNG of moments spread over `signals` (T rows after `listen`), truth (T, s, s, 3).

    One line each: truth, rendering, depth, and every map in the avatar's `maps`.
    """
    at = np.linspace(0, len(signals) - 1, N_COLUMNS).round().astype(int)
    frames = [frame for frame, _ in player.pictures(signals[at])]
    lines = {
        "truth": [truth[i] for i in at],
        "rendered": [to_bytes(frame.rgb) for frame in frames],
        "depth, near is bright": shaded([_part(frame.depth) for frame in frames]),
    }
    for part, names in player.avatar.maps.items():
        for channel, name in enumerate(names):
            values = [frame.parts[part][0, ..., channel].float().cpu().numpy() for frame in frames]
            top = max(float(value.max()) for value in values)
            lines[f"{name}, up to {top:.2g}"] = [heat(value / max(top, 1e-9)) for value in values]
    write_png(path, sheet(lines))
    return path


def heat(values: Array) -> Pixels:
    """Map values (H, W) from 0 to 1 to colours (H, W, 3), dark to bright."""
    grey = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return np.asarray(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)[..., ::-1], np.uint8)


def shaded(depths: list[Array]) -> list[Pixels]:
    """Map depths (H, W), infinite where empty, to greys (H, W, 3) on one scale, near is bright."""
    solid = np.concatenate([depth[np.isfinite(depth)] for depth in depths])
    low, high = np.quantile(solid, (0.01, 0.99)) if len(solid) else (0.0, 1.0)
    scale = max(float(high - low), 1e-6)
    greys = [np.where(np.isfinite(d), 1 - 0.85 * ((d - low) / scale).clip(0, 1), 0) for d in depths]
    return [_bytes(np.repeat(grey[..., None], 3, 2)) for grey in greys]


def sheet(lines: dict[str, list[Pixels]]) -> Pixels:
    """Stack named lines of pictures (s, s, 3) from top to bottom, the names at the left."""
    drawn = []
    for name, pictures in lines.items():
        cells = [cv2.resize(p, (CELL_PX,) * 2, interpolation=cv2.INTER_LINEAR) for p in pictures]
        margin = np.zeros((CELL_PX, MARGIN_PX, 3), np.uint8)
        for index, words in enumerate(name.split(", ")):
            _write(margin, words, CELL_PX // 2 + 18 * index)
        drawn.append(np.concatenate([margin, *cells], 1))
    return np.concatenate(drawn, 0)


def side_by_side(named: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Set pictures (s, s, 3) next to each other, each under its name: (s + STRIP_PX, n s, 3)."""
    columns = []
    for name, picture in named:
        strip = np.zeros((STRIP_PX, picture.shape[1], 3), np.uint8)
        _write(strip, name, STRIP_PX - 6)
        columns.append(np.concatenate([strip, picture], 0))
    return np.concatenate(columns, 1)


def _write(picture: Pixels, words: str, bottom: int) -> None:
    """Write a line in white, `bottom` pixels from the top, as small as its length asks for."""
    font, white, room = cv2.FONT_HERSHEY_SIMPLEX, (255, 255, 255), picture.shape[1] - 8
    (width, _), _ = cv2.getTextSize(words, font, TEXT_SCALE, 1)
    scale = TEXT_SCALE * min(1.0, room / max(1, width))
    cv2.putText(picture, words, (4, bottom), font, scale, white, 1, cv2.LINE_AA)


def _part(values: Any) -> Array:
    return values[0, ..., 0].float().cpu().numpy()


def _bytes(picture: Array) -> Pixels:
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)
