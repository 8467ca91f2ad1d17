"""Atomic writes, locks, JSON and array files, hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkhead_cli.contracts import MisuseError, TalkheadError

UMASK = os.umask(0o077)  # which can only be read by setting it
os.umask(UMASK)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = _begun(path)
    try:
        yield part
        os.chmod(part, 0o666 & ~UMASK)
        with part.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave an empty file of that name
        os.replace(part, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TalkheadError(
                f"the disk is full while writing {path.name}; free some space in "
                f"{path.parent} and run the same command again"
            ) from error
        raise
    finally:
        part.unlink(missing_ok=True)
        os.close(handle)


def _begun(path: Path) -> tuple[int, Path]:
    """Create a file beside `path`, locked while it is written, so that no `sweep` removes it."""
    while True:
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=path.suffix, dir=path.parent)
        with contextlib.suppress(OSError):  # not every mount has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):
            return handle, Path(name)
        os.close(handle)  # swept before it was locked


def delete_folder(folder: Path) -> None:
    """Delete a folder and what is in it; of a link to one, both."""
    shutil.rmtree(folder.resolve())
    if folder.is_symlink():
        folder.unlink()


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder; files that are being written stay."""
    for stale in folder.glob(".part-*"):
        if stale.is_dir():
            shutil.rmtree(stale)
            continue
        with contextlib.suppress(OSError), stale.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file for one writing job on `what`; TalkheadError if another job has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TalkheadError(
                f"another talkhead is working on '{what}'; wait until it has ended"
            ) from error
        except OSError as error:  # a mount without locks, where nobody can be told to wait
            warnings.warn(
                f"{lock.parent} cannot be locked ({error.strerror}): run no second talkhead job on "
                f"'{what}' meanwhile",
                stacklevel=2,
            )
        yield


def refuse_foreign(files: Mapping[Path, Callable[[Path], bool]], command: str) -> None:
    """Raise MisuseError for the first file that is there and that `command` did not write; each
    file is given with the function that tells."""
    for path, is_ours in files.items():
        if path.exists() and not is_ours(path):
            raise MisuseError(
                f"{path} is there already, and was not made by {command}; give another -o, or move "
                "it away"
            )


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as part:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # file names may hold bytes that are no text, which are written as JSON's \\udcXX
        part.write_bytes(text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise TalkheadError(f"{path} is damaged ({error}); delete it and run again") from error


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], *, compress: bool = False) -> None:
    with atomic(path) as part, part.open("wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)


def read_arrays(
    path: Path, *, cure: str = "run preprocess with --fresh"
) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz; TalkheadError, with the cure, where it is damaged."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is no archive of arrays")
        with archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TalkheadError(f"{path} is damaged ({error}); {cure}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def digest(*parts: Any) -> str:
    """Return a short content hash of plain values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
