"""What `make bench` and `make gpu` run: timings, on the clips beside the checkout.

    python benchmarks/bench.py                      all of it (an hour or more on two cores)
    python benchmarks/bench.py quality --ids alice  parts and clips by name
    python benchmarks/bench.py --device cuda        what a GPU is asked for

Most parts start the real command line in a process of its own and take its wall time and peak
memory from the operating system; `core` and `curve` look inside (core.py).  Each part writes
benchmarks/results/DATE-PART.json with the machine, versions, commit and command, and its plots
beside it.  Without the private clips the synthetic speaker is used, and the results say so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from charts import line_chart
from kit import CLIPS, RESULTS, ROOT, asked, clip, looped, machine, run, shown, speech, talkhead

PARTS = (
    "help", "preprocess", "quality", "render", "memory", "sound", "core", "curve", "transfer",
    "ears", "hearing", "coding", "views", "heads", "tokens", "strangers", "crowded", "deformations",
    "expert", "files", "photo", "trackers", "voices", "fields", "ablation", "seventh",
)  # fmt: skip
ON_CUDA = ("kernels", "core", "parity", "curve")  # a GPU machine need not be able to track faces
USUAL = {"cpu": ["lokitalk", "tiny"], "cuda": ["lokitalk"]}  # presets
SHARE = {"cuda": 0.1}  # of the steps, for parts that only look at what was trained
METHODS = ("lokitalk", "talk3d")  # that stand in space as a whole, for views
CURVE = {"cpu": (0.1, 0.25, 0.5), "cuda": (0.02, 0.06, 0.15)}  # shares of the steps


def part_photo(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """From a picture to its first frame, and to half a minute of film, by the newest s3d prior of
    the work folder's home (made of --ids where there is none); starting Python included."""
    home = work / "home"
    if not any((home / ".priors").glob("*/avatar.safetensors")):
        for name in options.ids:
            _preprocessed(name, work)
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
    """Every private clip and every hard file: what `preprocess` makes of it, and what `check` said
    beforehand."""
    folders = ("clips", "clips/more", "hard")
    rows = {}
    for film in sorted(p for f in folders for p in (CLIPS / f).iterdir() if p.is_file()):
        name = f"{film.parent.name}-{film.stem}".replace("_", "-")
        home = str(work / "files")
        looked = asked("check", str(film), "--json")
        done = asked("preprocess", str(film), "--id", name, "--home", home, "--fresh", "--json")
        row = {"check": _verdict(looked), "exit": done["exit"], "seconds": done["seconds"],
               "notes": done["notes"]}  # fmt: skip
        if done["exit"] == 0:
            manifest = json.loads(done["stdout"])["manifest"]
            kept = ("n_frames", "n_found", "n_cut_away", "faces_seen", "offset", "backends")
            row |= {k: manifest[k] for k in kept}
        rows[f"{film.parent.name}/{film.name}"] = row
    return {"files": len(rows), "tracked": sum(r["exit"] == 0 for r in rows.values()),
            "traceback": sum("Traceback" in " ".join(r["notes"]) for r in rows.values()),
            "rows": rows}  # fmt: skip


