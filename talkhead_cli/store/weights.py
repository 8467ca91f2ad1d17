"""Third-party weights: where they come from, where they lie, whether they are what they claim.

Nothing is downloaded by itself.  A file is found in $TALKHEAD_WEIGHTS (or
~/.cache/talkhead/weights), or where torch's hub keeps it; `import_file` puts one there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.store.files import atomic, sha256_of, write_json


@dataclass(frozen=True)
class Weights:
    """One published file. `sha256` None: no hash is published; the first import records one."""

    name: str
    file: str
    what_for: str
    licence: str
    sha256: str | None = None


KNOWN = {
    w.name: w
    for w in (
        Weights("hubert", "hubert_fairseq_base_ls960.pth",
                "speech features that carry over between languages", "MIT (fairseq)"),
        Weights("wav2vec2", "wav2vec2_fairseq_base_ls960_asr_ls960.pth", "speech features",
                "MIT (fairseq)",
                "488fd4f16de84438ffc945334278c1b9fb9b7159a806c1080b16111a958c945d"),
    )
}  # fmt: skip


def folder() -> Path:
    """Where imported weights lie."""
    given = os.environ.get("TALKHEAD_WEIGHTS")
    return Path(given) if given else Path.home() / ".cache" / "talkhead" / "weights"


def find(name: str) -> Path | None:
    """The file of known weights, or None when it is not on this machine."""
    file = _known(name).file
    hub = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch")
    for place in (folder() / file, hub / "hub" / "checkpoints" / file):
        if place.is_file():
            return place
    return None


def need(name: str) -> Path:
    """The file of known weights, or one sentence that says how to bring it."""
    found = find(name)
    if found is None:
        raise TalkheadError(
            f"the weights of {name} ({_known(name).file}) are not on this machine; fetch that file "
            f"and run: talkhead models import {name} FILE"
        )
    return found


def load(name: str) -> dict[str, Any]:
    """The state dict of known weights; only tensors are read, never code."""
    import torch

    path = need(name)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises whatever the torn file provokes
        raise TalkheadError(f"{path} cannot be read ({error}); fetch the file again") from error


def verify(name: str) -> str:
    """'ok', 'missing', 'no hash known' or 'WRONG' for one of the known weights."""
    path = find(name)
    if path is None:
        return "missing"
    wanted = _known(name).sha256 or _recorded(path)
    if wanted is None:
        return "no hash known"
    return "ok" if sha256_of(path) == wanted else "WRONG"


def import_file(name: str, file: Path) -> Path:
    """Copy a file into the folder as known weights; refuses one with another hash."""
    weights = _known(name)
    if not file.is_file():
        raise TalkheadError(f"there is no file {file}")
    digest = sha256_of(file)
    if weights.sha256 is not None and digest != weights.sha256:
        raise TalkheadError(
            f"{file.name} is not {name}: its sha256 is {digest[:12]}..., {weights.sha256[:12]}... "
            "was published; fetch it again"
        )
    target = folder() / weights.file
    with atomic(target) as part:
        shutil.copyfile(file, part)
    write_json(_record_of(target), {"sha256": digest, "from": file.name})
    return target


def _known(name: str) -> Weights:
    if name not in KNOWN:
        raise MisuseError(f"unknown weights '{name}'; known: {', '.join(sorted(KNOWN))}")
    return KNOWN[name]


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _recorded(path: Path) -> str | None:
    from talkhead_cli.store.files import read_json

    record = _record_of(path)
    return str(read_json(record)["sha256"]) if record.exists() else None
