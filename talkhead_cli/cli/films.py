"""Commands that use a finished run: render, landmarks, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from talkhead_cli.cli.console import compared, err, speaking
from talkhead_cli.cli.options import Device, Home, Id, Json, RunName, Seed, Verbose, say


def render(
    audio: Annotated[Path, typer.Option("--audio", help="Speech, in any format.")],
    name: Annotated[str | None, typer.Option("--id", help="Which identity.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Or a picture of a face, without training; repeat it for several."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option("-p", "--preset", help="Preset for the picture.  \\[default: s3d]"),
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="Prior for the picture.  \\[default: the newest that fits]")
    ] = None,
    face: Annotated[
        str | None,
        typer.Option(help="Of several faces in the picture: largest (default), left, right."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Video to write.  \\[default: ID-SPEECH.mp4]")
    ] = None,
    run: RunName = None,
    pose: Annotated[
        str, typer.Option(help="footage, still, auto, or a table of 6 columns (file).")
    ] = "footage",
    blink: Annotated[
        str, typer.Option(help="footage, auto, none, or a table of openness (file).")
    ] = "footage",
    background: Annotated[str, typer.Option(help="plate, #rrggbb, or a picture.")] = "plate",
    alpha: Annotated[
        bool, typer.Option("--alpha", help="Keep transparency (.webm or .mov).")
    ] = False,
    depth: Annotated[bool, typer.Option("--depth", help="Write a 16-bit depth video too.")] = False,
    landmarks: Annotated[
        Path | None, typer.Option(help="Track of landmarks to draw (.npz; see talkhead landmarks).")
    ] = None,
    yaw: Annotated[
        float,
        typer.Option(
            help="Move the camera around the head, degrees; positive: to the person's right."
        ),
    ] = 0.0,
    pitch: Annotated[
        float, typer.Option(help="Lift the camera above the head, degrees; negative: below it.")
    ] = 0.0,
    orbit: Annotated[
        bool, typer.Option("--orbit", help="Swing the camera 30 degrees to either side, in 8 s.")
    ] = False,
    into: Annotated[
        Path | None,
        typer.Option(help="Paste the face into this video, the one the identity was made from."),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Render the avatar speaking any audio: 25 frames/s, with the sound."""
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.render import RenderOptions, render_picture
        from talkhead_cli.jobs.render import render as job
        from talkhead_cli.store import home_folder

        options = RenderOptions(
            pose=pose, blink=blink, yaw_deg=yaw, pitch_deg=pitch, orbit=orbit, seed=seed,
            landmarks=landmarks, into=into, background=background, alpha=alpha, depth=depth,
        )  # fmt: skip
        if (name is None) == (not image):
            raise MisuseError("say who speaks: --id NAME or --image FILE, one of them")
        if image:
            if run is not None:
                raise MisuseError("--run goes with --id; a picture is drawn by --prior")
            if into is not None:
                raise MisuseError("--into goes with --id; a picture has no video to be set into")
            paths = render_picture(
                image,
                home_folder(home),
                audio,
                report,
                preset_names=preset or ["s3d"],
                prior=prior,
                which_face=face or "largest",
                out=out,
                options=options,
                device=device,
            )
        else:
            assert name is not None
            if preset or prior or face:
                raise MisuseError("--preset, --prior and --face go with --image; a run has its own")
            paths = job(
                home_folder(home),
                name,
                audio,
                report,
                out=out,
                run_name=run,
                options=options,
                device=device,
            )
        say(paths, {}, json)


