"""Presets: what ships is valid, what is mistyped is refused by its dotted path."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from talkhead_cli.avatars import LEARNERS, METHODS, avatar_class
from talkhead_cli.contracts import MisuseError, SilentProgress
from talkhead_cli.jobs import preset
from talkhead_cli.jobs.step import refuse_unknown

SHIPPED = sorted(p.stem for p in (Path(__file__).parents[1] / "presets").glob("*.yaml"))


def test_the_folder_beside_the_package_is_the_one_that_is_read() -> None:
    assert SHIPPED and preset.preset_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_loads_alone_or_over_lokitalk(name: str) -> None:
    alone = "method" in preset.read_layer(name)
    loaded = preset.load([name] if alone else ["lokitalk", name])
    assert loaded.pretrain is not None
    stages = [*loaded.train.stages.values(), *loaded.pretrain.stages.values()]
    assert stages and all(stage.learn for stage in stages)


def test_an_overlay_alone_lacks_a_method() -> None:
    with pytest.raises(MisuseError, match="tiny names no method.*-p lokitalk -p tiny"):
        preset.load(["tiny"])


def test_two_methods_are_too_many() -> None:
    with pytest.raises(MisuseError, match="lokitalk and landmark are two methods"):
        preset.load(["lokitalk", "landmark", "tiny"])


def test_a_stage_that_is_misspelt_is_named_with_those_there_are() -> None:
    with pytest.raises(
        MisuseError, match=r"unknown stage 'train.stages.lipz'.*lips, eyes.*'learn'"
    ):
        preset.load(["lokitalk"], ["train.stages.lipz.steps=3"])


def test_a_stage_that_is_misspelt_in_a_file_is_named(tmp_path: Path) -> None:
    """Those of other methods are ignored, as in the overlays that are shipped."""
    file = tmp_path / "my preset.yaml"
    file.write_text("train: {stages: {lipz: {steps: 9}}}")
    with pytest.raises(MisuseError, match="no method has a stage train.stages.lipz.*lips"):
        preset.load(["lokitalk", "tiny", str(file)])
    file.write_text("train: {stages: {upscale: {steps: 9}, lips: {steps: 7}}}")
    made = preset.load(["lokitalk", "tiny", str(file)])
    assert made.train.stages["lips"].steps == 7 and "upscale" not in made.train.stages
    assert preset.run_name(["lokitalk", str(file)]).startswith("lokitalk+my-preset-")


def test_of_several_misspelt_stages_none_is_called_known() -> None:
    with pytest.raises(MisuseError) as error:
        preset.load(["s3d"], ["pretrain.stages.shape.steps=6", "pretrain.stages.match.steps=6"])
    said = str(error.value).partition("known there:")[2]
    assert "pairs" in said and "shape" not in said and "match" not in said


def test_a_stage_that_is_no_table_is_answered() -> None:
    with pytest.raises(MisuseError, match="unknown stage 'train.stages.aaa'"):
        preset.load(["lokitalk"], ["train.stages.aaa.steps=3", "train.stages.bbb=5"])


def test_lids_do_not_go_with_rows_in_sequence() -> None:
    with pytest.raises(MisuseError, match="lids draws rows one by one"):
        preset.load(["landmark"], ["train.stages.speech.lids=0.5"])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.stages.speech.listen=0.5", "listen changes nothing in a stage without rays"),
        ("train.stages.speech.portraits=1", "portraits changes nothing in a stage without rays"),
        ("train.stages.detail.shown=true", "shown is for stages without rays"),
        ("pretrain.enough_s=5", "pretrain.enough_s is for runs begun from a prior"),
        ("pretrain.stages.shape.start=prior", "pretrain.stages.shape.start is for stages of train"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(setting: str, told: str) -> None:
    with pytest.raises(MisuseError, match=told):
        preset.load(["lokitalk"], [setting])


@pytest.mark.parametrize(
    ("method", "part", "setting", "told"),
    [
        ("lokitalk", "train", "train.stages.shape.portraits=1", "leave portraits at 0"),
        ("landmark", "train", "train.stages.shape.portraits=1", "leave portraits at 0"),
        ("s3d", "pretrain", "pretrain.stages.pairs.portraits=0", "set portraits to 1 or more"),
        (
            "lokitalk",
            "train",
            "train.stages.detail.weights.ssim=1",
            "rays: random yield no.*'ssim'",
        ),
        ("lokitalk", "train", "train.stages.shape.rays=none", "explore changes nothing"),
        ("lokitalk", "train", "train.stages.speech.rays=random", "rays: random yield no.*speech"),
        ("lokitalk", "train", "train.stages.speech.weights.speech=0", "weighs no loss.*speech"),
        ("landmark", "train", "train.stages.torso.weights.ssim=1", "rays: picture yield no.*ssim"),
    ],
)
def test_a_stage_that_could_not_do_what_it_says_is_refused(
    method: str, part: str, setting: str, told: str
) -> None:
    avatar = avatar_class(method).build("tiny", n_steps=9, n_features=8, px=128)
    with pytest.raises(MisuseError, match=told):
        chosen = preset.load([method, "tiny"], [setting])
        refuse_unknown(getattr(chosen, part), avatar, method)


def test_an_overlay_goes_after_its_method() -> None:
    with pytest.raises(MisuseError, match="an overlay goes after.*-p lokitalk -p tiny"):
        preset.load(["tiny", "lokitalk"])


def test_without_a_gpu_256_px_are_trained_unless_presets_are_named() -> None:
    progress = SilentProgress()
    assert preset.default_presets("cuda", progress) == ["lokitalk"] and not progress.notes
    small = preset.load(preset.default_presets("cpu", progress))
    assert small == preset.load(["lokitalk", "small"]) and small.data.size_px == 256
    (note,) = progress.notes
    assert "training 256 px" in note
    assert preset.warning_of_slow_training(small, small.train, "cpu") is None


def test_who_trains_at_full_size_without_a_gpu_is_told() -> None:
    full, tiny = preset.load(["lokitalk"]), preset.load(["lokitalk", "tiny"])
    assert "-p small" in str(preset.warning_of_slow_training(full, full.train, "cpu"))
    assert preset.warning_of_slow_training(full, full.train, "cuda") is None
    assert preset.warning_of_slow_training(tiny, tiny.train, "cpu") is None
    photo = preset.load(["s3d"])  # who is drawn by a prior is not trained
    assert preset.warning_of_slow_training(photo, photo.train, "cpu") is None


@pytest.mark.parametrize(
    "key",
    [
        "colour",
        "data.size",
        "march.steps",
        "train.stages.lips.step",
        "train.stages.lips.weights_",
        "avatar.width",
        "pretrain.stage",
        "pretrain.stages.speech.step",
    ],
)
def test_an_unknown_key_is_named_by_its_path(key: str) -> None:
    with pytest.raises(MisuseError) as error:
        preset.load(["lokitalk"], [f"{key}=1"])
    assert f"'{key}'" in str(error.value)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("data.size", "size_px"),
        ("train.stages.lips.step", "steps"),
        ("colour", "method"),
        ("pretrain.stages.speech.step", "steps"),
        ("pretrain.stage", "stages"),
    ],
)
def test_an_unknown_key_is_answered_with_the_known_ones(key: str, known: str) -> None:
    with pytest.raises(MisuseError, match=f"known there: .*{known}"):
        preset.load(["lokitalk"], [f"{key}=1"])


@pytest.mark.parametrize(
    "setting",
    [
        "data.size_px=100",  # no multiple of 8
        "data.holdout=0.9",
        "march.n_steps=many",
        "train.scale=0",
        "train.stages.lips.rays=all",
        "avatar.size=huge",
        "data=512",
    ],
)
def test_a_value_out_of_range_is_named_by_its_path(setting: str) -> None:
    with pytest.raises(MisuseError) as error:
        preset.load(["lokitalk"], [setting])
    assert f"'{setting.partition('=')[0]}'" in str(error.value)


def test_a_new_stage_must_be_whole() -> None:
    with pytest.raises(MisuseError, match=r"'train\.stages\.polish'.* 'learn'"):
        preset.load(["lokitalk"], ["train.stages.polish.steps=5"])


@pytest.mark.parametrize("over", ["rates={speech: 1e-3, volume: 1e-3}", "learn=[speech, volume]"])
def test_rates_and_learning_parts_must_agree(over: str) -> None:
    with pytest.raises(MisuseError, match="train.stages.speech.*volume"):
        preset.load(["lokitalk"], [f"train.stages.speech.{over}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2.0), ("1.5", 1.5), ("1e-3", 1e-3), ("2.5E+1", 25.0), ("-1", None), ("nan", None)],
)
def test_settings_read_numbers(text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(MisuseError, match=r"train\.scale"):
            preset.load(["lokitalk"], [f"train.scale={text}"])
    else:
        assert preset.load(["lokitalk"], [f"train.scale={text}"]).train.scale == value


def test_settings_read_whole_numbers_with_an_exponent() -> None:
    loaded = preset.load(["lokitalk"], ["train.stages.lips.steps=1e3"])  # a word to YAML 1.1
    assert loaded.train.stages["lips"].steps == 1000


def test_settings_read_lists_words_and_truth() -> None:
    words = ["train.stages.lips.freeze_grid=false", "avatar.size=tiny"]
    loaded = preset.load(["lokitalk"], words)
    assert loaded.train.stages["lips"].freeze_grid is False
    assert loaded.avatar.size == "tiny"
    stage = "{steps: 1, learn: [deform, volume], rates: {deform: 1e-3, volume: 2e-3}}"
    polish = preset.load(["lokitalk"], [f"train.stages.polish={stage}"]).train.stages["polish"]
    assert polish.learn == ("deform", "volume")
    assert polish.rates == {"deform": 1e-3, "volume": 2e-3}


@pytest.mark.parametrize("setting", ["data.size_px", "=3", ""])
def test_a_setting_is_key_and_value(setting: str) -> None:
    with pytest.raises(MisuseError, match="key=value"):
        preset.load(["lokitalk"], [setting])


def layer(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_the_later_layer_wins_and_settings_win_last(tmp_path: Path) -> None:
    a = layer(tmp_path, "a.yaml", "data: {size_px: 64, window: 9}")
    b = layer(tmp_path, "b.yaml", "data: {size_px: 96}")
    assert preset.load(["lokitalk", a, b]).data.size_px == 96
    assert preset.load(["lokitalk", b, a]).data.size_px == 64
    assert preset.load(["lokitalk", a, b]).data.window == 9  # what b does not name stays
    assert preset.load(["lokitalk", a, b], ["data.size_px=72"]).data.size_px == 72
    twice = ["data.size_px=72", "data.size_px=80"]
    assert preset.load(["lokitalk"], twice).data.size_px == 80


def test_patches_that_do_not_fit_into_pictures_are_refused() -> None:
    with pytest.raises(MisuseError, match=r"^patches of stage lips \(64 px\) do not fit"):
        preset.load(["lokitalk"], ["data.size_px=32"])


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_shipped_stages_weigh_losses_that_there_are(name: str) -> None:
    made = preset.load([name])
    avatar = avatar_class(name).build("tiny", n_steps=9, n_features=8, px=128)
    losses = {rays: avatar.losses_of(rays) for rays in ("none", "random", "patch", "picture")}
    for part in (made.train, made.pretrain):
        for stage in part.stages.values() if part is not None else ():
            weighed = {loss for loss, weight in stage.weights.items() if weight}
            assert weighed and weighed <= losses[stage.rays], (name, stage)


def test_merging_leaves_its_inputs_alone() -> None:
    before = preset.load(["lokitalk"])
    preset.load(["lokitalk", "tiny"], ["train.stages.lips.steps=1"])
    assert preset.load(["lokitalk"]) == before


def test_stages_keep_their_order() -> None:
    under = list(preset.load(["lokitalk"]).train.stages)
    assert list(preset.load(["lokitalk", "tiny"], ["train.stages.shape.steps=1"]).train.stages) == (
        under
    )


@pytest.mark.parametrize("settings", [[], ["train.scale=1e-5", "data.holdout=0"]])
def test_yaml_round_trip(settings: list[str]) -> None:
    for names in (["lokitalk"], ["lokitalk", "tiny"], ["lokitalk", "small"]):
        whole = preset.load(names, settings)
        assert preset.from_yaml(whole.to_yaml()) == whole
        assert list(preset.from_yaml(whole.to_yaml()).train.stages) == list(whole.train.stages)


def test_a_preset_is_frozen() -> None:
    with pytest.raises(ValidationError):
        preset.load(["lokitalk"]).data.size_px = 64


@pytest.mark.parametrize("name", ["../x", "a/b", "nosuch", "../lokitalk", "nosuch.yaml", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(MisuseError, match="known: .*lokitalk"):
        preset.load([name])


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "", "a: [1"])
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(MisuseError, match=r"odd\.yaml"):
        preset.load(["lokitalk", layer(tmp_path, "odd.yaml", text)])


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    text = f"method: !!python/object/apply:os.mkdir ['{marker}']"
    with pytest.raises(MisuseError):
        preset.load([layer(tmp_path, "evil.yaml", text)])
    assert not marker.exists()


def test_a_run_is_named_by_its_presets() -> None:
    assert preset.run_name(["lokitalk", "folder/mine.yaml"]) == "lokitalk+mine"


@pytest.mark.parametrize("overlay", ["tiny", "small"])
def test_an_overlay_serves_every_method_and_passes_over_stages_it_has_not_got(overlay: str) -> None:
    known: set[str] = set()
    for method in METHODS:
        own = set(preset.load([method]).train.stages)
        made = preset.load([method, overlay])
        assert set(made.train.stages) == own and made.avatar.size == overlay
        known |= own
    assert set(preset.read_layer(overlay)["train"]["stages"]) <= known, "for nobody"
    with pytest.raises(MisuseError, match=r"train\.stages\.torso"):
        preset.load(["lokitalk"], ["train.stages.torso.steps=3"])


def test_a_stored_preset_that_held_out_more_than_is_ever_held_out_is_read() -> None:
    """Older versions took up to a half, and held out a quarter of it."""
    text = preset.load(["lokitalk", "tiny"]).to_yaml()
    old = preset.from_yaml(text.replace(f"holdout: {1 / 11}", "holdout: 0.4"))
    assert old.data.holdout == preset.MAX_HOLDOUT
    with pytest.raises(MisuseError, match="data.holdout"):
        preset.load(["lokitalk"], ["data.holdout=0.4"])


def test_presets_that_differ_are_told_by_their_keys() -> None:
    one = preset.load(["lokitalk", "tiny"])
    other = preset.load(["lokitalk", "tiny"], ["train.scale=0.1", "march.n_close=4"])
    assert preset.differences(one, one) == ""
    told = preset.differences(one, other)
    assert "train.scale=1.0, not 0.1" in told and "march.n_close=10, not 4" in told
    assert preset.differences(one, other, at_most=1).endswith(" ...")
