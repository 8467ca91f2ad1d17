"""EG3D's generator: its file is read as tensors alone, and draws what its paper says."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hearing
from safetensors.torch import load_file
from scipy import ndimage, signal
from torch import Tensor, nn
from typer.testing import CliRunner

from talkhead_cli.avatars.talk3d import Talk3D
from talkhead_cli.blocks import eg3d
from talkhead_cli.blocks.mlp import density_of
from talkhead_cli.blocks.planes import RowPlanes, warped
from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import footage, views
from talkhead_cli.jobs import generators as job
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.player import Player
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.store import Workspace, pickles, weights

LAYOUT = eg3d.layout()


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors as a published file names them, of the sizes that they have before training."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in LAYOUT.items():
        found[name] = torch.randn(shape, generator=rng)
        if name.endswith("affine.bias"):
            found[name] += 1
        if name.endswith(("noise_strength", "w_avg", "bias")) and "affine" not in name:
            found[name] *= 0.1
        if name.endswith("resample_filter"):
            line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
            found[name] = line[:, None] * line
    found["superresolution.block0.conv0.weight"] = torch.randn(2, 2, 3, 3, generator=rng)
    return found


@pytest.fixture
def persistent(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Modules of the names that published pickles ask for, which write themselves as theirs do: a
    function that would run their source, and their state."""

    def run_it(meta: dict[str, Any]) -> None:
        raise AssertionError("the source in the file was run")

    package, persistence = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.p")
    run_it.__module__ = "torch_utils.persistence"
    run_it.__name__ = run_it.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = run_it  # type: ignore[attr-defined]
    package.persistence = persistence  # type: ignore[attr-defined]
    util = types.ModuleType("dnnlib.util")
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    util.EasyDict = easy  # type: ignore[attr-defined]
    for name, module in {
        "torch_utils": package,
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)

    class Persistent(nn.Module):
        def __reduce__(self) -> Any:
            meta = easy(
                type="class",
                version=6,
                module_src="import os; os.abort()",
                class_name="TriPlaneGenerator",
                state=dict(vars(self)),
            )
            return run_it, (meta,)

    return types.SimpleNamespace(module=Persistent, easy=easy)


def as_modules(state: dict[str, Tensor], persistent: types.SimpleNamespace) -> nn.Module:
    """The tensors in a tree of modules; `decoder.net` is torch's own, with its Softplus."""
    root = persistent.module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        at = root
        for index, step in enumerate(path):
            if step not in at._modules:
                inner: nn.Module = persistent.module()
                if path[: index + 1] == ["decoder", "net"]:
                    inner = nn.Sequential(persistent.module(), nn.Softplus(), persistent.module())
                at.add_module(step, inner)
            at = at._modules[step]
        if last in ("weight", "bias", "const", "noise_strength"):
            at.register_parameter(last, nn.Parameter(tensor))
        else:
            at.register_buffer(last, tensor)
    return root


@pytest.fixture
def published(persistent: types.SimpleNamespace, tmp_path: Path) -> Path:
    path = tmp_path / "ffhq-fixed-triplane512-128.pkl"
    held = {
        "G": None,
        "D": None,
        "G_ema": as_modules(random_state(), persistent),
        "training_set_kwargs": persistent.easy(path="x.zip", max_size=10),
        "augment_pipe": None,
    }
    with path.open("wb") as file:
        pickle.dump(held, file)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TALKHEAD_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


# -- the file -------------------------------------------------------------------------------------


def test_a_published_file_is_taken_in_once_as_tensors_alone(published: Path, cache: Path) -> None:
    done = CliRunner().invoke(app, ["models", "import", "eg3d-fixed", str(published)])
    assert done.exit_code == 0, done.output
    kept = load_file(cache / "ffhq-fixed-triplane512-128.safetensors")
    state = random_state()
    assert kept.keys() == LAYOUT.keys(), "the upscaler stays out"
    for name, tensor in kept.items():
        assert torch.equal(tensor, state[name]), name
    assert weights.verify("eg3d-fixed") == "unchanged" and weights.verify("eg3d") == "missing"
    (cache / "ffhq-fixed-triplane512-128.safetensors").write_bytes(b"torn")
    assert weights.verify("eg3d-fixed") == "WRONG"
    with pytest.raises(TalkheadError, match="sha256"):
        weights.load("eg3d-fixed")


class Harmful:
    def __init__(self, called: Any, *args: Any) -> None:
        self.does = called, args

    def __reduce__(self) -> Any:
        return self.does