def landmarks(
    name: Id,
    audio: Annotated[Path, typer.Option("--audio", help="Speech, in any format.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Track to write.  \\[default: ID-SPEECH.npz]")
    ] = None,
    run: RunName = None,
    lips: Annotated[float, typer.Option(help="How far lips go, times what speech says.")] = 1.0,
    jaw: Annotated[float, typer.Option(help="How far the jaw goes.")] = 1.0,
    blink: Annotated[
        str, typer.Option(help="footage, auto, none, or a table of openness (file).")
    ] = "footage",
    picture: Annotated[bool, typer.Option(help="Draw the track over the face (.png).")] = True,
    device: Device = "auto",
    seed: Seed = 0,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Predict landmarks from speech, to view, edit, and use with render --landmarks."""
    with speaking(verbose) as report:
        from talkhead_cli.jobs.drive import MotionOptions
        from talkhead_cli.jobs.landmarks import landmarks as job
        from talkhead_cli.store import home_folder

        paths = job(
            home_folder(home),
            name,
            audio,
            report,
            out=out,
            run_name=run,
            moves=MotionOptions(blink=blink, seed=seed),
            lips=lips,
            jaw=jaw,
            picture=picture,
            device=device,
        )
        say(paths, {}, json)


def evaluate(
    name: Id,
    run: RunName = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Runs, or the beginnings of their names, to put side by side, comma-separated."
        ),
    ] = None,
    maps: Annotated[
        bool, typer.Option("--maps", help="Draw depth and what the method does where (maps.png).")
    ] = False,
    device: Device = "auto",
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score a run on the held-out end of the clip, which it was not trained on."""
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.compare import compare as side_by_side
        from talkhead_cli.jobs.evaluate import evaluate as job
        from talkhead_cli.store import home_folder

        if compare is not None:
            if maps or run is not None:
                raise MisuseError("--compare goes neither with --run nor with --maps")
            wanted = [word.strip() for word in compare.split(",") if word.strip()]
            figures, paths = side_by_side(home_folder(home), name, wanted, report, device=device)
            if not json:
                err.print(compared(figures["table"]))
            say(paths, {"figures": figures}, json)
            return
        figures, paths = job(
            home_folder(home), name, report, run_name=run, device=device, maps=maps
        )
        if not json:
            _table(figures)
        say(paths, {"figures": figures}, json)


def _table(figures: dict[str, Any]) -> None:
    picture, lips, eyes = figures["picture"], figures["lips"], figures["eyes"]
    low, high = lips["correlation"]["interval_90"]
    jitter = figures["jitter_px_at_512"]["ratio"]
    rows = [
        ("PSNR, face box", f"{picture['face_box']['psnr_db']:.2f} dB"),
        ("PSNR, full", f"{picture['full']['psnr_db']:.2f} dB"),
        (
            "SSIM, face box / full",
            f"{picture['face_box']['ssim']:.3f} / {picture['full']['ssim']:.3f}",
        ),
        ("lips against truth", f"{lips['correlation']['r']:.2f}  [{low:.2f}, {high:.2f}]"),
        ("  linear baseline", f"{lips['linear_baseline']['r']:.2f}"),
        ("  other speech (control)", f"{lips['mismatched_control']['r']:.2f}"),
        ("  spread", f"{lips['correlation']['spread']:.2f}"),
        (
            "eyes against truth",
            f"{eyes['correlation']['r']:.2f}  ({eyes['blinks_in_truth']} blinks)",
        ),
        ("LMD, mouth", f"{figures['lmd_px_at_512']:.2f} px at 512"),
        *_sync_rows(figures["sync"]),
        ("jitter against truth's", "-" if jitter is None else f"{jitter:.2f}"),
        ("marching", f"{figures['render']['frames_per_second']:.1f} frames/s"),
    ]
    for label, value in rows:
        err.print(f"  {label:26}{value}")
    err.print(
        "  (lips, eyes: correlation with the truth, 1 is perfect, with its 90 % interval; the "
        "control should be near 0, spread and jitter near 1)",
        soft_wrap=True,
    )


def _sync_rows(sync: dict[str, Any]) -> list[tuple[str, str]]:
    if sync["expert"] is None:
        return []
    return [
        (
            f"lip sync ({name})",
            f"{judged['confidence']:.3f}, sound {1000 * judged['sound_after_lips_s']:+.0f} ms",
        )
        for name, judged in ((n, sync[n]) for n in ("render", "truth"))
    ]
