"""Preprocess many videos, several at a time in separate processes; one that fails does not stop
the others.

With Ray (an extra: pip install 'talkhead[ray]') they run on several machines.  Videos and home must
have the same paths on all of them, and the same version of talkhead be installed.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from talkhead_cli import __version__
from talkhead_cli.contracts import (
    MisuseError,
    Progress,
    SilentProgress,
    TalkheadError,
    free_gb,
    n_cores,
)

VIDEOS = frozenset([
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts",
    ".wmv", ".flv", ".3gp", ".ogv",
])  # fmt: skip
ENGINES = ("processes", "ray")
GB_PER_JOB = 0.7  # peak memory of preprocessing a short clip at 512 px


@dataclass
class Outcome:
    """Result of one video: the workspace `id`, or `error` with what to do about it."""

    video: str
    id: str
    seconds: float = 0.0
    n_frames: int = 0
    error: str | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def videos_of(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and the videos of given folders sorted by name; no duplicates."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p
                for p in path.iterdir()
                if p.suffix.lower() in VIDEOS and p.is_file() and not p.name.startswith(".")
            )
            if not inside:
                raise TalkheadError(f"there is no video in the folder {path}")
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def preprocess_many(
    videos: Sequence[Path],
    home: Path,
    progress: Progress,
    *,
    jobs: int = 0,
    engine: str = "processes",
    address: str | None = None,
    **options: Any,
) -> list[Outcome]:
    """Preprocess each of `videos` into `home`; return one outcome per video, in order.

    jobs: how many at a time; 0: as many as CPU cores and memory allow (with Ray, cores only).
    engine: processes, or ray, with the cluster at `address` (None: a new one on this machine).
    options are passed to `preprocess`.
    """
    if engine not in ENGINES:
        raise MisuseError(f"--engine must be {' or '.join(ENGINES)}, not '{engine}'")
    if address is not None and engine != "ray":
        raise MisuseError("--address is for --engine ray")
    if jobs < 0:
        raise MisuseError("--jobs must be 1 or more, or 0 to choose by cores and memory")
    names = [_id_or_nothing(video) for video in videos]
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        clash = ", ".join(str(v) for v, n in zip(videos, names, strict=True) if n in twice)
        raise MisuseError(f"these videos would have one id: {clash}; rename some")
    outcomes: dict[int, Outcome] = {}
    progress.stage("preprocess", len(videos), "videos")

    def ended(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        told = outcome.error or f"{outcome.n_frames} frames, {outcome.seconds:.1f} s"
        name = Path(outcome.video).name
        for said in (told, *outcome.notes):
            progress.note(said if said.startswith(name) else f"{name}: {said}")
        progress.advance()

    n_jobs = min(len(videos), jobs or _jobs_that_fit())
    if engine == "ray":
        _by_ray(videos, home, options, jobs, address, ended)
    else:
        _side_by_side(videos, home, options, n_jobs, ended, progress)
    return [outcomes[i] for i in range(len(videos))]


def preprocess_one(video: Path, home: Path, options: dict[str, Any]) -> Outcome:
    """Preprocess one video; errors go into the outcome, except MisuseError."""
    from talkhead_cli.jobs.preprocess import preprocess

    began, quiet = time.monotonic(), SilentProgress()
    outcome = Outcome(str(video), _id_or_nothing(video))
    try:
        space = preprocess(video, home, quiet, **options)
        outcome.id, outcome.n_frames = space.id, int(space.manifest()["n_frames"])
    except MisuseError as error:
        raise MisuseError(str(error)) from error  # the command is wrong for every video
    except (TalkheadError, OSError) as error:
        outcome.error = str(error)
    except Exception as error:  # a bug: reported, and the other videos go on
        outcome.error = f"an unexpected error ({type(error).__name__}: {error}); please report it"
    outcome.seconds, outcome.notes = round(time.monotonic() - began, 2), quiet.notes
    return outcome


def _side_by_side(
    videos: Sequence[Path],
    home: Path,
    options: dict[str, Any],
    n_jobs: int,
    ended: Callable[[int, Outcome], None],
    progress: Progress,
) -> None:
    """Run `n_jobs` at a time; if a killed process breaks the pool, run the rest one by one."""
    left = _pooled(range(len(videos)), videos, home, options, n_jobs, ended)
    if left:
        progress.note(
            "a process was killed, probably for memory; the videos that are left go one at a time"
        )
    for index in left:
        if _pooled([index], videos, home, options, 1, ended):
            outcome = Outcome(str(videos[index]), _id_or_nothing(videos[index]))
            outcome.error = (
                "its process was killed, probably for memory; free some, or take a part of the "
                "video (--from, --to)"
            )
            ended(index, outcome)


def _pooled(
    wanted: Sequence[int],
    videos: Sequence[Path],
    home: Path,
    options: dict[str, Any],
    n_jobs: int,
    ended: Callable[[int, Outcome], None],
) -> list[int]:
    """Run each of `wanted` in a fresh process, since the face mesh does not free its memory.
    Return those that are not done because a killed process broke the pool."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_jobs, mp_context=context, max_tasks_per_child=1)
    waiting: dict[Future[Outcome], int] = {}
    left = []
    try:
        waiting |= {pool.submit(preprocess_one, videos[i], home, options): i for i in wanted}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                index = waiting.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    left.append(index)
                else:
                    ended(index, future.result())
    except BaseException:
        for worker in list((pool._processes or {}).values()):  # else they finish their videos
            worker.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
    return sorted(left)


def _by_ray(
    videos: Sequence[Path],
    home: Path,
    options: dict[str, Any],
    jobs: int,
    address: str | None,
    ended: Callable[[int, Outcome], None],
) -> None:
    """Run them on Ray, `jobs` at a time; 0: as many as the cluster has cores."""
    try:
        import ray
    except ImportError as error:
        raise TalkheadError("--engine ray needs Ray: pip install 'talkhead[ray]'") from error
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None if address else False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f" at {address}" if address else ""
        raise TalkheadError(f"no Ray cluster could be reached{where}: {error}") from error
    # max_calls=1, a fresh process for each: the face mesh does not free its memory
    remote = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(preprocess_one)
    left = list(range(len(videos)))
    running: dict[Any, int] = {}
    try:
        while left or running:
            while left and len(running) < (jobs or len(videos)):
                index = left.pop(0)
                task = remote.remote(videos[index].absolute(), home.absolute(), options)
                running[task] = index
            done, _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done[0])
            try:
                outcome = ray.get(done[0])
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, MisuseError):  # the command is wrong for every video
                    raise cause from error
                outcome = Outcome(str(videos[index]), _id_or_nothing(videos[index]))
                outcome.error = (
                    f"its worker failed ({type(cause).__name__}); is talkhead {__version__} "
                    "installed on every machine of the cluster?"
                )
            ended(index, outcome)
    finally:
        ray.shutdown()


def _id_or_nothing(video: Path) -> str:
    from talkhead_cli.jobs.preprocess import id_from

    try:
        return id_from(video)
    except MisuseError:
        return ""


def _jobs_that_fit() -> int:
    """Return how many jobs at a time the CPU cores and free memory allow."""
    return max(1, min(n_cores(), int(free_gb() / GB_PER_JOB)))
