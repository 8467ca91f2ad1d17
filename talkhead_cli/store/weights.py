"""Third-party weights: their sources, their local files, and verification by sha256.

Nothing is downloaded automatically.  A file is looked up in $TALKHEAD_WEIGHTS (or
~/.cache/talkhead/weights), then in the cache of the library that it is made for; `pull` and
`import_file` put one into the former folder.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, Progress, TalkheadError
from talkhead_cli.store.files import atomic, read_json, sha256_of, write_json

CHUNK = 1 << 20
TIMEOUT_S = 30
FAN = "https://www.adrianbulat.com/downloads/python-fan/"
FACEXLIB = "https://github.com/xinntao/facexlib/releases/download/"
TORCH = "https://download.pytorch.org/"
EG3D = "NVIDIA source code licence: non-commercial research"
MEDIAPIPE = "https://storage.googleapis.com/mediapipe-models/"


@dataclass(frozen=True)
class Weights:
    """One published file.

    url: folder it is published in, ending in /; "" if it is not published in this form: `import`
    then converts the published file · sha256: the whole hash, or the published beginning of it
    (torch's hub puts that into file names); "" if none is published · bytes: 0 if unknown
    """

    name: str
    file: str
    url: str
    what_for: str
    licence: str
    sha256: str = ""
    bytes: int = 0


KNOWN = {
    w.name: w
    for w in (
        Weights("hubert", "hubert_fairseq_base_ls960.pth", TORCH + "torchaudio/models/",
                "speech features that carry over between languages", "MIT (fairseq)"),
        Weights("wav2vec2", "wav2vec2_fairseq_base_ls960_asr_ls960.pth",
                TORCH + "torchaudio/models/", "speech features", "MIT (fairseq)",
                "488fd4f16de84438ffc945334278c1b9fb9b7159a806c1080b16111a958c945d", 377_664_473),
        Weights("retinaface", "detection_Resnet50_Final.pth", FACEXLIB + "v0.1.0/",
                "finds faces, also small and turned ones", "MIT (facexlib)",
                "6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d", 109_497_761),
        Weights("bisenet", "parsing_bisenet.pth", FACEXLIB + "v0.2.0/",
                "labels of face, hair, neck and clothes",
                "MIT (code); trained on CelebAMask-HQ: non-commercial research",
                "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567", 53_289_463),
        Weights("face-landmarker", "face_landmarker.task",
                MEDIAPIPE + "face_landmarker/face_landmarker/float16/1/",
                "MediaPipe's newer face mesh", "Apache-2.0",
                "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff", 3_758_596),
        Weights("fan2d", "2DFAN4-11f355bf06.pth.tar", FAN,
                "68 landmarks along the visible outline (face-alignment)", "BSD-3-Clause",
                "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa"),
        Weights("fan3d", "3DFAN4-7835d9f11d.pth.tar", FAN,
                "68 landmarks of the face in space, as seen (face-alignment)", "BSD-3-Clause",
                "7835d9f11d"),
        Weights("eg3d", "ffhqrebalanced512-128.safetensors", "",
                "a generator of faces that talk3d begins with", EG3D),
        Weights("eg3d-fixed", "ffhq-fixed-triplane512-128.safetensors", "",
                "the same, with planes on all three pairs of axes (VIVE3D, Talk3D)", EG3D),
        Weights("lpips", "alexnet-owt-7be5be79.pth", TORCH + "models/",
                "LPIPS: how alike pictures look, in training and in evaluate", "BSD-3-Clause",
                "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", 244_408_911),
    )
}  # fmt: skip


def folder() -> Path:
    """Return the folder of pulled and imported weights."""
    given = os.environ.get("TALKHEAD_WEIGHTS")
    return Path(given) if given else Path.home() / ".cache" / "talkhead" / "weights"


def licence(name: str) -> str:
    """Return the terms under which known weights are published."""
    return _known(name).licence


def find(name: str) -> Path | None:
    """Return the file of known weights, or None if it is not on this machine."""
    file = _known(name).file
    return next((place / file for place in _places() if (place / file).is_file()), None)


def _places() -> Iterator[Path]:
    """Yield our folder, then the caches of the libraries: torch's hub, facexlib's own package."""
    yield folder()
    hub = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch")
    yield hub / "hub" / "checkpoints"
    facexlib = importlib.util.find_spec("facexlib")
    if facexlib is not None and facexlib.origin is not None:
        yield Path(facexlib.origin).parent / "weights"


def shipped(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a safetensors file that ships with the package."""
    from safetensors.numpy import load_file

    return load_file(path)


def need(name: str) -> Path:
    """Return the file of known weights; TalkheadError, with how to get it, if it is missing."""
    found = find(name)
    if found is None and is_converted(name):
        raise TalkheadError(f"the weights of {name} are not on this machine; {_by_hand(name)}")
    if found is None:
        raise TalkheadError(
            f"the weights of {name} ({_known(name).file}) are not on this machine; run: talkhead "
            f"models pull {name}, or fetch that file elsewhere and run: talkhead models import "
            f"{name} FILE"
        )
    return found


def verified(name: str) -> Path:
    """Return the file of known weights; TalkheadError if it is missing or its sha256 is wrong."""
    path = need(name)
    if verify(name) == "WRONG":
        cure = _by_hand(name) if is_converted(name) else f"run: talkhead models pull {name}"
        raise TalkheadError(
            f"{path} is not {name}: its sha256 is another one than was published; delete it and "
            f"{cure}"
        )
    return path


def load(name: str) -> dict[str, Any]:
    """Return the state dict of known weights; only tensors are read, never code."""
    return _tensors_of(verified(name))


def _tensors_of(path: Path, called: Path | None = None) -> dict[str, Any]:
    """Read a state dict; TalkheadError, which names the file `called`, if the file holds none."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch can raise anything on a damaged file
        raise TalkheadError(
            f"{called or path} cannot be read ({error}); fetch the file again"
        ) from error


def load_into(module: Any, name: str, state: dict[str, Any], library: str) -> None:
    """Load a state dict into a library's module strictly and freeze it; TalkheadError if unfit."""
    try:
        module.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise TalkheadError(
            f"the file of {name} ({_known(name).file}) does not hold its weights as {library} lays "
            "them out; fetch the file again"
        ) from error
    module.eval().requires_grad_(False)


def verify(name: str) -> str:
    """Return 'missing', 'WRONG', 'ok', 'no hash known' or, of weights whose hash is not published,
    'unchanged' since they were installed."""
    path = find(name)
    if path is None:
        return "missing"
    published = _known(name).sha256
    wanted = published or _recorded(path)
    if not wanted:
        return "no hash known"
    if not sha256_of(path).startswith(wanted):
        return "WRONG"
    return "ok" if published else "unchanged"


def import_file(name: str, file: Path) -> Path:
    """Copy a file into the folder as known weights; TalkheadError if its hash is another one or, of
    weights whose hash is not published, if it holds no tensors."""
    if not file.is_file():
        raise TalkheadError(f"there is no file {file}")
    target = folder() / _known(name).file
    with atomic(target) as part:
        shutil.copyfile(file, part)
        digest = _checked(name, part, file.name)
        if not _known(name).sha256:
            _tensors_of(part, file)
    write_json(_record_of(target), {"sha256": digest, "from": file.name})
    return target


def is_converted(name: str) -> bool:
    """Return whether `import` converts the published file instead of copying it."""
    return not _known(name).url


def save_converted(name: str, tensors: dict[str, Any], facts: dict[str, str]) -> Path:
    """Save tensors converted from a published file, with a record of their source."""
    from safetensors.torch import save_file

    target = folder() / _known(name).file
    with atomic(target) as part:
        save_file(tensors, part)
        digest = sha256_of(part)
    write_json(_record_of(target), {"sha256": digest, **facts})
    return target


def _by_hand(name: str) -> str:
    published = Path(_known(name).file).with_suffix(".pkl").name
    return (
        f"fetch {published} yourself, if its licence suits you ({licence(name)}), and run: "
        f"talkhead models import {name} {published}"
    )


def pull(name: str, progress: Progress, *, source: str | None = None, sha256: str = "") -> Path:
    """Fetch known weights into the folder, complete and verified, or not at all.

    source: a folder or https address that holds the file under its published name; by default
    where it is published · sha256: of the file; required where none is published
    """
    weights = _known(name)
    if is_converted(name):
        raise MisuseError(f"{name} is not published as a file by itself; {_by_hand(name)}")
    source = weights.url if source is None else source
    if "://" not in source:
        place = Path(source) / weights.file
        if not place.is_file():
            raise TalkheadError(f"there is no {weights.file} in the folder {source}")
    elif not source.startswith("https://"):
        raise MisuseError(f"--from must be a folder or an https:// address, not {source}")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise MisuseError("--sha256 must be 64 hexadecimal digits")
    if not (weights.sha256 or sha256):
        raise MisuseError(
            f"no sha256 is published for {weights.file}; say which one the file must have: "
            f"talkhead models pull {name} --sha256 HEX"
        )
    target = folder() / weights.file
    with atomic(target) as part:
        if "://" in source:
            _download(f"{source.rstrip('/')}/{weights.file}", part, weights, progress)
        else:
            shutil.copyfile(place, part)
        digest = _checked(name, part, weights.file, sha256)
    write_json(_record_of(target), {"sha256": digest, "from": source})
    return target


def _download(address: str, part: Path, weights: Weights, progress: Progress) -> None:
    progress.stage(weights.file, round(weights.bytes / CHUNK) or None, "MB")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer, part.open("wb") as out:
            while piece := answer.read(CHUNK):
                out.write(piece)
                progress.advance()
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
        ValueError,
    ) as error:
        reason = getattr(error, "reason", None) or error
        raise TalkheadError(
            f"{address} could not be fetched ({reason}); name a mirror or a folder that holds the "
            "file with --from"
        ) from error


def _checked(name: str, file: Path, called: str, asked: str = "") -> str:
    """Return the file's sha256; TalkheadError unless it is the published and the given one."""
    digest = sha256_of(file)
    for wanted in filter(None, (_known(name).sha256, asked.lower())):
        if not digest.startswith(wanted):
            raise TalkheadError(
                f"{called} is not {name}: its sha256 is {digest[:12]}..., {wanted[:12]}... was "
                f"{'published' if wanted == _known(name).sha256 else 'asked for'}; fetch it again"
            )
    return digest


def _known(name: str) -> Weights:
    if name not in KNOWN:
        raise MisuseError(f"unknown weights '{name}'; known: {', '.join(sorted(KNOWN))}")
    return KNOWN[name]


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _recorded(path: Path) -> str:
    record = _record_of(path)
    return str(read_json(record).get("sha256", "")) if record.exists() else ""
