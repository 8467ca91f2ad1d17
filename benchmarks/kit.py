"""Shared tools of the benchmarks: running commands, clips, people, speech, facts of the machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
CLIPS = ROOT.parent / "shared"
SHARE = {"cuda": 0.06}  # of the training steps, for parts that need any trained run
PACKAGES = ("torch", "mediapipe", "lightning-fabric", "nerfacc", "numpy")


def run(*words: str) -> dict[str, Any]:
    """Run a command; return seconds, peak memory of its process in MB, and stdout."""
    began, peak_kb = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, text=True)
        while process.poll() is None:
            peak_kb = max(peak_kb, _peak_kb(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        for file in (out, err):
            file.seek(0)
        text, errors = out.read(), err.read()
    if process.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{errors}")
    return {
        "command": shown(["talkhead", *words[3:]]),
        "seconds": round(seconds, 2),
        "peak_mb": round(peak_kb / 1024),
        "stdout": text,
    }


def _peak_kb(number: int) -> int:
    """Return a process's peak memory so far; wait()'s figure would include its parent's."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{number}/status").read_text()
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def shown(words: Sequence[str]) -> str:
    """Return a command line without the machine's folder names."""
    return shlex.join([Path(w).name if Path(w).is_absolute() else w for w in words])


def talkhead(*words: str) -> dict[str, Any]:
    return run(sys.executable, "-m", "talkhead_cli.cli.app", *words)


def clip(name: str, work: Path) -> Path:
    """Return a private clip, or the synthetic speaker in its place."""
    for folder in ("clips", "clips/more"):
        found = CLIPS / folder / f"{name}.mp4"
        if found.exists():
            return found
    made = work / "speaker.mp4"
    if not made.exists():
        script = ROOT / "examples" / "synthetic_speaker.py"
        subprocess.run([sys.executable, str(script), str(made), "--seconds", "24"], check=True)
    return made


def looped(film: Path, seconds: int, work: Path) -> Path:
    """Return a film of a given length: a clip, looped."""
    from talkhead_cli.media import ffmpeg

    out = work / f"{film.stem}{seconds}.mp4"
    words = ["-loglevel", "error", "-y", "-stream_loop", "-1", "-i", str(film), "-t", str(seconds)]
    subprocess.run([ffmpeg.executable(), *words, "-c", "copy", str(out)], check=True)
    return out


def speech(work: Path, seconds: int) -> Path:
    """Return speech of a given length: a recording, repeated."""
    from talkhead_cli import media

    source = CLIPS / "speech" / "eng60.wav"
    samples = media.sound(source if source.exists() else clip("alice", work))
    need = seconds * 16_000
    reps = -(-need // len(samples))
    path = work / f"speech{seconds}.wav"
    media.write_wav(path, np.tile(samples, reps)[:need])
    return path


def asked(*words: str) -> dict[str, Any]:
    """Run a command that may fail; return exit code, seconds, stdout and its notes."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "talkhead_cli.cli.app", *words], capture_output=True, text=True
    )
    said = [
        line.replace(f"{CLIPS}/", "")
        for line in done.stderr.splitlines()
        if line.startswith(("note:", "error:", "Traceback"))
    ]
    return {
        "exit": done.returncode,
        "seconds": round(time.perf_counter() - began, 1),
        "stdout": done.stdout,
        "notes": said,
    }


def machine() -> dict[str, Any]:
    """Return the machine, versions and commit of a measurement."""
    model = ""
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        names = [r for r in cpu.read_text().splitlines() if r.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else ""
    import torch

    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in PACKAGES},
        "commit": _commit(),
        "private_clips": CLIPS.is_dir(),
    }


def _version(package: str) -> str | None:
    """Return a package's version, None if not installed: a GPU machine need not track faces."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit, None outside a checkout or without git."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    return None


def people_of(work: Path, options: argparse.Namespace) -> list[str]:
    """Return the usable people who are not in --without."""
    return [name for name in usable(work) if name not in options.without]


def usable(work: Path) -> list[str]:
    """Return the people of the private clips that can be preprocessed."""
    found = sorted(p.stem for f in ("clips", "clips/more") for p in (CLIPS / f).glob("*.mp4"))
    for name in list(found):
        try:
            preprocessed(name, work)
        except SystemExit:  # for example, too short
            found.remove(name)
    return found


def preprocessed(name: str, work: Path) -> None:
    manifest = work / "home" / name / "manifest.json"
    if not manifest.exists() or not json.loads(manifest.read_text()).get("finished"):
        talkhead("preprocess", str(clip(name, work)), "--id", name, "--home", str(work / "home"))


def trained_run(name: str, work: Path, options: argparse.Namespace) -> str:
    """Fine-tune a run and return its name, as a kept folder may hold newer runs."""
    preprocessed(name, work)
    told = talkhead(
        "finetune",
        "--id",
        name,
        *presets_as_words(options),
        "--home",
        str(work / "home"),
        "--device",
        options.device,
        "--seed",
        str(options.seed),
        *(["-s", f"train.scale={SHARE[options.device]}"] if options.device in SHARE else []),
    )
    return Path(str(told["stdout"]).split()[-1]).name


def presets_as_words(options: argparse.Namespace) -> list[str]:
    """Return the presets as command-line words, without a prior even where there is one."""
    return [*(word for preset in options.presets for word in ("-p", preset)), "--prior", "none"]
