"""Published generators that an avatar can start from.

Their files are pickled objects; they are converted once, tensors only, to safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from talkhead_cli.avatars.base import Avatar
from talkhead_cli.blocks import eg3d
from talkhead_cli.contracts import Progress, TalkheadError
from talkhead_cli.store import pickles, weights
from talkhead_cli.store.files import sha256_of

NETWORK = "G_ema"  # of the networks in a file, the one with averaged weights


def import_generator(name: str, file: Path) -> Path:
    """Convert a published file into the folder of weights, without running any of its pickled code;
    TalkheadError if its layout is not the known one."""
    if not file.is_file():
        raise TalkheadError(f"there is no file {file}")
    held = pickles.networks(file)
    if NETWORK not in held:
        raise TalkheadError(f"{file} holds {', '.join(sorted(held))}, and no {NETWORK}")
    try:
        tensors = eg3d.checked(held[NETWORK])
    except ValueError as error:
        raise TalkheadError(f"{file} is not {name} as it was published: {error}") from error
    return weights.save_converted(name, tensors, {"from": file.name, "of": sha256_of(file)})


def load_generator(avatar: Avatar, name: str, progress: Progress) -> None:
    """Load a generator into a fresh avatar that was built for it."""
    state = weights.load(name)
    try:
        avatar.load_generator(state)
    except ValueError as error:
        raise TalkheadError(
            f"{weights.need(name)} does not hold {name} ({error}); import its file again"
        ) from error
    terms = weights.licence(name)
    progress.note(f"generator: {name}; what is made with it is bound by its licence ({terms})")


def facts(name: str | None) -> dict[str, Any]:
    """Return what a run records of its generator, {} without one."""
    return {} if name is None else {"generator": {"name": name, "licence": weights.licence(name)}}
