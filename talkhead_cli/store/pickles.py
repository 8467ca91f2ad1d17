"""Tensors out of a pickled network, without running anything that the file says.

StyleGAN's and EG3D's published files are pickles of live objects, with the source of their classes
inside, which their own loader executes.  Here every class of the file becomes an inert record; what
is called are the few functions that put a tensor together, and nothing else can be named.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talkhead_cli.contracts import TalkheadError


class Inert:
    """An object of the file: what its class held, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state


class InertDict(dict[Any, Any]):
    """A dictionary of a class of its own."""

    def __setstate__(self, state: Any) -> None:
        pass


def networks(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each network that a pickled dictionary holds, by the network's name and then
    by their own, as a state dict has them.

    Raises TalkheadError for a file that is no such pickle, or that names anything else than
    tensors and modules.
    """
    try:
        with path.open("rb") as file:
            held = _Reader(file).load()
    except TalkheadError:
        raise
    except Exception as error:  # a torn pickle raises whatever it provokes
        raise TalkheadError(f"{path} cannot be read as a pickled network ({error})") from error
    found = {str(k): _tensors(v) for k, v in held.items()} if isinstance(held, dict) else {}
    found = {name: tensors for name, tensors in found.items() if tensors}
    if not found:
        raise TalkheadError(f"{path} holds no networks")
    return found


def _tensors(value: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a module and those inside it."""
    if not isinstance(value, Inert):
        return {}
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        own = value.fields.get(kind) or {}
        found |= {str(k): v.detach() for k, v in own.items() if isinstance(v, Tensor)}
    for name, inner in (value.fields.get("_modules") or {}).items():
        found |= {f"{name}.{k}": v for k, v in _tensors(inner).items()}
    return found


def _persistent(meta: Any) -> Inert:
    """An object that came with its own source, of which only the state is looked at."""
    made = Inert()
    made.__setstate__(meta.get("state") if isinstance(meta, dict) else None)
    return made


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, *_: Any
) -> Tensor:
    """A view of a storage, inside its bounds."""
    flat = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)
    return flat.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _made(cls: Any, *_: Any) -> Any:
    """What copyreg does for old protocols, for our own classes alone."""
    return cls()


_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("copyreg", "_reconstructor"): _made,
    ("copy_reg", "_reconstructor"): _made,
    ("builtins", "object"): Inert,
    ("builtins", "set"): set,
    ("dnnlib.util", "EasyDict"): InertDict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Reader(pickle.Unpickler):
    """Knows the names of `_CALLED`, and takes classes of torch.nn for inert ones."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLED:
            return _CALLED[module, name]
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return Inert
        raise TalkheadError(
            f"the file names {module}.{name}, which is no part of a network's tensors; it was not "
            "read any further"
        )