@pytest.mark.parametrize(
    "harm",
    [
        lambda mark: Harmful(os.system, f"touch {mark}"),
        lambda mark: Harmful(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Harmful(getattr, "x", "upper"),
        lambda mark: Harmful(torch.load, str(mark)),
        lambda mark: Harmful(torch.hub.load, "a/b", "c"),
        lambda mark: Harmful(nn.Module.__getattr__, nn.Linear(1, 1), "weight"),
    ],
)
def test_a_file_that_would_run_something_is_refused_by_name(
    harm: Any, persistent: types.SimpleNamespace, tmp_path: Path, cache: Path
) -> None:
    mark, path = tmp_path / "harm", tmp_path / "bad.pkl"
    root = as_modules({"backbone.mapping.w_avg": torch.zeros(4)}, persistent)
    for place in ("beside", "inside"):
        held: dict[str, Any] = {"G_ema": root}
        if place == "beside":
            held["x"] = harm(mark)
        else:
            root._buffers["more"] = harm(mark)
        path.write_bytes(pickle.dumps(held))
        with pytest.raises(TalkheadError, match=r"names .*, which is no part"):
            job.import_generator("eg3d", path)
        assert not mark.exists() and not cache.exists()


def test_a_tensor_never_reaches_beyond_its_storage(tmp_path: Path) -> None:
    from torch._utils import _rebuild_tensor_v2

    class Wide:
        def __reduce__(self) -> Any:
            data = torch.zeros(4).storage()
            return _rebuild_tensor_v2, (data, 0, (1000,), (1,), False, None)

    path = tmp_path / "wide.pkl"
    path.write_bytes(pickle.dumps({"G_ema": nn.Module(), "x": Wide()}))
    with pytest.raises(TalkheadError, match="cannot be read"):
        pickles.networks(path)


@pytest.mark.parametrize("text", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({})])
def test_what_is_no_network_is_refused_in_a_sentence(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(text)
    with pytest.raises(TalkheadError, match="cannot be read|holds no networks"):
        job.import_generator("eg3d", path)
    with pytest.raises(TalkheadError, match="there is no file"):
        job.import_generator("eg3d", tmp_path / "nowhere.pkl")


@pytest.mark.parametrize(
    "name, wrong, said",
    [
        ("backbone.synthesis.b64.conv0.weight", torch.zeros(512, 256, 3, 3), "b64.conv0.weight"),
        ("decoder.net.2.bias", None, "decoder.net.2.bias is None"),
        ("backbone.synthesis.b512.const", torch.zeros(3), r"b512.const is \(3,\), not None"),
    ],
)
def test_another_layout_is_refused_by_name(name: str, wrong: Tensor | None, said: str) -> None:
    state = random_state()
    state.pop(name, None)
    if wrong is not None:
        state[name] = wrong
    with pytest.raises(ValueError, match=said):
        eg3d.checked(state)


def test_missing_weights_say_how_to_bring_them(cache: Path) -> None:
    with pytest.raises(TalkheadError, match="non-commercial.*models import eg3d-fixed"):
        weights.load("eg3d-fixed")
    with pytest.raises(MisuseError, match="models import eg3d "):
        weights.pull("eg3d", SilentProgress())


# -- what it draws --------------------------------------------------------------------------------


def reference(state: dict[str, Tensor], styles: np.ndarray) -> Iterator[np.ndarray]:
    """The maps of the synthesis network in float64, by scipy, layer after layer and at each size
    the planes so far: StyleGAN2 as its paper's figure 2 and appendix B have it."""
    held = {k.removeprefix("backbone.synthesis."): v.double().numpy() for k, v in state.items()}
    blur = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64

    def spread_out(x: np.ndarray) -> np.ndarray:
        wide = np.zeros((len(x), 2 * x.shape[1], 2 * x.shape[2]))
        wide[:, ::2, ::2] = x
        return wide

    def scale(name: str, style: np.ndarray) -> np.ndarray:
        affine = held[f"{name}.affine.weight"] / np.sqrt(512)
        return affine @ style + held[f"{name}.affine.bias"]

    def convolved(name: str, x: np.ndarray, style: np.ndarray, up: bool, some: list[int]) -> Any:
        """Output channels `some` of a layer."""
        weight = held[f"{name}.weight"][some] * scale(name, style)[:, None, None]
        weight = weight / np.sqrt((weight**2).sum((1, 2, 3), keepdims=True) + 1e-8)
        found = []
        for kernel in weight:
            if up:  # a convolution of what is spread out, then smoothed
                wide = spread_out(x)
                full = sum(signal.convolve2d(w, k) for w, k in zip(wide, kernel, strict=True))
                # the transposed convolution ends where the last pixel's reach does
                full = full[:-1, :-1]
                found.append(4 * signal.convolve2d(np.pad(full, 1), blur, mode="valid"))
            else:
                found.append(
                    sum(
                        ndimage.correlate(w, k, mode="constant")
                        for w, k in zip(x, kernel, strict=True)
                    )
                )
        y = np.stack(found) + held[f"{name}.noise_const"] * held[f"{name}.noise_strength"]
        y = y + held[f"{name}.bias"][some][:, None, None]
        return np.sqrt(2) * np.where(y < 0, 0.2 * y, y)

    yield held["b4.const"]
    yield convolved


def test_the_generator_is_stylegan2_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some channels of the first three layers against scipy, and how planes are summed up."""
    state = random_state()
    net = eg3d.EG3DGenerator()
    net.take(eg3d.checked(state))
    change = 0.5 * torch.randn(14, 512, generator=torch.Generator().manual_seed(1))
    styles = (state["backbone.mapping.w_avg"] + change).double().numpy()
    seen: list[Tensor] = []
    drawn: list[Tensor] = []
    for layer in net.layers:
        layer.register_forward_hook(lambda m, i, o: seen.append(o[0]))
    for draw in net.draw:
        draw.register_forward_hook(lambda m, i, o: drawn.append(o[0]))
    with torch.no_grad():
        planes = net(change)
    assert planes.shape == (3, 32, 256, 256) and len(seen) == 13 and len(drawn) == 7
    start, convolved = reference(state, styles)
    some = [0, 7, 511]
    inputs = [start, *(s.double().numpy() for s in seen)]
    for index, (name, up) in enumerate(
        [("b4.conv1", False), ("b8.conv0", True), ("b8.conv1", False), ("b16.conv0", True)]
    ):
        ours = seen[index][some].numpy()
        theirs = convolved(name, inputs[index], styles[index], up, some)  # type: ignore[operator]
        assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max(), name
    # drawings hear the style of the layer that comes next
    for at, (index, block) in enumerate([(0, "b4"), (2, "b8"), (4, "b16")]):
        prefix = f"backbone.synthesis.{block}.torgb"
        affine = state[f"{prefix}.affine.weight"].double().numpy() / np.sqrt(512)
        scale = affine @ styles[index + 1] + state[f"{prefix}.affine.bias"].double().numpy()
        kernel = state[f"{prefix}.weight"][:, :, 0, 0].double().numpy() * scale / np.sqrt(512)
        theirs = np.einsum("oc,chw->ohw", kernel, seen[index].double().numpy())
        theirs += state[f"{prefix}.bias"].double().numpy()[:, None, None]
        assert np.abs(drawn[at].numpy() - theirs).max() < 1e-3 * np.abs(theirs).max(), block
    # each size adds to the one before, interpolated as its pixels' centres lie
    flat = torch.full((1, 2, 8, 8), 3.0)
    assert torch.allclose(eg3d._doubled(flat)[..., 2:-2, 2:-2], torch.tensor(3.0))
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    want = (torch.arange(16.0) + 0.5) / 2 - 0.5
    assert torch.allclose(eg3d._doubled(ramp)[0, 0, 8, 2:-2], want[2:-2], atol=1e-5)


@pytest.mark.parametrize("kind", eg3d.KINDS)
def test_a_point_reads_the_same_in_our_planes_as_in_theirs(kind: eg3d.Kind) -> None:
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(3, 4, 8, 8), size=128, mode="bicubic", align_corners=False)
    placing = eg3d.EG3DPlacing(kind)
    torch.nn.init.constant_(placing.stretch, 2.0)
    torch.nn.init.constant_(placing.shift, -1.0)
    reach = torch.tensor([1.2, 1.4, 1.0])
    with torch.no_grad():
        ours = RowPlanes(placing(smooth, reach)[None])
        x = (2 * torch.rand(500, 3) - 1) * 0.9
        read = ours(warped(x, reach), torch.zeros(500, dtype=torch.long))
        flip = torch.tensor([1.0, -1.0, -1.0])
        face, ears = eg3d.FACE * math.exp(0.04), torch.tensor(eg3d.EARS) - 0.02
        there = 2 * (face * x * flip + ears)
    last = [2, 1] if kind == "eg3d-fixed" else [2, 0]
    pairs = torch.stack([there[:, [0, 1]], there[:, [0, 2]], there[:, last]])
    theirs = F.grid_sample(smooth, pairs[:, :, None], padding_mode="zeros", align_corners=False)
    assert there.abs().max() < 1, "inside the cube"
    assert torch.allclose(read, theirs[..., 0].mean(0).T, atol=0.02)


def test_the_decoder_says_density_per_face_height_and_colour_before_the_sigmoid() -> None:
    state = random_state()
    net = eg3d.EG3DDecoder()
    net.take(state)
    read = torch.randn(50, 32)
    hidden = F.softplus(
        read @ state["decoder.net.0.weight"].T / 32**0.5 + state["decoder.net.0.bias"]
    )
    out = hidden @ state["decoder.net.2.weight"].T / 8 + state["decoder.net.2.bias"]
    with torch.no_grad():
        said = net(read)
    assert torch.allclose(said[:, 1:], out[:, 1:], atol=1e-4)
    want = eg3d.FACE * F.softplus(out[:, 0] - 1)
    assert torch.allclose(density_of(said[:, 0]), want, rtol=1e-3, atol=1e-5)


# -- the avatar -----------------------------------------------------------------------------------


def test_a_person_begins_with_it_and_ends_as_planes(speaker_home: Path) -> None:
    space = Workspace.open(speaker_home, "speaker")
    preset = presets.load(["talk3d", "eg3d"], ["data.size_px=64", "march.resolution=16"])
    clip = footage.load(space, preset.data, SilentProgress())
    torch.manual_seed(0)
    avatar = Talk3D.build("full", **hearing(clip.signals), px=64, borrowed="eg3d-fixed")
    avatar.load_generator(random_state())
    box = footage.box_of(clip.signals.camera[clip.train])
    avatar.calibrate(clip.signals[clip.train], clip.mesh, box)
    row = clip.signals[clip.train[:1]]
    names = {n for n, _ in avatar.named_parameters()}
    assert {"placing.shift", "latents.styles", "generator.start"} <= names
    found = {id(p) for p in avatar.part("latents")}
    assert {id(p) for p in (avatar.placing.shift, avatar.latents.styles)} <= found  # type: ignore[union-attr]
    x = 0.4 * torch.randn(200, 3)
    where = torch.zeros(200, dtype=torch.long)
    avatar.eval()
    avatar.still = True
    with torch.no_grad():
        before = avatar.condition(row)(x, x, where)
        avatar.finish()
        after = avatar.condition(row)(x, x, where)
    assert not any(n.startswith(("generator", "latents", "placing")) for n in avatar.state_dict())
    for one, two in zip(before, after, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def test_training_goes_through_finding_and_tuning(
    speaker_home: Path,
    published: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a minute at full size; what it does is no different here
    monkeypatch.setattr(views, "open_views", lambda *_: None)
    home = Path(shutil.copytree(speaker_home, tmp_path / "home"))
    settings = ["data.size_px=64", "march.resolution=16", "march.n_steps=12", "march.n_samples=4"]
    preset = presets.load(["talk3d", "eg3d"])
    for name in preset.train.stages:
        steps = {"speech": 2, "invert": 2, "tune": 1, "still": 1}.get(name, 0)
        few = {"steps": steps, "n_points": 1000, "n_frames": 1}
        settings += [f"train.stages.{name}.{key}={value}" for key, value in few.items()]
    words = {"preset_names": ["talk3d", "eg3d"], "settings": settings, "device": "cpu"}
    with pytest.raises(TalkheadError, match="models import eg3d-fixed"):
        finetune(home, "speaker", SilentProgress(), **words)  # type: ignore[arg-type]
    job.import_generator("eg3d-fixed", published)
    progress, seen = SilentProgress(), set()
    run = finetune(
        home,
        "speaker",
        progress,
        **words,  # type: ignore[arg-type]
        stop_after=lambda p: bool(seen.add(p.stage)),
    )
    assert run.is_finished and any("its licence" in note for note in progress.notes)
    assert run.meta()["steps"] == 5, "speech, invert and tune; not the free fit"
    assert "non-commercial" in run.meta()["generator"]["licence"]
    player = Player.load(run, torch.device("cpu"))
    assert isinstance(player.avatar.decoder, eg3d.EG3DDecoder)  # type: ignore[attr-defined]
    with pytest.raises(MisuseError, match="not with both"):
        finetune(home, "speaker", SilentProgress(), **words, prior="x")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="teaches a generator of its own"):
        pretrain(home, ["speaker"], "p", SilentProgress(), preset_names=["talk3d", "eg3d"])
    with pytest.raises(MisuseError, match="does not begin with a generator"):
        finetune(
            home,
            "speaker",
            SilentProgress(),
            preset_names=["lokitalk"],
            device="cpu",
            settings=["avatar.generator=eg3d"],
        )
    with pytest.raises(MisuseError, match="goes with size full"):
        presets.load(["talk3d", "eg3d", "tiny"])


def test_parts_that_a_generator_has_not_trained_learn_at_their_full_rates() -> None:
    preset = presets.load(["talk3d", "eg3d"])
    stages = presets.adapted_to_start(preset, Talk3D.generator_parts, 60.0).train.stages
    assert stages["speech"].rates == preset.train.stages["speech"].rates
    own, slower = preset.train.stages["tune"].rates, stages["tune"].rates
    assert slower == own | {"decoder": 0.5 * own["decoder"]}
