"""What many people share, and how a new one begins from it; on copies of the synthetic speaker."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from talkhead_cli.cli.app import app
from talkhead_cli.contracts import MisuseError, SilentProgress, TalkheadError
from talkhead_cli.jobs import preset as presets
from talkhead_cli.jobs.finetune import finetune
from talkhead_cli.jobs.pretrain import pretrain
from talkhead_cli.store import Run, Workspace

PRESETS = ["lokitalk", "tiny"]
SMALL = ["data.size_px=64", "march.resolution=32", "march.n_steps=16"]
FIELDS = ("shape", "detail")
QUICK = [  # speech alone
    *SMALL,
    "pretrain.stages.speech.steps=30",
    "pretrain.stages.speech.n_people=2",
    *(f"pretrain.stages.{stage}.steps=0" for stage in FIELDS),
]
WHOLE = [
    *QUICK,
    *(
        f"pretrain.stages.{stage}.{setting}"
        for stage in FIELDS
        for setting in ("steps=4", "n_points=3000", "n_people=2")
    ),
]
ONE_LOOK = [*SMALL]
for _name in ("speech", "shape", "detail", "lips", "eyes"):
    ONE_LOOK.append(f"train.stages.{_name}.steps=0")
ONE_LOOK.append("train.stages.speech_all.steps=2")
PEOPLE = ["one", "two", "three"]


@pytest.fixture
def crowd(speaker_home: Path, tmp_path: Path) -> Path:
    """Three people, by their sources; and a fourth that nobody has met."""
    home = tmp_path / "home"
    for name in (*PEOPLE, "new"):
        shutil.copytree(speaker_home / "speaker", home / name)
        space = Workspace(home, name)
        source = space.manifest()["source"]
        space.note(id=name, source={**source, "sha256": name * 8})
    return home


def make(home: Path, out: str = "crowd", **options: object) -> tuple[Run, SilentProgress]:
    progress = SilentProgress()
    options = {"names": PEOPLE, "settings": QUICK, **options}
    made = pretrain(home, out=out, progress=progress, preset_names=PRESETS, device="cpu", **options)  # type: ignore[arg-type]
    return made, progress


def begin(home: Path, name: str = "new", **options: object) -> tuple[Run, SilentProgress]:
    progress = SilentProgress()
    run = finetune(
        home, name, progress, preset_names=PRESETS, settings=ONE_LOOK, device="cpu", **options
    )  # type: ignore[arg-type]
    return run, progress


def test_a_prior_holds_what_people_share_and_says_who_they_were(crowd: Path) -> None:
    prior, _ = make(crowd, settings=WHOLE)
    assert prior.is_finished and prior.root == crowd / ".priors" / "crowd"
    names = set(prior.weights())
    assert {"mouth_basis", "speech.linear.weight", "volume.levels.0"} <= names
    assert any(n.startswith("transfer.") for n in names)
    assert not any(n.startswith(("people.", "aabb")) for n in names), "nobody's own"
    meta = prior.meta()
    assert meta["people"] == {n: n * 8 for n in PEOPLE}
    assert meta["speech"]["backend"] == "embedding" and meta["steps"] == 38
    assert ".priors" not in [p.name for p in crowd.glob("*/manifest.json")]


def test_pretraining_learns_to_hear(crowd: Path) -> None:
    losses = []
    for steps in (1, 120):
        settings = [*QUICK, f"pretrain.stages.speech.steps={steps}"]
        losses.append(make(crowd, f"after-{steps}", settings=settings)[0].meta()["figures"]["loss"])
    assert losses[1] < 0.8 * losses[0], losses


def test_a_killed_prior_goes_on_and_ends_as_if_it_had_not_been_killed(crowd: Path) -> None:
    whole = make(crowd, "whole", settings=WHOLE)[0].weights()
    cut, _ = make(crowd, "cut", settings=WHOLE, stop_after=lambda place: place.total >= 33)
    assert not cut.is_finished
    resumed, _ = make(crowd, "cut", settings=WHOLE)
    for name, value in resumed.weights().items():
        assert torch.allclose(value, whole[name], atol=1e-5), name
    with pytest.raises(TalkheadError, match="--fresh"):
        make(crowd, "half", stop_after=lambda place: True)
        make(crowd, "half", names=PEOPLE[:2])


def test_a_prior_of_others_is_not_handed_out_nor_does_the_order_of_names_matter(
    crowd: Path,
) -> None:
    cut, _ = make(crowd, stop_after=lambda place: place.total >= 8)
    assert not cut.is_finished
    whole, _ = make(crowd, names=PEOPLE[::-1])
    assert whole.weights()["speech.linear.weight"].equal(
        make(crowd, "straight")[0].weights()["speech.linear.weight"]
    )
    for options in (
        {"names": [*PEOPLE, "new"]},
        {"seed": 3},
        {"settings": [*QUICK, "data.window=21"]},
    ):
        with pytest.raises(MisuseError, match="of other people, footage or settings"):
            make(crowd, **options)
    assert any("finished already" in note for note in make(crowd)[1].notes)


def test_a_prior_is_replaced_only_by_one_that_can_be_begun(crowd: Path) -> None:
    prior, _ = make(crowd)
    before = prior.meta()
    wrong = [*QUICK, "pretrain.stages.detail.weights.colr=1"]
    for options in ({"names": ["one", "nobody"]}, {"settings": wrong}):
        with pytest.raises(TalkheadError):
            make(crowd, fresh=True, **options)
        assert prior.meta() == before and prior.weights()
    made, _ = make(crowd, names=PEOPLE[:2], fresh=True)
    assert set(made.meta()["people"]) == {"one", "two"} and made.is_finished


def test_no_prior_is_called_none(crowd: Path) -> None:
    with pytest.raises(MisuseError, match="means no prior"):
        pretrain(crowd, ["one", "two"], "none", SilentProgress(), preset_names=["lokitalk", "tiny"])


def test_a_setting_that_another_command_reads_is_refused(crowd: Path) -> None:
    with pytest.raises(MisuseError, match="say pretrain.scale=0.1"):
        make(crowd, settings=[*QUICK, "train.scale=0.1"])
    for setting in ("data.train_s=3", "data.holdout=0.2"):
        with pytest.raises(MisuseError, match="is read by finetune: a prior learns from all"):
            make(crowd, settings=[*QUICK, setting])
    with pytest.raises(MisuseError, match="say train.scale=0.1"):
        finetune(
            crowd, "one", SilentProgress(), preset_names=PRESETS, settings=["pretrain.scale=0.1"]
        )


def test_a_prior_begun_on_other_tracks_of_the_same_film_is_not_continued(crowd: Path) -> None:
    make(crowd, stop_after=lambda place: place.total >= 8)
    space = Workspace.open(crowd, "one")
    space.mark_done("sound", "moved by 0.3 s")
    with pytest.raises(MisuseError, match="of other people, footage or settings"):
        make(crowd)


def test_two_jobs_do_not_write_one_prior(crowd: Path) -> None:
    prior = Run.named(crowd / ".priors", "crowd")
    with prior.locked(), pytest.raises(TalkheadError, match="working on 'crowd'"):
        make(crowd)
    assert not prior.root.exists()
    assert make(crowd)[0].is_finished


def test_who_cannot_be_used_is_left_out_with_a_word(crowd: Path) -> None:
    Workspace(crowd, "two").note(has_audio=False)
    (crowd / "three" / "tracks.npz").unlink()
    prior, progress = make(crowd, names=[*PEOPLE, "new", "nobody", "new"])
    assert set(prior.meta()["people"]) == {"one", "new"}
    told = " ".join(progress.notes)
    assert all(f"'{name}' is left out" in told for name in ("two", "three", "nobody"))
    with pytest.raises(TalkheadError, match="at least 2"):
        make(crowd, "lonely", names=["one", "two"])


def test_a_new_person_begins_from_the_prior_that_is_named_or_the_newest(crowd: Path) -> None:
    prior, _ = make(crowd, settings=WHOLE)
    make(crowd, "other", seed=1)
    make(crowd, "larger", settings=[*QUICK, "data.window=21"])
    plain, progress = begin(crowd, prior="none")
    assert plain.name == "lokitalk+tiny" and not any("prior" in n for n in progress.notes)
    assert plain.meta()["prior"] is None
    newest, progress = begin(crowd)
    assert newest.name == "lokitalk+tiny+from-other", "larger does not fit"
    assert any("prior: other" in n and "--prior none" in n for n in progress.notes)
    _, progress = begin(crowd, run_name=plain.name)
    assert any("finished already" in n for n in progress.notes), "a named run keeps its prior"
    cut, _ = begin(crowd, prior="crowd", stop_after=lambda place: True)
    on, progress = begin(crowd)
    assert on.name == cut.name == "lokitalk+tiny+from-crowd" and on.is_finished, "not the newest"
    run, progress = begin(crowd, prior="crowd", fresh=True)
    assert run.name == "lokitalk+tiny+from-crowd" and run.meta()["prior"]["n_people"] == 3
    assert any("crowd" in n and "too good" not in n for n in progress.notes)
    shared, held = prior.weights(), run.weights()
    for name, value in shared.items():
        if name.startswith("speech."):
            assert torch.equal(held[f"avatar.{name.replace('speech.', 'speech.known.')}"], value)
        if name.startswith(("attention.", "mouth_", "face_field.0.", "frame", "to_")):
            assert torch.equal(held[f"avatar.{name}"], value), name
    assert not torch.equal(held["avatar.volume.levels.0"], shared["volume.levels.0"])
    assert not any("transfer" in name for name in held)
    make(crowd, "without-one", names=["two", "three"])
    make(crowd, "newest")
    assert begin(crowd, "one")[0].name.endswith("from-without-one"), "which does not know it"
    _, progress = begin(crowd, "one", prior="crowd")
    assert any("too good" in n for n in progress.notes), "the prior knew this person"
    assert run.meta()["prior"]["knew_person"] is False
    with pytest.raises(TalkheadError, match="another prior"):
        begin(crowd, prior="other", run_name=run.name)


def test_a_prior_that_does_not_fit_is_refused_by_name(crowd: Path) -> None:
    make(crowd, settings=[*QUICK, "data.window=21"])
    with pytest.raises(TalkheadError, match="what it hears"):
        begin(crowd, prior="crowd")
    with pytest.raises(TalkheadError, match="no finished prior 'nobody'"):
        begin(crowd, prior="nobody")
    large = presets.load(["lokitalk", "small"]).to_yaml()
    make(crowd, "large")[0].write_preset(large)
    with pytest.raises(TalkheadError, match="'large' does not fit these presets: it is of"):
        begin(crowd, prior="large")
    run, progress = begin(crowd)
    assert run.meta()["prior"] is None
    assert any("large" in n and "starts without a prior" in n for n in progress.notes)


def test_only_what_came_from_a_prior_learns_at_the_common_rate() -> None:
    asked = ["train.common_rates={speech: 0.25, pose: 0.1}", "train.enough_s=0"]
    preset = presets.load(PRESETS, asked)
    with pytest.raises(MisuseError, match="sppech"):
        presets.load(PRESETS, ["train.common_rates={sppech: 0.25}"])
    slow = presets.adapted_to_start(preset, ["speech", "volume"], 20)
    before, after = preset.train.stages, slow.train.stages
    assert after["speech"].rates["speech"] == 0.25 * before["speech"].rates["speech"]
    assert after["detail"].rates == before["detail"].rates
    assert presets.adapted_to_start(preset, None, 20).train.stages == before


@pytest.mark.parametrize(("seconds", "factor"), [(0.0, 0.25), (8.0, 0.5), (16.0, 1), (60.0, 1)])
def test_the_more_footage_the_faster_what_came_from_a_prior_learns(
    seconds: float, factor: float
) -> None:
    preset = presets.load(PRESETS, ["train.common_rates={static: 0.25}", "train.enough_s=16"])
    found = presets.adapted_to_start(preset, ["static"], seconds).train.stages["detail"].rates
    rates = preset.train.stages["detail"].rates
    assert found == rates | {"static": pytest.approx(factor * rates["static"])}


def test_little_footage_takes_its_share_of_the_steps_from_a_prior_and_all_from_nothing() -> None:
    preset = presets.load(PRESETS, ["train.scale=0.5", "train.enough_s=16"])

    def scale(shared: list[str] | None, seconds: float) -> float:
        return presets.adapted_to_start(preset, shared, seconds).train.scale

    assert [scale(["speech"], s) for s in (4, 8, 16, 60)] == [0.125, 0.25, 0.5, 0.5]
    assert scale(None, 4) == 0.5
    preset = presets.load(PRESETS, ["train.enough_s=0"])
    assert scale(["speech"], 4) == 1


def test_stages_are_for_those_who_begin_from_a_prior_or_from_nothing() -> None:
    preset = presets.load(["talk3d", "tiny"])
    found, fitted = (presets.adapted_to_start(preset, shared, 20) for shared in (["decoder"], None))
    assert {"invert", "tune"} == found.train.stages.keys() - fitted.train.stages.keys()
    assert {"still"} == fitted.train.stages.keys() - found.train.stages.keys()


def test_the_command_line_names_people_in_three_ways(crowd: Path, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["pretrain", "--home", str(crowd), *words])
        return done.exit_code, done.output

    quick = [w for setting in QUICK for w in ("-s", setting)]
    listed = tmp_path / "people.txt"
    listed.write_text("one\ntwo\n\n")
    for words, n in ((["--ids", "one, two,three"], 3), (["--ids-from", str(listed)], 2), ([], 4)):
        out = f"of{n}"
        code, said = run(*words, "-o", out, *quick)
        assert code == 0 and out in said
        assert len(Run(crowd / ".priors" / out).meta()["people"]) == n
    assert run("--ids", "one", "--ids-from", str(listed))[0] == 2
    assert run("-o", "../../x", *quick)[0] == 2 and not (tmp_path / "x").exists()
    with pytest.raises(MisuseError, match="nothing|no stages"):
        pretrain(crowd, PEOPLE, "x", SilentProgress(), settings=["pretrain=null"])
