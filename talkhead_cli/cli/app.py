"""The commands: options, help, and one job call each. Nothing heavy is imported up here."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from talkhead_cli import __version__
from talkhead_cli.cli.console import answer, compared, err, speaking
from talkhead_cli.cli.memory import keep_freed_memory

app = typer.Typer(
    name="talkhead",
    help="From a person's video to a talking avatar, from any speech to a film of them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Home = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of the avatars.  [default: $TALKHEAD_HOME or ./avatars]"),
]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Show the traceback of an error, and native chatter."),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Id = Annotated[str, typer.Option("--id", help="Which identity.")]
Presets = Annotated[
    list[str] | None,
    typer.Option("-p", "--preset", help="Preset by name or file; repeat it, the later wins."),
]
Settings = Annotated[
    list[str] | None, typer.Option("-s", "--set", help="One preset key: key=value.")
]
RunName = Annotated[str | None, typer.Option("--run", help="Which run.  [default: the newest]")]


def _version(wanted: bool) -> None:
    if wanted:
        answer(f"talkhead {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    del version
    keep_freed_memory()


def _say(paths: list[Path], facts: dict[str, Any], json: bool) -> None:
    if json:
        answer(jsonlib.dumps({"paths": [str(p) for p in paths], **facts}))
        return
    for path in paths:
        answer(path)


@app.command()
def preprocess(
    videos: Annotated[
        list[Path], typer.Argument(help="Videos of one person talking each, or folders of them.")
    ],
    name: Annotated[
        str | None, typer.Option("--id", help="Name of the identity.  [default: the file's stem]")
    ] = None,
    face: Annotated[
        str, typer.Option(help="With several faces: largest, left or right.")
    ] = "largest",
    no_audio: Annotated[
        bool, typer.Option("--no-audio", help="Track a film without sound.")
    ] = False,
    voice: Annotated[
        str, typer.Option(help="Speech features: auto, mel, hubert or wav2vec2.")
    ] = "auto",
    offset: Annotated[
        str,
        typer.Option(help="Seconds the sound comes after the lips, to be undone: auto, none, or "
                     "a number (negative: before)."),
    ] = "auto",
    start: Annotated[
        float, typer.Option("--from", help="Second of the film from which on it counts.")
    ] = 0.0,
    end: Annotated[
        float | None, typer.Option("--to", help="Second up to which it counts.  [default: its end]")
    ] = None,
    consent: Annotated[
        Path | None, typer.Option(help="The person's consent; kept with the identity.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Videos at a time.  [default: by cores and memory]")
    ] = 0,
    fresh: Annotated[bool, typer.Option(help="Forget what was done and begin anew.")] = False,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Track the person in a video: landmarks, head pose, eyes, labels, plate, speech features."""
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.many import preprocess_many, videos_of
        from talkhead_cli.jobs.preprocess import preprocess as job
        from talkhead_cli.store import Workspace, home_folder

        options: dict[str, Any] = {
            "which_face": face, "with_audio": not no_audio, "speech_features": voice,
            "offset": offset, "consent": consent, "fresh": fresh,
        }  # fmt: skip
        where, found = home_folder(home), videos_of(videos)
        if len(found) == 1 and not videos[0].is_dir():
            space = job(
                found[0], where, report, name=name, start_s=start, end_s=end, **options
            )
            _say([space.root], {"manifest": space.manifest()}, json)
            return
        if name is not None or consent is not None or start or end is not None:
            raise MisuseError("--id, --consent, --from and --to are for one video, not for many")
        outcomes = preprocess_many(found, where, report, jobs=jobs, **options)
        made = [Workspace(where, o.id).root for o in outcomes if o.error is None]
        failed = len(outcomes) - len(made)
        _say(made, {"videos": [o.facts() for o in outcomes]}, json)
    if failed:
        err.print(f"{failed} of {len(outcomes)} videos were left out; the notes above say why")
        raise SystemExit(1)


