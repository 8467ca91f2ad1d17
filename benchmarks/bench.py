"""Benchmarks run by `make bench` and `make gpu`, on the clips beside the checkout.

    python benchmarks/bench.py                      all of it (hours on two cores)
    python benchmarks/bench.py quality --ids alice  parts and clips by name
    python benchmarks/bench.py --device cuda        the parts that a GPU machine runs

Parts that time whole commands are in costs.py; parts that measure inside the process are here,
with a file per subject.  Each part writes benchmarks/results/DATE-PART.json with the machine,
versions, commit and command, and its plots beside it; long parts write as they go, marked as
unfinished until done.  Without the private clips the synthetic speaker is used, as results record.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import costs
from charts import line_chart
from kit import (
    RESULTS,
    ROOT,
    machine,
    people_of,
    preprocessed,
    run,
    shown,
    talkhead,
    trained_run,
    usable,
)

PARTS = (
    "help", "preprocess", "quality", "render", "memory", "sound", "core", "curve", "transfer",
    "ears", "hearing", "coding", "views", "heads", "tokens", "strangers", "crowded", "deformations",
    "expert", "files", "photo", "trackers", "voices", "fields", "ablation", "seventh",
)  # fmt: skip
ON_CUDA = ("kernels", "core", "parity", "curve")  # a GPU machine need not track faces
USUAL = {"cpu": ["lokitalk", "tiny"], "cuda": ["lokitalk"]}  # default presets
USUAL_IDS = ["alice", "carl"]
METHODS = ("lokitalk", "talk3d")  # that model the whole person in 3D, for views
CURVE = {"cpu": (0.1, 0.25, 0.5), "cuda": (0.02, 0.06, 0.2)}  # shares of the training steps


def part_core(work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the marcher: by size and batch, against the reference, by points; roofline."""
    import core

    name = options.ids[0]
    trained = trained_run(name, work, options)
    began = time.perf_counter()
    bench = core.load(work / "home", name, options.device, trained)
    took = {"load": round(time.perf_counter() - began, 1)}
    found: dict[str, Any] = {
        "identity": name,
        "device": options.device,
        "size_px": bench.clip.size_px,
        "seconds": took,
    }
    for look in (
        core.by_size,
        core.by_batch,
        core.against_reference,
        core.by_points,
        core.roofline,
    ):
        began = time.perf_counter()
        found[look.__name__] = look(bench)
        took[look.__name__] = round(time.perf_counter() - began, 1)
        yield found
    sizes = found["by_size"]
    line_chart(
        options.chart("core-pixels"),
        "million pixels",
        "milliseconds per frame",
        {
            "one frame": (
                [r["size_px"] ** 2 / 1e6 for r in sizes],
                [1000 / r["frames_per_second"] for r in sizes],
            )
        },
    )
    guided = bench.marcher
    line_chart(
        options.chart("core-points"),
        "thousand points per frame",
        "milliseconds per frame",
        {
            label: ([r["points_per_frame"] / 1e3 for r in rows], [r["milliseconds"] for r in rows])
            for label, rows in {
                "samples per ray vary": [
                    r for r in found["by_points"] if r["n_cells"] == guided.n_cells
                ],
                "cells of the guide vary": [
                    r for r in found["by_points"] if r["n_samples"] == guided.n_samples
                ],
            }.items()
        },
    )
    line_chart(
        options.chart("core-batch"),
        "frames in a march",
        "milliseconds per frame",
        {
            "frames together": (
                [r["frames_in_a_march"] for r in found["by_batch"]],
                [1000 / r["frames_per_second"] for r in found["by_batch"]],
            )
        },
    )


