"""Portraits as arrays: a run stores the pictures that its avatar is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from talkhead_cli.contracts import Camera, Portrait, Signals, TalkheadError

_SIGNALS = [f.name for f in fields(Signals) if f.name not in ("camera", "audio")]


def joined(parts: Sequence[Portrait]) -> Portrait:
    """Concatenate several portraits into one."""
    cameras = [p.signals.camera for p in parts]
    camera = Camera(
        torch.cat([c.c2w for c in cameras]), torch.cat([c.k for c in cameras]), cameras[0].size_px
    )
    signals = {
        name: torch.cat([getattr(p.signals, name) for p in parts]) for name in (*_SIGNALS, "audio")
    }
    return Portrait(
        torch.cat([p.pictures for p in parts]),
        torch.cat([p.labels for p in parts]),
        Signals(camera=camera, **signals),
        torch.cat([p.relief for p in parts]),
    )


def to_arrays(portrait: Portrait) -> dict[str, NDArray[Any]]:
    """Return a portrait as arrays: pictures and labels as uint8, audio left out."""
    signals, camera = portrait.signals, portrait.signals.camera
    return {
        "pictures": (portrait.pictures * 255).round().byte().numpy(),
        "labels": (portrait.labels * 255).round().byte().numpy(),
        "relief": portrait.relief.contiguous().numpy(),
        "c2w": camera.c2w.numpy(),
        "k": camera.k.numpy(),
        "size_px": np.array(camera.size_px),
        **{name: getattr(signals, name).numpy() for name in _SIGNALS},
    }


def from_arrays(arrays: dict[str, NDArray[Any]]) -> Portrait:
    """Inverse of `to_arrays` up to rounding, with empty audio; TalkheadError if damaged."""
    if "landmarks_px" in arrays:  # as it was called once
        arrays = {**arrays, "landmarks_2d": arrays["landmarks_px"]}
        del arrays["landmarks_px"]
    _checked(arrays)
    held = {name: torch.from_numpy(value) for name, value in arrays.items()}
    camera = Camera(held["c2w"], held["k"], int(arrays["size_px"]))
    signals = Signals(
        audio=torch.zeros(len(camera.k), 0, 0), camera=camera, **{n: held[n] for n in _SIGNALS}
    )
    return Portrait(
        held["pictures"].float() / 255, held["labels"].float() / 255, signals, held["relief"]
    )


def _checked(arrays: dict[str, NDArray[Any]]) -> None:
    """Raise TalkheadError unless exactly the expected arrays are there, with finite values."""
    n, px = (
        arrays[k].shape[i] if k in arrays and arrays[k].ndim == 4 else 0
        for k, i in (("pictures", 0), ("pictures", 1))
    )
    byte, real, whole = np.uint8, np.float32, np.int64
    wanted: dict[str, tuple[Any, tuple[int | None, ...]]] = {
        "pictures": (byte, (n, px, px, 3)), "labels": (byte, (n, 6, None, None)),
        "relief": (real, (n, None, None, 2)), "c2w": (real, (n, 4, 4)), "k": (real, (n, 3, 3)),
        "size_px": (whole, ()), "eye": (real, (n, 2)), "gaze": (real, (n, 2)),
        "brow": (real, (n, 2)), "landmarks": (real, (n, 68, 3)), "landmarks_2d": (real, (n, 68, 2)),
        "pose": (real, (n, 6)), "body": (real, (n, 4)), "person": (whole, (n,)),
        "moment": (whole, (n,)),
    }  # fmt: skip
    for name, (kind, shape) in wanted.items():
        found = arrays.get(name)
        fits = (
            found is not None
            and found.dtype == kind
            and len(found.shape) == len(shape)
            and all(w is None or w == f for w, f in zip(shape, found.shape, strict=True))
        )
        if not fits or not n or not np.isfinite(found).all():  # type: ignore[arg-type]
            raise TalkheadError(f"the run's portrait.npz is damaged ({name}); enroll it again")
    if extra := set(arrays) - set(wanted):
        raise TalkheadError(f"the run's portrait.npz holds what it should not: {', '.join(extra)}")
