"""Portraits as files: a run keeps the pictures that its avatar is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli.contracts import Camera, Portrait, Signals

_SIGNALS = [f.name for f in fields(Signals) if f.name not in ("camera", "audio")]


def joined(parts: Sequence[Portrait]) -> Portrait:
    """Several portraits as one."""
    cameras = [p.signals.camera for p in parts]
    camera = Camera(
        torch.cat([c.c2w for c in cameras]), torch.cat([c.k for c in cameras]), cameras[0].size_px
    )
    signals = {name: torch.cat([getattr(p.signals, name) for p in parts])
               for name in (*_SIGNALS, "audio")}  # fmt: skip
    return Portrait(
        torch.cat([p.pictures for p in parts]), torch.cat([p.labels for p in parts]),
        Signals(camera=camera, **signals), torch.cat([p.relief for p in parts]),
    )  # fmt: skip


def to_arrays(portrait: Portrait) -> dict[str, NDArray[Any]]:
    """Pictures and labels in bytes; nothing of the sound."""
    signals, camera = portrait.signals, portrait.signals.camera
    return {
        "pictures": (portrait.pictures * 255).round().byte().numpy(),
        "labels": (portrait.labels * 255).round().byte().numpy(),
        "relief": portrait.relief.contiguous().numpy(),
        "c2w": camera.c2w.numpy(), "k": camera.k.numpy(), "size_px": np.array(camera.size_px),
        **{name: getattr(signals, name).numpy() for name in _SIGNALS},
    }  # fmt: skip


def from_arrays(arrays: dict[str, NDArray[Any]]) -> Portrait:
    """The inverse, but for rounding; its rows hear nothing."""
    held = {name: torch.from_numpy(value) for name, value in arrays.items()}
    camera = Camera(held["c2w"], held["k"], int(arrays["size_px"]))
    signals = Signals(
        audio=torch.zeros(len(camera.k), 0, 0), camera=camera, **{n: held[n] for n in _SIGNALS}
    )
    return Portrait(
        held["pictures"].float() / 255, held["labels"].float() / 255, signals, held["relief"]
    )
