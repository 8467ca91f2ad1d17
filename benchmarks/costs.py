"""Costs and results of whole commands: wall time, peak memory, figures.

Each part runs the real command line in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from charts import line_chart
from kit import (
    CLIPS,
    asked,
    clip,
    looped,
    people_of,
    preprocessed,
    presets_as_words,
    speech,
    talkhead,
    trained_run,
)


def part_help(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    seconds = [talkhead("--help")["seconds"] for _ in range(5)]
    return {"command": "talkhead --help", "seconds": seconds, "best_s": min(seconds)}


def part_preprocess(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    for name in options.ids:
        made = talkhead(
            "preprocess",
            str(clip(name, work)),
            "--id",
            name,
            "--home",
            str(work / "home"),
            "--fresh",
            "--json",
        )
        manifest = json.loads(made.pop("stdout"))["manifest"]
        rows[name] = made | {
            "frames": manifest["n_frames"],
            "frames_per_second": manifest["frames_per_second"],
            "size_px": manifest["size_px"],
        }
    return rows


def part_quality(work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    home = ["--home", str(work / "home")]
    rows = {}
    for name in options.ids:
        preprocessed(name, work)
        trained = talkhead(
            "finetune",
            "--id",
            name,
            *presets_as_words(options),
            "--fresh",
            *home,
            "--device",
            options.device,
            "--seed",
            str(options.seed),
        )
        scored = talkhead("evaluate", "--id", name, "--json", *home, "--device", options.device)
        figures = json.loads(scored.pop("stdout"))["figures"]
        trained.pop("stdout")
        rows[name] = {"finetune": trained, "evaluate": scored, "figures": figures}
        yield rows


def part_seventh(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the complete workflow: a prior of six people, then a seventh, the first of --ids,
    fine-tuned from it."""
    name, home = options.ids[0], ["--home", str(work / "home"), "--device", options.device]
    presets = [word for preset in options.presets for word in ("-p", preset)]
    six = [other for other in people_of(work, options) if other not in options.ids][:6]
    made = talkhead("pretrain", *presets, "--ids", ",".join(six), "-o", "six", "--fresh", *home)
    trained = talkhead("finetune", "--id", name, *presets, "--prior", "six", "--fresh", *home)
    run_name = Path(trained["stdout"].split()[-1]).name
    scored = talkhead("evaluate", "--id", name, "--run", run_name, "--json", *home)
    figures = json.loads(scored.pop("stdout"))["figures"]
    for told in (made, trained):
        told.pop("stdout")
    minutes = round((made["seconds"] + trained["seconds"]) / 60, 2)
    return {
        "six": six,
        "seventh": name,
        "minutes": minutes,
        "pretrain": made,
        "finetune": trained,
        "evaluate": scored,
        "figures": figures,
    }