@app.command()
def check(
    video: Annotated[Path, typer.Argument(help="A film of one person talking.")],
    page: Annotated[
        Path | None, typer.Option("--page", help="Also write a page of HTML with plots.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say whether a film is worth training on, point by point, and what to do about it."""
    with speaking(verbose) as report:
        from talkhead_cli.jobs.check import check as job
        from talkhead_cli.jobs.check import page as page_of
        from talkhead_cli.store.files import atomic

        found = job(video, report)
        if page is not None:
            with atomic(page) as part:
                part.write_text(page_of(found, video.name))
        if json:
            answer(jsonlib.dumps(found.facts()))
        else:
            for point in found.findings:
                cure = f"  -> {point.cure}" if point.cure else ""
                answer(f"{point.verdict:8}{point.name:14}{point.found}{cure}")
            answer(f"{found.verdict:8}all in all")
    if found.verdict == "fail":
        raise SystemExit(1)


@app.command()
def finetune(
    name: Id,
    preset: Presets = None,
    setting: Settings = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Name of the run.  [default: its presets]")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="Prior to begin from (pretrain).  [default: none; s3d: the newest]"),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="For s3d: steps that bend what the prior knows to the person."),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Replace the run of that name.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train one person's avatar.  An interrupted run goes on where it was saved last."""
    with speaking(verbose) as report:
        from talkhead_cli.jobs.finetune import finetune as job
        from talkhead_cli.jobs.finetune import refined
        from talkhead_cli.store import home_folder

        made = job(
            home_folder(home), name, report, names=preset or ["lokitalk"],
            settings=[*(setting or []), *refined(preset or [], refine)], run_name=run,
            prior=prior, device=device, seed=seed, fresh=fresh,
        )  # fmt: skip
        _say([made.root], {"meta": made.meta()}, json)


@app.command()
def pretrain(
    ids: Annotated[
        str | None, typer.Option(help="Identities, comma-separated.  [default: all of the home]")
    ] = None,
    ids_from: Annotated[
        Path | None, typer.Option("--ids-from", help="File with one identity per line.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="Name of the prior.  [default: prior, s3d or expert]"),
    ] = None,
    preset: Presets = None,
    expert: Annotated[
        bool, typer.Option("--expert", help="Learn whether lips go with a sound, for evaluate.")
    ] = False,
    setting: Settings = None,
    fresh: Annotated[bool, typer.Option(help="Replace the prior of that name.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Learn what many people share; new people begin from it (finetune --prior)."""
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.preset import load
        from talkhead_cli.jobs.pretrain import pretrain as job
        from talkhead_cli.store import home_folder

        names = ["expert", *(preset or [])] if expert else preset or ["lokitalk"]
        if expert and load(names).method != "expert":
            raise MisuseError("--expert is a preset of its own; only overlays go with it (-p tiny)")
        made = job(
            home_folder(home), _named(ids, ids_from, home_folder(home)), out, report,
            preset_names=names,
            settings=setting or [], device=device, seed=seed, fresh=fresh,
        )  # fmt: skip
        _say([made.root], {"meta": made.meta()}, json)


def _named(ids: str | None, file: Path | None, home: Path) -> list[str]:
    """Identities by --ids, else by --ids-from, else all of the home."""
    from talkhead_cli.contracts import MisuseError
    from talkhead_cli.store import list_ids

    if ids is not None and file is not None:
        raise MisuseError("give --ids or --ids-from, not both")
    if ids is not None:
        return [name.strip() for name in ids.split(",") if name.strip()]
    if file is None:
        return list_ids(home)
    try:
        return [
            line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"--ids-from {file} cannot be read: {error}") from error


@app.command()
def render(
    audio: Annotated[Path, typer.Option("--audio", help="Speech, in any format.")],
    name: Annotated[str | None, typer.Option("--id", help="Which identity.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Or a picture of a face, without training; repeat it for several."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option("-p", "--preset", help="How the picture is made to speak.  [default: s3d]"),
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="Prior for the picture.  [default: the newest that fits]")
    ] = None,
    face: Annotated[
        str | None,
        typer.Option(help="Of several faces in the picture: largest (default), left, right."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Film to write.  [default: ID-SPEECH.mp4]")
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
    depth: Annotated[bool, typer.Option("--depth", help="Write a 16-bit depth film too.")] = False,
    landmarks: Annotated[
        Path | None, typer.Option(help="Track of landmarks to draw (.npz; see talkhead landmarks).")
    ] = None,
    yaw: Annotated[float, typer.Option(help="Carry the camera round the head, degrees.")] = 0.0,
    pitch: Annotated[float, typer.Option(help="Lift the camera over the head, degrees.")] = 0.0,
    orbit: Annotated[
        bool, typer.Option("--orbit", help="Swing the camera 30 degrees to either side, in 8 s.")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Film the avatar saying any speech: the square crop, 25 frames/s, with the sound."""
    with speaking(verbose) as report:
        from talkhead_cli.contracts import MisuseError
        from talkhead_cli.jobs.render import Wishes, render_picture
        from talkhead_cli.jobs.render import render as job
        from talkhead_cli.store import home_folder

        wishes = Wishes(
            pose=pose, blink=blink, yaw_deg=yaw, pitch_deg=pitch, orbit=orbit, seed=seed,
            landmarks=landmarks, background=background, alpha=alpha, depth=depth,
        )  # fmt: skip
        if (name is None) == (not image):
            raise MisuseError("say who speaks: --id NAME or --image FILE, one of them")
        if image:
            if run is not None:
                raise MisuseError("--run goes with --id; a picture is drawn by --prior")
            paths = render_picture(
                image, home_folder(home), audio, report, preset_names=preset or ["s3d"],
                prior=prior, which_face=face or "largest", out=out, wishes=wishes, device=device,
            )  # fmt: skip
        else:
            assert name is not None
            if preset or prior or face:
                raise MisuseError("--preset, --prior and --face go with --image; a run has its own")
            paths = job(
                home_folder(home), name, audio, report, out=out, run_name=run, wishes=wishes,
                device=device,
            )  # fmt: skip
        _say(paths, {}, json)


@app.command()
def landmarks(
    name: Id,
    audio: Annotated[Path, typer.Option("--audio", help="Speech, in any format.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Track to write.  [default: ID-SPEECH.npz]")
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
    """Write what speech says of the landmarks, to look at, edit, and render --landmarks."""
    with speaking(verbose) as report:
        from talkhead_cli.jobs.landmarks import landmarks as job
        from talkhead_cli.jobs.script import Moves
        from talkhead_cli.store import home_folder

        paths = job(
            home_folder(home), name, audio, report, out=out, run_name=run,
            moves=Moves(blink=blink, seed=seed), lips=lips, jaw=jaw, picture=picture,
            device=device,
        )  # fmt: skip
        _say(paths, {}, json)


@app.command()
def evaluate(
    name: Id,
    run: RunName = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Runs or presets to put side by side, comma-separated."),
    ] = None,
    maps: Annotated[
        bool, typer.Option("--maps", help="Draw depth and what the method does where (maps.png).")
    ] = False,
    device: Device = "auto",
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score a run on the end of the clip, which it was not trained on."""
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
            _say(paths, {"figures": figures}, json)
            return
        figures, paths = job(
            home_folder(home), name, report, run_name=run, device=device, maps=maps
        )
        if not json:
            _table(figures)
        _say(paths, {"figures": figures}, json)


def _table(figures: dict[str, Any]) -> None:
    picture, lips, eyes = figures["picture"], figures["lips"], figures["eyes"]
    low, high = lips["correlation"]["interval_90"]
    rows = [
        ("PSNR, face box", f"{picture['face_box']['psnr_db']:.2f} dB"),
        ("PSNR, full", f"{picture['full']['psnr_db']:.2f} dB"),
        ("SSIM, face box / full",
         f"{picture['face_box']['ssim']:.3f} / {picture['full']['ssim']:.3f}"),
        ("lips against truth", f"{lips['correlation']['r']:.2f}  [{low:.2f}, {high:.2f}]"),
        ("  linear baseline", f"{lips['linear_baseline']['r']:.2f}"),
        ("  other speech (control)", f"{lips['mismatched_control']['r']:.2f}"),
        ("  spread", f"{lips['correlation']['spread']:.2f}"),
        ("eyes against truth",
         f"{eyes['correlation']['r']:.2f}  ({eyes['blinks_in_truth']} blinks)"),
        ("LMD, mouth", f"{figures['lmd_px_at_512']:.2f} px at 512"),
        *_sync_rows(figures["sync"]),
        ("jitter against truth's", f"{figures['jitter_px_at_512']['ratio']:.2f}"),
        ("marching", f"{figures['render']['frames_per_second']:.1f} frames/s"),
    ]  # fmt: skip
    for label, value in rows:
        err.print(f"  {label:26}{value}")


def _sync_rows(sync: dict[str, Any]) -> list[tuple[str, str]]:
    if sync["expert"] is None:
        return []
    return [
        (f"lip sync ({name})",
         f"{judged['confidence']:.3f}, sound {1000 * judged['sound_after_lips_s']:+.0f} ms")
        for name, judged in ((n, sync[n]) for n in ("render", "truth"))
    ]  # fmt: skip


@app.command("list")
def list_(home: Home = None, json: Json = False, verbose: Verbose = False) -> None:
    """List identities and their runs."""
    with speaking(verbose):
        from talkhead_cli.store import Workspace, home_folder, list_ids, list_runs

        folder = home_folder(home)
        for name in list_ids(folder):
            space = Workspace(folder, name)
            manifest = space.manifest()
            runs = [
                r.name + ("" if r.is_finished else " (unfinished)") for r in list_runs(space.runs)
            ]
            if json:
                answer(jsonlib.dumps({"id": name, "runs": runs}))
            else:
                seconds = manifest.get("n_frames", 0) / 25
                answer(f"{name}\t{seconds:.1f} s\t{', '.join(runs) or 'no runs'}")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Identity.")],
    home: Home = None,
    verbose: Verbose = False,
) -> None:
    """Say what is known of an identity, as JSON."""
    with speaking(verbose):
        from talkhead_cli.store import Workspace, home_folder, list_runs

        space = Workspace.open(home_folder(home), name)
        runs = {r.name: r.meta() for r in list_runs(space.runs)}
        answer(jsonlib.dumps({**space.manifest(), "runs": runs}, indent=2))


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Identity.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = None,
    verbose: Verbose = False,
) -> None:
    """Delete an identity with all its runs."""
    with speaking(verbose):
        from talkhead_cli.store import Workspace, home_folder, list_ids

        folder = home_folder(home)
        space = Workspace(folder, name)
        if name not in list_ids(folder):
            Workspace.open(folder, name)
        if not yes and not typer.confirm(f"Delete {space.root} and all its runs?", err=True):
            raise typer.Exit(1)
        space.remove()


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    verbose: Verbose = False,
) -> None:
    """List the presets, or print one."""
    with speaking(verbose):
        from talkhead_cli.jobs.preset import preset_names, preset_text

        if name is None:
            for known in preset_names():
                answer(known)
        else:
            answer(preset_text(name).rstrip())


models = typer.Typer(help="Weights of other people's networks.", no_args_is_help=True)
app.add_typer(models, name="models")


@models.command("list")
def models_list(verbose: Verbose = False) -> None:
    """List the known weights, whether they are here, and their licences."""
    with speaking(verbose):
        from talkhead_cli.store import weights

        for known in weights.KNOWN.values():
            place = weights.find(known.name) or "not here"
            answer(f"{known.name}\t{known.file}\t{known.licence}\t{known.what_for}\t{place}")


@models.command("verify")
def models_verify(verbose: Verbose = False) -> None:
    """Check the weights that are here against their sha256."""
    with speaking(verbose):
        from talkhead_cli.store import weights

        states = {name: weights.verify(name) for name in weights.KNOWN}
        for name, state in states.items():
            answer(f"{name}\t{state}")
        if "WRONG" in states.values():
            raise SystemExit(1)


@models.command("import")
def models_import(
    name: Annotated[str, typer.Argument(help="Which weights.")],
    file: Annotated[Path, typer.Argument(help="The file, as published.")],
    verbose: Verbose = False,
) -> None:
    """Bring weights that you fetched yourself; their sha256 is checked."""
    with speaking(verbose):
        from talkhead_cli.store import weights

        answer(weights.import_file(name, file))


@app.command()
def export(
    name: Id,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="ID.talkhead, or a folder; must not exist yet.")
    ],
    run: RunName = None,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write an avatar as one file (.talkhead; import reads it), or the footage as a dataset.

    The dataset folder has the layout of RAD-NeRF, ER-NeRF and SyncTalk.
    """
    with speaking(verbose) as report:
        from talkhead_cli.jobs.exchange import export_avatar, export_dataset
        from talkhead_cli.store import home_folder
        from talkhead_cli.store.parcel import SUFFIX

        if out.suffix == SUFFIX:
            _say([export_avatar(home_folder(home), name, out, report, run_name=run)], {}, json)
        else:
            _say([export_dataset(home_folder(home), name, out, report)], {}, json)


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="An avatar (.talkhead), or a dataset in RAD-NeRF's layout.")
    ],
    name: Annotated[
        str | None, typer.Option("--id", help="Name it is to have here.  [default: its own]")
    ] = None,
    home: Home = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Bring an avatar from another machine, or track the pictures and sound of a dataset."""
    with speaking(verbose) as report:
        from talkhead_cli.store import home_folder
        from talkhead_cli.store.parcel import unpack

        if file.is_dir():
            from talkhead_cli.jobs.dataset import import_dataset

            space = import_dataset(file, home_folder(home), report, name=name)
            _say([space.root], {"manifest": space.manifest()}, json)
            return
        _, run = unpack(file, home_folder(home), name)
        _say([run.root], {"meta": run.meta()}, json)


@app.command()
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the CUDA kernels now (minutes, once).")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Say what this machine has and lacks, one line each with its fix."""
    with speaking(verbose):
        from talkhead_cli.jobs import doctor as job

        if build:
            answer(job.build())
            return
        bad = False
        for need in job.needs():
            mark = "ok  " if need.ok else ("FAIL" if need.required else "none")
            bad |= need.required and not need.ok
            fix = f"  -> {need.fix}" if need.fix and not need.ok else ""
            answer(f"{mark}  {need.name}: {need.found}{fix}")
        if bad:
            raise SystemExit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
