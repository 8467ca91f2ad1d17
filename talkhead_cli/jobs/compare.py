"""Compare runs of one identity side by side: one table, one film."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from talkhead_cli import media
from talkhead_cli.contracts import MisuseError, Progress, TalkheadError
from talkhead_cli.jobs.evaluate import TAG, evaluate, flattered, refuse_stale
from talkhead_cli.jobs.maps import side_by_side
from talkhead_cli.jobs.runs import pick_by_beginning
from talkhead_cli.store import Run, Workspace
from talkhead_cli.store.files import read_json, write_json

# Rows of the table: the label, and the path of the value in the figures.
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("PSNR, face box (dB)", ("picture", "face_box", "psnr_db")),
    ("PSNR, full (dB)", ("picture", "full", "psnr_db")),
    ("SSIM, face box", ("picture", "face_box", "ssim")),
    ("lips against truth", ("lips", "correlation", "r")),
    ("  linear baseline", ("lips", "linear_baseline", "r")),
    ("  other speech (control)", ("lips", "mismatched_control", "r")),
    ("  spread", ("lips", "correlation", "spread")),
    ("eyes against truth", ("eyes", "correlation", "r")),
    ("LMD, mouth (px at 512)", ("lmd_px_at_512",)),
    ("jitter against truth's", ("jitter_px_at_512", "ratio")),
    ("marching (frames/s)", ("render", "frames_per_second")),
    ("training (s)", ("training_seconds",)),
)


def compare(
    home: Path, name: str, wanted: Sequence[str], progress: Progress, *, device: str = "auto"
) -> tuple[dict[str, Any], list[Path]]:
    """Return a table of the figures of several runs, and the paths of table and film.

    wanted: names of runs, or their beginnings, for which the newest such run is taken.  A run
    that was evaluated after it was trained is not evaluated again.
    """
    space = Workspace.open(home, name)
    runs = list(
        {run.name: run for run in (pick_by_beginning(space, word) for word in wanted)}.values()
    )
    if len(runs) < 2:
        raise MisuseError("--compare needs at least two different runs, like lokitalk,landmark")
    for run in runs:
        refuse_stale(space, run)
    figures = {run.name: _figures(home, name, run, progress, device) for run in runs}
    _same_protocol(figures)
    folder = space.root / "compare" / re.sub(r"[^\w.+-]", "-", "-and-".join(figures))
    table = {
        label: {run: _at(found, path) for run, found in figures.items()} for label, path in ROWS
    }
    first = next(iter(figures.values()))
    answer = {"identity": name, "protocol": first["protocol"], "table": table}
    folder.mkdir(parents=True, exist_ok=True)
    film, figures_file = folder / "side_by_side.mp4", folder / "table.json"
    films = [("truth", runs[0].evaluation / "truth.mp4")]
    films += [(run.name, run.evaluation / "render.mp4") for run in runs]
    _write_side_by_side(films, runs[0].evaluation / "sound.wav", film)
    write_json(figures_file, answer)
    return answer, [figures_file, film]


def _figures(home: Path, name: str, run: Run, progress: Progress, device: str) -> dict[str, Any]:
    written = run.evaluation / "metrics.json"
    films = [run.evaluation / name for name in ("truth.mp4", "render.mp4", "sound.wav")]
    if all(file.is_file() for file in (written, *films)):
        found: dict[str, Any] = read_json(written)
        if _is_whole(found) and written.stat().st_mtime > run.meta().get("finished_at", 0):
            if (found.get("prior") or {}).get("knew_person"):
                progress.note(flattered(run, name))
            return found
    progress.note(f"evaluating {run.name}")
    try:
        return evaluate(home, name, progress, run_name=run.name, device=device)[0]
    except TalkheadError as error:
        raise TalkheadError(f"{run.name}: {error}; leave it out of --compare") from error


def _same_protocol(figures: dict[str, dict[str, Any]]) -> None:
    """Raise TalkheadError unless all figures are of the same frames and picture size."""
    asked = ("frames", "size_px")
    seen = {run: tuple(str(f["protocol"][k]) for k in asked) for run, f in figures.items()}
    if len(set(seen.values())) > 1:
        told = "; ".join(f"{run}: frames {a} at {b} px" for run, (a, b) in seen.items())
        raise TalkheadError(f"these runs were scored on different pictures ({told})")


def _is_whole(figures: dict[str, Any]) -> bool:
    """Return whether figures hold all rows of the table; older versions wrote less."""
    try:
        for _, path in ROWS:
            _at(figures, path)
    except (KeyError, TypeError):
        return False
    return True


def _at(figures: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        figures = figures[key]
    return figures


def _write_side_by_side(films: list[tuple[str, Path]], sound: Path, out: Path) -> None:
    """Write the films next to each other, frame by frame, under their names."""
    with ExitStack() as open_films:
        streams = [media.frames(film) for _, film in films]
        for stream in streams:  # stops ffmpeg if a film is not read to its end
            open_films.callback(stream.close)
        names = [name for name, _ in films]
        pictures = (
            side_by_side(list(zip(names, row, strict=True))) for row in zip(*streams, strict=True)
        )
        first = next(pictures)
        writer = open_films.enter_context(
            media.VideoWriter(
                out, (first.shape[1], first.shape[0]), crf=12, audio=sound, metadata=TAG
            )
        )
        writer.write(first)
        for picture in pictures:
            writer.write(picture)
