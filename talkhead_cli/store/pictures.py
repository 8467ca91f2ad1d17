"""Single pictures in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import TalkheadError
from talkhead_cli.store.files import atomic

_DAMAGED = (OSError, SyntaxError, ValueError)  # what PIL raises for damaged files


def write_png(path: Path, rgb: NDArray[np.uint8], *, software: str = "") -> None:
    """Write a picture (H, W, 3) atomically; `software` is kept in it, see `software_of`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if software:
        info.add_text("Software", software)
    with atomic(path) as part:
        Image.fromarray(rgb).save(part, format="png", pnginfo=info)


def read_picture(path: Path, *, cure: str) -> NDArray[np.uint8]:
    """Read a picture (H, W, 3); TalkheadError, with the cure, if it is missing or damaged."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise TalkheadError(f"{path} is missing or damaged; {cure}") from error


def software_of(path: Path) -> str:
    """Return what `write_png` was told to keep; empty for other pictures and files."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return str(picture.info.get("Software", ""))
    except (*_DAMAGED, Image.DecompressionBombError):
        return ""