def part_trackers(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every backend against the synthetic speaker's truth, and the default on every real clip."""
    import trackers

    from talkhead_cli.jobs import backends
    from talkhead_cli.store import Workspace, weights

    film = clip("no such clip", work)
    home = work / "trackers"
    table: dict[str, Any] = {}
    plain = {kind: names[-1] for kind, names in backends.BEST_FIRST.items()}
    better = [(kind, name) for listed in (backends.BEST_FIRST, backends.ON_REQUEST)
              for kind, names in listed.items() for name in names
              if kind != "voice" and name != plain[kind]]  # fmt: skip
    for kind, name in [("", "default"), *better]:
        if kind and weights.find(name) is None:
            table[f"{kind}={name}"] = "not run: its weights are not on this machine"
            continue
        chosen = plain | ({kind: name} if kind else {})
        words = [word for k, n in chosen.items() for word in ("--backend", f"{k}={n}")]
        told = talkhead("preprocess", str(film), "--id", name, "--home", str(home), *words)
        figures = trackers.against_truth(Workspace.open(home, name), film)
        table[f"{kind}={name}" if kind else name] = {"seconds": told["seconds"], **figures}
    clips = {}
    for source in sorted(p for f in ("clips", "clips/more") for p in (CLIPS / f).glob("*.mp4")):
        done = asked("preprocess", str(source), "--id", source.stem, "--home", str(home))
        clips[source.stem] = (
            done["notes"] if done["exit"]
            else trackers.against_itself(Workspace.open(home, source.stem))
        )  # fmt: skip
    return {"speaker": table, "clips": clips}


def _verdict(looked: dict[str, Any]) -> dict[str, Any]:
    if not looked["stdout"]:
        return {"error": looked["notes"]}
    facts = json.loads(looked["stdout"])
    points = {f["name"]: f"{f['verdict']}: {f['found']}" for f in facts["findings"]
              if f["verdict"] != "pass"}  # fmt: skip
    return {"verdict": facts["verdict"], "points": points, "figures": facts["figures"]}


def part_help(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    seconds = [talkhead("--help")["seconds"] for _ in range(5)]
    return {"command": "talkhead --help", "seconds": seconds, "best_s": min(seconds)}


def part_preprocess(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    for name in options.ids:
        made = talkhead(
            "preprocess", str(clip(name, work)), "--id", name, "--home", str(work / "home"),
            "--fresh", "--json",
        )  # fmt: skip
        manifest = json.loads(made.pop("stdout"))["manifest"]
        rows[name] = made | {
            "frames": manifest["n_frames"],
            "frames_per_second": manifest["frames_per_second"],
            "size_px": manifest["size_px"],
        }
    return rows


def part_quality(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    home = ["--home", str(work / "home")]
    rows = {}
    for name in options.ids:
        _preprocessed(name, work)
        trained = talkhead(
            "finetune", "--id", name, *_words(options), "--fresh", *home,
            "--device", options.device, "--seed", str(options.seed),
        )  # fmt: skip
        scored = talkhead("evaluate", "--id", name, "--json", *home, "--device", options.device)
        figures = json.loads(scored.pop("stdout"))["figures"]
        trained.pop("stdout")
        rows[name] = {"finetune": trained, "evaluate": scored, "figures": figures}
    return rows


def part_render(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    name = options.ids[0]
    _trained(name, work, options)
    out = work / "film.mp4"
    made = talkhead(
        "render", "--id", name, "--audio", str(speech(work, 20)), "-o", str(out),
        "--home", str(work / "home"), "--device", options.device,
    )  # fmt: skip
    made.pop("stdout")
    sidecar = json.loads(out.with_name(out.name + ".json").read_text())
    keys = ("frames", "seconds_taken", "frames_per_second", "size_px")
    return made | {k: sidecar[k] for k in keys}


def part_memory(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory against length: of preprocess and of render, half a minute and ten minutes."""
    name = options.ids[0]
    _trained(name, work, options)
    home = ["--home", str(work / "home")]
    rows: dict[str, Any] = {"preprocess": {}, "render": {}}
    for seconds in (30, 600):
        film = looped(clip(name, work), seconds, work)
        made = talkhead("preprocess", str(film), "--id", f"long{seconds}", *home)
        made.pop("stdout")
        rows["preprocess"][f"{seconds}_s"] = made
        made = talkhead(
            "render", "--id", name, "--audio", str(speech(work, seconds)),
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
    """What a second of sound costs, end to end."""
    name = options.ids[0]
    _trained(name, work, options)
    rows = []
    for seconds in (5, 10, 20, 40):
        out = work / f"sound{seconds}.mp4"
        made = talkhead(
            "render", "--id", name, "--audio", str(speech(work, seconds)), "-o", str(out),
            "--home", str(work / "home"), "--device", options.device,
        )  # fmt: skip
        made.pop("stdout")
        rows.append({"seconds_of_sound": seconds, **made})
    lengths, walls = ([r[k] for r in rows] for k in ("seconds_of_sound", "seconds"))
    slope, start = np.polyfit(lengths, walls, 1)
    line_chart(
        options.chart("sound"), "seconds of sound", "wall seconds",
        {"render, end to end": (lengths, walls)},
    )  # fmt: skip
    return {"rows": rows, "start_s": round(start, 2), "per_second_of_sound_s": round(slope, 3)}


def part_core(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The marching core: against the reference, by size, points and batch, and its roofline."""
    import core

    name = options.ids[0]
    trained = _trained(name, work, options)
    bench = core.load(work / "home", name, options.device, trained)
    found = {
        "identity": name,
        "device": options.device,
        "size_px": bench.clip.size_px,
        "against_reference": core.against_reference(bench),
        "by_size": core.by_size(bench),
        "by_points": core.by_points(bench),
        "by_batch": core.by_batch(bench),
        "roofline": core.roofline(bench),
    }
    sizes = found["by_size"]
    line_chart(
        options.chart("core-pixels"), "million pixels", "milliseconds per frame",
        {"one frame": ([r["size_px"] ** 2 / 1e6 for r in sizes],
                       [1000 / r["frames_per_second"] for r in sizes])},
    )  # fmt: skip
    guided = bench.marcher
    line_chart(
        options.chart("core-points"), "thousand points per frame", "milliseconds per frame",
        {label: ([r["points_per_frame"] / 1e3 for r in rows], [r["milliseconds"] for r in rows])
         for label, rows in {
             "samples per ray vary": [
                 r for r in found["by_points"] if r["n_cells"] == guided.n_cells],
             "cells of the guide vary": [
                 r for r in found["by_points"] if r["n_samples"] == guided.n_samples],
         }.items()},
    )  # fmt: skip
    line_chart(
        options.chart("core-batch"), "frames in a march", "milliseconds per frame",
        {"frames together": ([r["frames_in_a_march"] for r in found["by_batch"]],
                             [1000 / r["frames_per_second"] for r in found["by_batch"]])},
    )  # fmt: skip
    return found


def part_parity(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One checkpoint on the CPU and on the GPU."""
    import core

    name = options.ids[0]
    trained = _trained(name, work, options)
    home = work / "home"
    every = 33  # a CPU takes seconds for each
    cpu, other = (core.load(home, name, d, trained, every) for d in ("cpu", options.device))
    return core.parity(cpu, other, work / f"parity-{name}.png")


def part_kernels(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How far kernels lie from their torch twins on this machine."""
    script = ROOT / "tests" / "kernel_twins.py"
    told = run(sys.executable, str(script), options.device)
    return {"seconds": told["seconds"], "apart": json.loads(told["stdout"])}


def part_rival(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Another method's figures, of the file --rival, beside our newest of the same machine."""
    theirs = json.loads(options.rival.read_text())
    ours: dict[str, Any] = {}
    for part in ("core", "curve"):
        found = sorted(RESULTS.glob(f"*-{part}-{options.device}.json"))
        if found:
            record = json.loads(found[-1].read_text())
            ours[part] = {"file": found[-1].name, "gpu": record["machine"]["gpu"], **record[part]}
    return {"theirs": theirs, "ours": ours}


def part_curve(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out PSNR against training time: whole trainings of several lengths."""
    import core

    name = options.ids[0]
    _preprocessed(name, work)
    rows = []
    for scale in CURVE[options.device]:
        trained, stages = core.train(
            work / "home", name, options.presets, options.device, scale, options.seed
        )
        bench = core.load(work / "home", name, options.device, trained.name, every=4)
        figures = bench.psnr(bench.pictures()[0])
        rows.append({
            "scale": scale, "seconds": trained.meta()["seconds"], "steps": trained.meta()["steps"],
            "held_out": figures, "stages": stages,
        })  # fmt: skip
    seconds = [r["seconds"] for r in rows]
    line_chart(
        options.chart("curve"), "seconds of training", "held-out PSNR, dB",
        {where: (seconds, [r["held_out"][f"{where}_db"] for r in rows])
         for where in ("face", "full")},
    )  # fmt: skip
    return {"identity": name, "presets": options.presets, "rows": rows}


def part_transfer(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Each of --ids from seconds of footage, from a prior of everybody else and from nothing."""
    import transfer

    others = [name for name in _others(work, options) if name not in options.ids]
    found = transfer.compare(
        work / "home", options.ids, others, work, seconds=options.seconds, scales=options.shares
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


def part_seventh(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the whole way costs: a prior of six people, and a seventh, the first of --ids, from
    it."""
    name, home = options.ids[0], ["--home", str(work / "home"), "--device", options.device]
    presets = [word for preset in options.presets for word in ("-p", preset)]
    six = [other for other in _others(work, options) if other not in options.ids][:6]
    made = talkhead("pretrain", *presets, "--ids", ",".join(six), "-o", "six", "--fresh", *home)
    trained = talkhead("finetune", "--id", name, *presets, "--prior", "six", "--fresh", *home)
    run_name = Path(trained["stdout"].split()[-1]).name
    scored = talkhead("evaluate", "--id", name, "--run", run_name, "--json", *home)
    figures = json.loads(scored.pop("stdout"))["figures"]
    for told in (made, trained):
        told.pop("stdout")
    minutes = round((made["seconds"] + trained["seconds"]) / 60, 2)
    return {"six": six, "seventh": name, "minutes": minutes, "pretrain": made,
            "finetune": trained, "evaluate": scored, "figures": figures}  # fmt: skip


def part_fields(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What two displacements and the attention loss are worth to --ids, at --scale of the steps."""
    import loki

    for name in options.ids:
        _preprocessed(name, work)
    return loki.fields(work / "home", options.ids, work, options.scale)


def part_ablation(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A prior of everybody else without one of its parts at a time, at --scale of the steps, and
    what it is worth to --ids after the first of --shares on the first of --seconds."""
    import loki

    others = [name for name in _others(work, options) if name not in options.ids]
    return loki.transfer(
        work / "home", options.ids, others, work, scale=options.scale,
        seconds=options.seconds[0], share=options.shares[0],
    )  # fmt: skip


def part_voices(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What other people's speech is worth, at the level of landmarks; --ids in groups of four."""
    import transfer

    groups = [options.ids[i : i + 4] for i in range(0, len(options.ids), 4)]
    everybody = _others(work, options)
    return transfer.heard(work / "home", groups, everybody, seconds=options.seconds)


def part_hearing(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Stage one of the landmark method: people held out in turn."""
    import landmarks

    everybody = _usable(work)
    others = [name for name in everybody if name not in options.ids]
    return landmarks.hearing(work / "home", options.ids, others, seeds=2)


def part_ears(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Mouths as heard by the speech embedding and by mel bands and formants."""
    import landmarks

    _usable(work)
    return landmarks.ears(work / "home", options.ids, options.seconds)


def part_coding(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Gaussian codes against plain landmarks."""
    import landmarks

    for name in options.ids:
        _preprocessed(name, work)
    return landmarks.coding(work / "home", options.ids, seeds=2, scale=options.scale)


def part_heads(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Talk3D of each of --ids from a generator of everybody else's heads and from nothing, at
    --scale of the steps; contact sheets stay in the work folder."""
    import talk3d

    others = [name for name in _others(work, options) if name not in options.ids]
    return talk3d.heads(work / "home", options.ids, others, options.scale, work / "views")


def part_views(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Each method from where nobody filmed; contact sheets stay in the work folder."""
    import talk3d

    runs = [f"{method}+tiny" for method in METHODS]
    for name in options.ids:
        _preprocessed(name, work)
        for method in METHODS:
            talkhead(
                "finetune", "--id", name, "-p", method, "-p", "tiny", "--prior", "none",
                "--home", str(work / "home"),
            )  # fmt: skip
    return talk3d.views(work / "home", options.ids, runs, work / "views")


def part_tokens(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What Talk3D's tokens, split convolutions and residual are worth."""
    import talk3d

    for name in options.ids:
        _preprocessed(name, work)
    return talk3d.tokens(work / "home", options.ids, options.scale)


def part_strangers(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S3D on people whom it never met, --ids in groups of two."""
    import s3d

    groups = [options.ids[i : i + 2] for i in range(0, len(options.ids), 2)]
    return s3d.strangers(work / "home", _others(work, options), groups)


def part_crowded(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S3D on --ids, whom it never met, with and without synthetic speakers in its prior."""
    import s3d

    everybody = _others(work, options)
    return s3d.crowded(work / "home", everybody, options.ids, work, scale=options.scale)


def part_deformations(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S3D with less and less of its deformation, on --ids, whom it never met."""
    import s3d

    everybody = _others(work, options)
    return s3d.deformations(work / "home", everybody, options.ids, scale=options.scale)


def part_expert(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The lip-sync expert on people whom it never met, --ids in groups of two."""
    import s3d

    groups = [options.ids[i : i + 2] for i in range(0, len(options.ids), 2)]
    return s3d.ears(work / "home", _others(work, options), groups)


def _others(work: Path, options: argparse.Namespace) -> list[str]:
    return [name for name in _usable(work) if name not in options.without]


def _usable(work: Path) -> list[str]:
    """Everybody of the private clips who can be tracked."""
    found = sorted(p.stem for f in ("clips", "clips/more") for p in (CLIPS / f).glob("*.mp4"))
    for name in list(found):
        try:
            _preprocessed(name, work)
        except SystemExit:  # too short, say
            found.remove(name)
    return found


def _preprocessed(name: str, work: Path) -> None:
    if not (work / "home" / name / "manifest.json").exists():
        talkhead("preprocess", str(clip(name, work)), "--id", name, "--home", str(work / "home"))


def _trained(name: str, work: Path, options: argparse.Namespace) -> str:
    """The run's name: a kept folder may hold newer ones."""
    _preprocessed(name, work)
    told = talkhead(
        "finetune", "--id", name, *_words(options), "--home", str(work / "home"),
        "--device", options.device, "--seed", str(options.seed),
        *(["-s", f"train.scale={SHARE[options.device]}"] if options.device in SHARE else []),
    )  # fmt: skip
    return Path(str(told["stdout"]).split()[-1]).name


def _words(options: argparse.Namespace) -> list[str]:
    """The presets as the command line wants them; from nothing, whatever priors lie about."""
    return [*(word for preset in options.presets for word in ("-p", preset)), "--prior", "none"]


def _listed(text: str) -> list[str]:
    return text.split(",")


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
    parser.add_argument("--ids", default="alice,carl", type=_listed)
    parser.add_argument(
        "--without", default="", type=_listed, help="people whom no prior may know, beside --ids"
    )
    parser.add_argument("--presets", type=_listed, help="default: lokitalk, on a CPU with tiny")
    parser.add_argument("--device", default="cpu", choices=list(USUAL))
    parser.add_argument("--seed", type=int, default=0)
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
        if options.presets[0] != "lokitalk":
            suffix = f"-{options.presets[0]}{suffix}"
        options.chart = lambda name: RESULTS / f"{today}-{name}{suffix}.png"
        for part in options.parts or (PARTS if options.device == "cpu" else ON_CUDA):
            found = globals()[f"part_{part}"](work, options)
            path = RESULTS / f"{today}-{part}{suffix}.json"
            command = shown(["python", "benchmarks/bench.py", *sys.argv[1:]])
            record = {"date": today, "command": command, "machine": machine(), part: found}
            path.write_text(json.dumps(record, indent=2) + "\n")
            sys.stdout.write(f"{path}\n")
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