def part_parity(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the renders of one checkpoint on the CPU and on the GPU."""
    import core

    name = options.ids[0]
    trained = trained_run(name, work, options)
    home = work / "home"
    every = 33  # a CPU takes seconds per frame
    cpu, other = (core.load(home, name, d, trained, every) for d in ("cpu", options.device))
    return core.parity(cpu, other, work / f"parity-{name}.png")


def part_kernels(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure how far kernels differ from their torch versions on this machine."""
    script = ROOT / "tests" / "kernel_twins.py"
    told = run(sys.executable, str(script), options.device)
    return {"seconds": told["seconds"], "apart": json.loads(told["stdout"])}


def part_rival(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Put another method's figures (file --rival) beside our newest ones on this kind of device."""
    theirs = json.loads(options.rival.read_text())
    ours: dict[str, Any] = {}
    for part in ("core", "curve"):
        for file in sorted(RESULTS.glob(f"*-{part}-{options.device}.json")):
            record = json.loads(file.read_text())
            if not record.get("unfinished"):
                ours[part] = {"file": file.name, "gpu": record["machine"]["gpu"], **record[part]}
    return {"theirs": theirs, "ours": ours}


def part_curve(work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure held-out PSNR against training time: complete trainings of several lengths."""
    import core

    name = options.ids[0]
    preprocessed(name, work)
    rows = []
    if options.device == "cuda":  # warm-up: compiles the kernels
        core.train(work / "home", name, options.presets, options.device, 1e-3, options.seed)
    for scale in CURVE[options.device]:
        trained, stages = core.train(
            work / "home", name, options.presets, options.device, scale, options.seed
        )
        bench = core.load(work / "home", name, options.device, trained.name, every=4)
        figures = bench.psnr(bench.pictures()[0])
        rows.append(
            {
                "scale": scale,
                "seconds": trained.meta()["seconds"],
                "steps": trained.meta()["steps"],
                "held_out": figures,
                "stages": stages,
            }
        )
        yield {"identity": name, "presets": options.presets, "rows": rows}
    seconds = [r["seconds"] for r in rows]
    line_chart(
        options.chart("curve"),
        "seconds of training",
        "held-out PSNR, dB",
        {
            where: (seconds, [r["held_out"][f"{where}_db"] for r in rows])
            for where in ("face", "full")
        },
    )


def part_transfer(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train each of --ids on seconds of footage, from a prior of the others and from scratch."""
    import transfer

    others = [name for name in people_of(work, options) if name not in options.ids]
    found = transfer.compare(
        work / "home",
        options.ids,
        others,
        work,
        seconds=options.seconds,
        scales=options.shares,
        seeds=options.seeds,
    )
    for figure in ("psnr_face_db", "lips_r", "eyes_r"):
        lines = {}
        for length in options.seconds:
            for start in transfer.STARTS[:2]:
                own = [m for m in found["mean"] if (m["train_s"], m["start"]) == (length, start)]
                shares = [100 * m["scale"] for m in own]
                lines[f"{start}, {length:g} s"] = shares, [m[figure] for m in own]
        up = "PSNR of the face, dB" if figure.startswith("psnr") else figure
        line_chart(options.chart(f"transfer-{figure}"), "% of the steps", up, lines)
    return found


def part_fields(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ablate LokiTalk's displacements and attention loss on --ids, at --scale of the steps."""
    import loki

    for name in options.ids:
        preprocessed(name, work)
    return loki.fields(work / "home", options.ids, work, options.scale)


def part_ablation(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ablate a prior of everybody else part by part, at --scale of the steps, and fine-tune --ids
    for the first of --shares of the steps on the first of --seconds."""
    import loki

    others = [name for name in people_of(work, options) if name not in options.ids]
    return loki.transfer(
        work / "home",
        options.ids,
        others,
        work,
        scale=options.scale,
        seconds=options.seconds[0],
        share=options.shares[0],
    )


def part_voices(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the gain from other people's speech, on landmarks; --ids in groups of four."""
    import transfer

    groups = [options.ids[i : i + 4] for i in range(0, len(options.ids), 4)]
    everybody = people_of(work, options)
    return transfer.heard(work / "home", groups, everybody, seconds=options.seconds)


def part_hearing(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate stage one (speech) of the landmark method, holding people out in turn."""
    import landmarks

    everybody = usable(work)
    others = [name for name in everybody if name not in options.ids]
    return landmarks.hearing(work / "home", options.ids, others, seeds=2)


def part_ears(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare mouths predicted from the speech embedding and from mel bands and formants."""
    import landmarks

    usable(work)
    return landmarks.ears(work / "home", options.ids, options.seconds)


def part_coding(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare Gaussian codes with plain landmarks."""
    import landmarks

    for name in options.ids:
        preprocessed(name, work)
    return landmarks.coding(work / "home", options.ids, seeds=2, scale=options.scale)


def part_heads(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train Talk3D of each of --ids from a generator of everybody else's heads and from scratch, at
    --scale of the steps; contact sheets stay in the work folder."""
    import talk3d

    others = [name for name in people_of(work, options) if name not in options.ids]
    return talk3d.heads(work / "home", options.ids, others, options.scale, work / "views")


def part_views(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Render each of METHODS from novel views; contact sheets stay in the work folder."""
    import talk3d

    runs = [f"{method}+tiny" for method in METHODS]
    for name in options.ids:
        preprocessed(name, work)
        for method in METHODS:
            talkhead(
                "finetune", "--id", name, "-p", method, "-p", "tiny", "--prior", "none",
                "--home", str(work / "home"),
            )  # fmt: skip
    return talk3d.views(work / "home", options.ids, runs, work / "views")


def part_tokens(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ablate Talk3D's tokens, split convolutions and residual."""
    import talk3d

    for name in options.ids:
        preprocessed(name, work)
    return talk3d.tokens(work / "home", options.ids, options.scale)


def part_strangers(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate S3D on people outside its training set, --ids in groups of two."""
    import s3d

    groups = [options.ids[i : i + 2] for i in range(0, len(options.ids), 2)]
    preset_names = options.presets if options.presets[0] == "s3d" else s3d.PRESETS
    return s3d.strangers(work / "home", people_of(work, options), groups, preset_names)


def part_crowded(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate S3D on unseen --ids, with and without synthetic speakers in its prior."""
    import s3d

    everybody = people_of(work, options)
    return s3d.crowded(work / "home", everybody, options.ids, work, scale=options.scale)


def part_deformations(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate S3D on unseen --ids, with less and less of its deformation."""
    import s3d

    everybody = people_of(work, options)
    return s3d.deformations(work / "home", everybody, options.ids, scale=options.scale)


def part_expert(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the lip-sync expert on unseen people, --ids in groups of two."""
    import s3d

    groups = [options.ids[i : i + 2] for i in range(0, len(options.ids), 2)]
    return s3d.ears(work / "home", people_of(work, options), groups)


def _listed(text: str) -> list[str]:
    return text.split(",")


def _measure(
    part: str, path: Path, record: dict[str, Any], work: Path, options: argparse.Namespace
) -> None:
    """Measure a part and write its results; parts that yield also write intermediate ones."""
    unfinished = path.with_suffix(".unfinished.json")
    made = {**vars(costs), **globals()}[f"part_{part}"](work, options)
    if isinstance(made, Iterator):
        for found in made:
            _write(unfinished, record | {"unfinished": True, part: found})
        made = found
    _write(path, record | {part: made})
    unfinished.unlink(missing_ok=True)


def _write(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=2) + "\n")
    beside.replace(path)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[*PARTS, "kernels", "parity", "rival", []],
        help="parts to run; default all",
    )
    parser.add_argument("--ids", default=",".join(USUAL_IDS), type=_listed)
    parser.add_argument(
        "--without", default="", type=_listed, help="people whom no prior may know, beside --ids"
    )
    parser.add_argument("--presets", type=_listed, help="default: lokitalk, on a CPU with tiny")
    parser.add_argument("--device", default="cpu", choices=list(USUAL))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many, in transfer")
    parser.add_argument(
        "--seconds", default="5,16", type=_numbers, help="of footage to learn from in transfer"
    )
    parser.add_argument(
        "--shares", default="0.1,0.25,1", type=_numbers, help="of the steps in transfer"
    )
    parser.add_argument(
        "--scale", type=float, default=0.3, help="of the steps in coding, heads and tokens"
    )
    parser.add_argument("--work", type=Path, help="folder to work in, kept  [default: temporary]")
    parser.add_argument("--rival", type=Path, help="another method's figures, a JSON file")
    options = parser.parse_args()
    options.presets = options.presets or USUAL[options.device]
    work = options.work or Path(tempfile.mkdtemp(prefix="talkhead-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    try:
        today = datetime.date.today().isoformat()
        suffix = "" if options.device == "cpu" else f"-{options.device}"
        unusual = [Path(name).stem for name in options.presets if name not in ("lokitalk", "tiny")]
        suffix = "".join(f"-{name}" for name in unusual) + suffix
        # tables show the usual people and seed, which others must not replace
        few = "-".join(options.ids) if len(options.ids) <= 4 else f"{len(options.ids)}-people"
        suffix += "" if options.ids == USUAL_IDS else f"-{few}"
        suffix += f"-seed{options.seed}" if options.seed else ""
        options.chart = lambda name: RESULTS / f"{today}-{name}{suffix}.png"
        command = shown(["python", "benchmarks/bench.py", *sys.argv[1:]])
        record = {"date": today, "command": command, "machine": machine()}  # as it was at the start
        failed = []
        for part in options.parts or (PARTS if options.device == "cpu" else ON_CUDA):
            path = RESULTS / f"{today}-{part}{suffix}.json"
            try:
                _measure(part, path, record, work, options)
            except (SystemExit, Exception) as error:  # the other parts are measured anyway
                sys.stderr.write(f"{part}: {error}\n")
                failed.append(part)
            else:
                sys.stdout.write(f"{path}\n")
        if failed:
            raise SystemExit(f"not measured: {', '.join(failed)}")
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