def part_render(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    name = options.ids[0]
    run_name = trained_run(name, work, options)
    out = work / "film.mp4"
    made = talkhead(
        "render", "--id", name, "--run", run_name, "--audio", str(speech(work, 20)), "-o", str(out),
        "--home", str(work / "home"), "--device", options.device,
    )  # fmt: skip
    made.pop("stdout")
    sidecar = json.loads(out.with_name(out.name + ".json").read_text())
    keys = ("frames", "seconds_taken", "frames_per_second", "size_px")
    return made | {k: sidecar[k] for k in keys}


def part_memory(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure peak memory of preprocess and render for half a minute and ten minutes."""
    name = options.ids[0]
    run_name = trained_run(name, work, options)
    home = ["--home", str(work / "home")]
    rows: dict[str, Any] = {"preprocess": {}, "render": {}}
    for seconds in (30, 600):
        film = looped(clip(name, work), seconds, work)
        made = talkhead("preprocess", str(film), "--id", f"long{seconds}", "--fresh", *home)
        made.pop("stdout")
        rows["preprocess"][f"{seconds}_s"] = made
        made = talkhead(
            "render", "--id", name, "--run", run_name, "--audio", str(speech(work, seconds)),
            "-o", str(work / f"film{seconds}.mp4"), *home, "--device", options.device,
        )  # fmt: skip
        made.pop("stdout")
        rows["render"][f"{seconds}_s"] = made
    for found in rows.values():
        short, long = found["30_s"]["peak_mb"], found["600_s"]["peak_mb"]
        found["ratio"] = round(long / short, 4)
        found["mb_per_hour"] = round((long - short) / 570 * 3600)
    return rows


def part_sound(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the render time per second of sound, end to end."""
    name = options.ids[0]
    run_name = trained_run(name, work, options)
    rows = []
    for seconds in (5, 10, 20, 40):
        out = work / f"sound{seconds}.mp4"
        made = talkhead(
            "render", "--id", name, "--run", run_name, "--audio", str(speech(work, seconds)),
            "-o", str(out), "--home", str(work / "home"), "--device", options.device,
        )  # fmt: skip
        made.pop("stdout")
        rows.append({"seconds_of_sound": seconds, **made})
    lengths, walls = ([r[k] for r in rows] for k in ("seconds_of_sound", "seconds"))
    slope, start = np.polyfit(lengths, walls, 1)
    line_chart(
        options.chart("sound"),
        "seconds of sound",
        "wall seconds",
        {"render, end to end": (lengths, walls)},
    )
    return {"rows": rows, "start_s": round(start, 2), "per_second_of_sound_s": round(slope, 3)}


def part_photo(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time a picture's first frame and half a minute of film, Python start included, with the
    newest s3d prior of the work folder's home (trained on --ids if there is none)."""
    home = work / "home"
    priors = (home / ".priors").glob("*/preset.yaml")
    if not any("method: s3d" in preset.read_text() for preset in priors):
        for name in options.ids:
            preprocessed(name, work)
        words = ["-p", "s3d", "-p", "tiny", "--home", str(home)]
        talkhead("pretrain", *words, "--ids", ",".join(options.ids))
    face = CLIPS / "photos" / "portrait_b.png"
    if not face.exists():
        import cv2

        face = work / "face.png"
        cv2.imwrite(str(face), cv2.VideoCapture(str(clip("speaker", work))).read()[1])
    spoken = speech(work, 30)
    blip = work / "blip.wav"
    from talkhead_cli import media

    media.write_wav(blip, media.sound(spoken)[:640])

    def film(sound: Path) -> dict[str, Any]:
        made = talkhead("render", "--image", str(face), "--audio", str(sound), "-o",
                        str(work / "photo.mp4"), "--home", str(home))  # fmt: skip
        made.pop("stdout")
        return made

    first = [film(blip) for _ in range(3)]
    whole = film(spoken)
    best = min(row["seconds"] for row in first)
    rate = round((30 * 25 - 1) / (whole["seconds"] - best), 2)
    return {"first_frame_s": best, "frames_per_second": rate, "first": first, "film": whole}


def part_files(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run `check`, then `preprocess`, on every private clip and every hard file, and record the
    results of both."""
    folders = ("clips", "clips/more", "hard")
    rows = {}
    for film in sorted(p for f in folders for p in (CLIPS / f).iterdir() if p.is_file()):
        name = f"{film.parent.name}-{film.stem}".replace("_", "-")
        home = str(work / "files")
        looked = asked("check", str(film), "--json")
        done = asked("preprocess", str(film), "--id", name, "--home", home, "--fresh", "--json")
        row = {
            "check": _verdict(looked),
            "exit": done["exit"],
            "seconds": done["seconds"],
            "notes": done["notes"],
        }
        if done["exit"] == 0:
            manifest = json.loads(done["stdout"])["manifest"]
            kept = ("n_frames", "n_found", "n_cut_away", "faces_seen", "offset", "backends")
            row |= {k: manifest[k] for k in kept}
        rows[f"{film.parent.name}/{film.name}"] = row
    return {
        "files": len(rows),
        "tracked": sum(r["exit"] == 0 for r in rows.values()),
        "traceback": sum("Traceback" in " ".join(r["notes"]) for r in rows.values()),
        "rows": rows,
    }


def _verdict(looked: dict[str, Any]) -> dict[str, Any]:
    if not looked["stdout"]:
        return {"error": looked["notes"]}
    facts = json.loads(looked["stdout"])
    points = {
        f["name"]: f"{f['verdict']}: {f['found']}"
        for f in facts["findings"]
        if f["verdict"] != "pass"
    }
    return {"verdict": facts["verdict"], "points": points, "figures": facts["figures"]}


def part_trackers(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Test every backend against the synthetic speaker's truth, the default on all real clips."""
    import trackers

    from talkhead_cli.jobs import backends
    from talkhead_cli.store import Workspace, weights

    film = clip("no such clip", work)
    home = work / "trackers"
    table: dict[str, Any] = {}
    plain = {kind: names[-1] for kind, names in backends.BEST_FIRST.items()}
    better = [
        (kind, name)
        for listed in (backends.BEST_FIRST, backends.ON_REQUEST)
        for kind, names in listed.items()
        for name in names
        if kind != "voice" and name != plain[kind]
    ]
    for kind, name in [("", "default"), *better]:
        if kind and weights.find(name) is None:
            table[f"{kind}={name}"] = "not run: its weights are not on this machine"
            continue
        chosen = plain | ({kind: name} if kind else {})
        words = [word for k, n in chosen.items() for word in ("--backend", f"{k}={n}")]
        told = talkhead(
            "preprocess", str(film), "--id", name, "--home", str(home), "--fresh", *words
        )
        figures = trackers.against_truth(Workspace.open(home, name), film)
        table[f"{kind}={name}" if kind else name] = {"seconds": told["seconds"], **figures}
    clips = {}
    for source in sorted(p for f in ("clips", "clips/more") for p in (CLIPS / f).glob("*.mp4")):
        done = asked("preprocess", str(source), "--id", source.stem, "--home", str(home))
        clips[source.stem] = (
            done["notes"]
            if done["exit"]
            else trackers.against_itself(Workspace.open(home, source.stem))
        )
    return {"speaker": table, "clips": clips}
