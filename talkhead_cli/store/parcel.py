"""Export and import of an avatar as one file, from a training to a rendering machine.

A `.talkhead` file is a zip of plain files: `parcel.json` (identity, run, size and sha256 of each
file), the manifest, consent records, and the run.  Of the footage it holds only the background, the
driving signals (drive.npz) and the pictures that an avatar is made from (portrait.npz).  Nothing in
it is code: weights are safetensors, arrays plain.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from talkhead_cli.contracts import MisuseError, TalkheadError
from talkhead_cli.store.checkpoint import Run
from talkhead_cli.store.files import atomic, sha256_of
from talkhead_cli.store.workspace import Workspace, check_id

SUFFIX = ".talkhead"
FORMAT = "talkhead-avatar/1"
EXTRA_FILES = ("portrait.npz",)  # of avatars that are made from pictures
RUN_FILES = ("preset.yaml", "avatar.safetensors", "meta.json", "drive.npz", "plate.png")
MAX_FILE = 4 << 30  # bytes; a larger declared size is refused before anything is unpacked
MAX_RECORD = 1 << 20  # bytes of parcel.json
BLOCK = 1 << 20
_STAMP = (1980, 1, 1, 0, 0, 0)  # fixed: packing an avatar twice gives the same file


def pack(space: Workspace, run: Run, out: Path) -> Path:
    """Write run `run` of identity `space` into the file `out`, which must not exist yet."""
    if out.exists():
        raise TalkheadError(f"{out} is there already; give another -o")
    files = {"manifest.json": space.root / "manifest.json"}
    files |= {f"consent/{name}": space.root / "consent" / name for name in space.consents()}
    kept = (*RUN_FILES, *(name for name in EXTRA_FILES if (run.root / name).exists()))
    files |= {f"runs/{run.name}/{name}": run.root / name for name in kept}
    absent = [name for name, path in files.items() if not path.is_file()]
    if absent:
        raise TalkheadError(f"'{space.id}' lacks {', '.join(absent)}; run finetune again")
    record = {
        "format": FORMAT,
        "id": space.id,
        "run": run.name,
        "files": {n: {"size": p.stat().st_size, "sha256": sha256_of(p)} for n, p in files.items()},
    }
    with atomic(out) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("parcel.json", _STAMP), json.dumps(record, indent=2))
        for name, path in files.items():
            entry = zipfile.ZipInfo(name, _STAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, BLOCK)
    return out


def unpack(
    file: Path, home: Path, name: str | None = None, *, check: Callable[[Run], None] | None = None
) -> tuple[Workspace, Run]:
    """Import a parcel into `home`, as identity `name` or its own; all of it or nothing.

    An identity that exists already must be of the same footage; its other runs stay.  `check`
    raises TalkheadError for a run, still aside, that is not to be imported.
    """
    if not file.is_file():
        raise TalkheadError(f"there is no file {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            record = _record(archive)
            space = Workspace(home, check_id(record["id"] if name is None else name))
            run = Run.named(space.runs, record["run"])
            is_new = not space.root.exists()
            with space.locked():
                is_new &= not space.exists()  # somebody may have made it before the lock was had
                try:
                    _fits(space, run, archive)
                    with tempfile.TemporaryDirectory(prefix=".part-", dir=space.root) as folder:
                        _extract(archive, record, Path(folder))
                        if check is not None:
                            check(Run(Path(folder) / "runs" / run.name))
                        _settle(Path(folder), space, run)
                except BaseException:
                    if is_new:
                        shutil.rmtree(space.root, ignore_errors=True)
                    raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(file, str(error)) from error
    except _Wrong as error:
        raise _damaged(file, str(error)) from error
    return space, run


class _Wrong(Exception):
    """A parcel is invalid; the message says why."""


def _damaged(file: Path, why: str) -> TalkheadError:
    return TalkheadError(f"{file} is no whole {SUFFIX} file ({why}); export the avatar again")


def _record(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Read parcel.json and check every name and number in it."""
    names = archive.namelist()
    if "parcel.json" not in names:
        raise _Wrong("it has no parcel.json")
    for entry in archive.infolist():
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _Wrong(f"'{entry.filename}' is compressed in another way than talkhead does")
    if archive.getinfo("parcel.json").file_size > MAX_RECORD:
        raise _Wrong("its parcel.json is too large")
    try:
        record = json.loads(archive.read("parcel.json"))
    except ValueError as error:
        raise _Wrong("its parcel.json is not JSON") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _Wrong(f"it is not of the format {FORMAT}")
    files = record.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(record.get(k), str) for k in ("id", "run")
    ):
        raise _Wrong("its parcel.json is incomplete")
    if sorted(names) != sorted([*files, "parcel.json"]):
        raise _Wrong("it holds other files than it lists")
    needed = {"manifest.json", *(f"runs/{record['run']}/{name}" for name in RUN_FILES)}
    if missing := needed - set(files):
        raise _Wrong(f"it lacks {', '.join(sorted(missing))}")
    allowed = needed | {f"runs/{record['run']}/{name}" for name in EXTRA_FILES}
    for name, facts in files.items():
        place = PurePosixPath(name)
        consent = len(place.parts) == 2 and place.parts[0] == "consent"
        if name not in allowed and not (consent and place.name not in ("", ".", "..")):
            raise _Wrong(f"'{name}' has no place in an avatar")
        if not isinstance(facts, dict) or not isinstance(facts.get("size"), int):
            raise _Wrong(f"it does not say the size of '{name}'")
        if not 0 <= facts["size"] <= MAX_FILE or archive.getinfo(name).file_size != facts["size"]:
            raise _Wrong(f"the size of '{name}' is not what it says")
    return record


def _fits(space: Workspace, run: Run, archive: zipfile.ZipFile) -> None:
    """Raise if the manifest names no footage, or if the identity exists with other footage or
    already has this run."""
    try:
        theirs = json.loads(archive.read("manifest.json"))["source"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise _Wrong("its manifest does not name its footage") from error
    if not space.exists():
        return
    if space.manifest().get("source", {}).get("sha256") != theirs:
        raise MisuseError(
            f"there is another '{space.id}' here, of other footage; name the avatar with --id"
        )
    if run.root.exists():
        raise TalkheadError(
            f"'{space.id}' has a run '{run.name}' already; remove it, or give another --id"
        )


def _extract(archive: zipfile.ZipFile, record: dict[str, Any], folder: Path) -> None:
    """Extract the files into `folder`, checking the declared size and sha256 of each."""
    for name, facts in record["files"].items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        left, seen = facts["size"], hashlib.sha256()
        with archive.open(name) as source, target.open("wb") as sink:
            while block := source.read(min(BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    raise _Wrong(f"'{name}' is longer than it says")
                seen.update(block)
                sink.write(block)
        if left or seen.hexdigest() != facts.get("sha256"):
            raise _Wrong(f"'{name}' is damaged")


def _settle(folder: Path, space: Workspace, run: Run) -> None:
    """Move unpacked files to their places, the manifest last: it makes the identity exist."""
    run.root.parent.mkdir(parents=True, exist_ok=True)
    (folder / "runs" / run.name).rename(run.root)
    for record in (folder / "consent").iterdir() if (folder / "consent").is_dir() else ():
        (space.root / "consent").mkdir(exist_ok=True)
        record.replace(space.root / "consent" / record.name)
    if not space.exists():
        (folder / "manifest.json").rename(space.root / "manifest.json")
        space.note(id=space.id)
