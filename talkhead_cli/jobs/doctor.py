"""Requirements on the machine, as `talkhead doctor` prints them."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path

from talkhead_cli import march, media
from talkhead_cli.contracts import Need, TalkheadError

MIN_FREE_GB = 2.0


def needs() -> list[Need]:
    """Return all requirements, mandatory ones first."""
    found = [_python(), *_packages(), *media.check(), _disk(), *march.check()]
    return sorted(found, key=lambda n: not n.required)


def build() -> str:
    """Compile the CUDA kernels ahead of any job, and say so; TalkheadError if that fails."""
    why_not = march.why_no_nerfacc()
    if why_not:
        raise TalkheadError(
            f"the CUDA kernels cannot be had ({why_not}); the plain torch march is used instead"
        )
    return "the CUDA kernels are built"


def _python() -> Need:
    version = platform.python_version()
    ok = (3, 11) <= tuple(int(p) for p in version.split(".")[:2]) <= (3, 12)
    return Need("python", ok, version, "use Python 3.11 or 3.12")


def _packages() -> list[Need]:
    rows = []
    for name, what_for in (
        ("torch", "training and rendering"),
        ("mediapipe", "preprocess and evaluate"),
        ("lightning-fabric", "training"),
    ):
        try:
            rows.append(Need(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append(Need(name, False, "missing", f"pip install {name}  ({what_for})"))
    return rows


def _disk() -> Need:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Need("disk", free > MIN_FREE_GB, f"{free:.0f} GB free here", "free some space")
