"""Presets: strict, frozen pydantic models.  The only module that reads YAML."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from talkhead_cli.contracts import MisuseError, Progress, Size, TalkheadError
from talkhead_cli.jobs.holdout import MAX_HOLDOUT
from talkhead_cli.store.files import digest

Region = Literal["all", "lips", "eyes"]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class Data(_Strict):
    """Data options.  size_px: side of training and rendered pictures · holdout: share of the usable
    frames that is held out (1/11 as in the literature; at least 4 s, at most a quarter; 0: none)
    · train_s: train on the first so many seconds only (0: on all that is not held out)
    · window: length of the speech window around a frame, in steps of 10 ms."""

    size_px: Annotated[int, Field(ge=32, le=1024, multiple_of=8)] = 512
    holdout: Annotated[float, Field(ge=0, le=MAX_HOLDOUT)] = 1 / 11
    train_s: Annotated[float, Field(ge=0)] = 0.0
    window: Annotated[int, Field(ge=5, le=201)] = 33


class March(_Strict):
    """Ray marching options.  n_steps: samples across the box's depth · n_samples: samples per ray,
    placed where training saw surfaces (0: all in occupied cells) · n_close: samples of rays through
    lips or eyes when rendering, if more (fused kernels: of all rays) · resolution: cells per axis
    · early_stop: transmittance at which a ray ends · every: steps between grid updates · kind: the
    marcher; auto takes what the machine allows, dense evaluates all steps of every ray and no grid,
    so that it uses n_steps alone."""

    n_steps: Annotated[int, Field(ge=8, le=1024)] = 96
    n_samples: Annotated[int, Field(ge=0, le=128)] = 0
    n_close: Annotated[int, Field(ge=0, le=128)] = 0
    resolution: Annotated[int, Field(ge=16, le=256)] = 96
    early_stop: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    every: Annotated[int, Field(ge=1)] = 16
    kind: Literal["auto", "packed", "dense", "nerfacc"] = "auto"

    def of_marcher(self) -> dict[str, Any]:
        """Return the options that `march.build` takes; the others are for training and player."""
        return self.model_dump(exclude={"n_close", "every"})


class Stage(_Strict):
    """One training stage.

    steps        optimiser steps, before `Train.scale`
    rays         none (speech only), random pixels, square patches, or whole pictures
    n_points     samples sent to the field per step; sets the number of rays
    patch_px     side of a patch · region: where patches lie
    n_frames     rows per step with rays · batch: rows per speech-only step · in_sequence: length
                 of the runs of consecutive rows in which they are drawn
    learn        parts of the avatar that are trained · rates: their learning rates
    fall         factor to which the learning rates decay by the end of the stage
    weights      loss weights by name
    critic_rate  learning rate of the picture critic, where the loss `critic` has a weight
    listen       share of the rows whose landmarks are predicted from speech, not tracked
    inner_split  share of the training rows that the stage holds out for `Avatar.settle`
    freeze_grid  do not update the occupancy grid
    explore      sample all occupied cells, while it is unknown where surfaces are
    noise        factor on the method's own noise on the driving signals of rays
    shown        whether a speech-only step gets the pictures of its rows, too
    portraits    pictures of each person per step that are passed to `Avatar.enroll`
    rare         share of the rows drawn from those with shut eyes or wide open mouths
    lids         share of the eye pixels (of the rows, in patches and pictures) that is drawn
                 uniformly over eye openness instead of over time
    start        runs that include the stage: begun from a prior, from nothing, or any
    n_people     people per step when there are more (0: all of them)
    """

    steps: Annotated[int, Field(ge=0)]
    rays: Literal["none", "random", "patch", "picture"] = "random"
    n_points: Annotated[int, Field(ge=256)] = 24_000
    patch_px: Annotated[int, Field(ge=8, le=256)] = 32
    region: Region = "all"
    n_frames: Annotated[int, Field(ge=1)] = 16
    batch: Annotated[int, Field(ge=1)] = 64
    in_sequence: Annotated[int, Field(ge=1)] = 1
    learn: Annotated[tuple[str, ...], Field(min_length=1)]
    rates: dict[str, Annotated[float, Field(gt=0)]]
    fall: Annotated[float, Field(gt=0, le=1)] = 0.1
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    critic_rate: Annotated[float, Field(gt=0)] = 2e-4
    listen: Annotated[float, Field(ge=0, le=1)] = 0.0
    inner_split: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    freeze_grid: bool = False
    explore: bool = False
    noise: Annotated[float, Field(ge=0)] = 1.0
    shown: bool = False
    rare: Annotated[float, Field(ge=0, le=1)] = 0.0
    lids: Annotated[float, Field(ge=0, le=1)] = 0.0
    portraits: Annotated[int, Field(ge=0)] = 0
    n_people: Annotated[int, Field(ge=0)] = 0
    start: Literal["any", "nothing", "prior"] = "any"

    @model_validator(mode="after")
    def _rates_are_for_what_learns(self) -> Stage:
        if missing := set(self.learn) ^ set(self.rates):
            raise ValueError(f"learn and rates must name the same parts; differ in {missing}")
        for name in ("lids", "rare"):
            if getattr(self, name) and self.in_sequence > 1:
                raise ValueError(f"{name} draws rows one by one, which breaks up in_sequence")
        return self

    @model_validator(mode="after")
    def _options_of_rays_go_with_rays(self) -> Stage:
        if self.rays == "none":
            for name in ("listen", "explore", "rare", "lids", "portraits"):
                if getattr(self, name):
                    raise ValueError(f"{name} changes nothing in a stage without rays (rays: none)")
        elif self.shown:
            raise ValueError("shown is for stages without rays; others get their pictures anyway")
        return self


class Train(_Strict):
    """Training schedule.  scale: factor on the steps of every stage · ema: decay of the averaged
    weights · enough_s: seconds of footage from which a run begun from a prior takes all steps; with
    less footage it takes a proportional share, since more would overfit it and forget the prior
    · common_rates: factors on the learning rates of parts in runs begun from a prior; with a share
    s of `enough_s` they count to the power of 1 - s, since more footage may undo more (0: in full,
    however much there is)."""

    scale: Annotated[float, Field(gt=0)] = 1.0
    enough_s: Annotated[float, Field(ge=0)] = 0.0
    common_rates: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.998
    stages: dict[str, Stage]

    def stages_weighing(self, *losses: str) -> list[str]:
        """Return the names of the stages with steps in which one of the losses has a weight."""
        return [
            name
            for name, stage in self.stages.items()
            if stage.steps and any(stage.weights.get(loss) for loss in losses)
        ]

    @model_validator(mode="after")
    def _common_rates_are_for_what_learns(self) -> Train:
        learnt = {part for stage in self.stages.values() for part in stage.learn}
        if strange := set(self.common_rates) - learnt:
            raise ValueError(f"common_rates names {strange}; stages learn {sorted(learnt)}")
        return self


class Render(_Strict):
    """Rendering options.  crf: H.264 quality (lower is better)."""

    crf: Annotated[int, Field(ge=0, le=40)] = 16


class AvatarOptions(_Strict):
    """Network options.  size: each method maps it to its layer widths · generator: published
    generator that the planes of a full-sized talk3d start from."""

    size: Size = "full"
    generator: Literal["eg3d", "eg3d-fixed"] | None = None

    @model_validator(mode="after")
    def _generators_are_of_one_size(self) -> AvatarOptions:
        if self.generator is not None and self.size != "full":
            raise ValueError(f"{self.generator} goes with size full, not {self.size}")
        return self


class Preset(_Strict):
    """Everything that defines a training run.  pretrain: stages that train on many people."""

    method: str
    data: Data = Data()
    march: March = March()
    train: Train
    pretrain: Train | None = None
    render: Render = Render()
    avatar: AvatarOptions = AvatarOptions()

    @model_validator(mode="after")
    def _only_finetune_starts_from_a_prior(self) -> Preset:
        if self.pretrain is None:
            return self
        for name in ("enough_s", "common_rates"):
            if getattr(self.pretrain, name):
                raise ValueError(f"pretrain.{name} is for runs begun from a prior: train.{name}")
        for name, stage in self.pretrain.stages.items():
            if stage.start != "any":
                raise ValueError(f"pretrain.stages.{name}.start is for stages of train")
        return self

    @model_validator(mode="after")
    def _patches_fit_into_pictures(self) -> Preset:
        for part in (self.train, self.pretrain):
            for name, stage in part.stages.items() if part is not None else ():
                if stage.rays == "patch" and stage.patch_px > self.data.size_px:
                    raise ValueError(
                        f"patches of stage {name} ({stage.patch_px} px) do not fit into pictures "
                        f"of data.size_px = {self.data.size_px}; set its patch_px"
                    )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def adapted_to_start(preset: Preset, shared: Collection[str] | None, seconds: float) -> Preset:
    """Return the preset for a run on `seconds` of footage.  `shared`: parts that a prior (or a
    generator) has trained; steps are then scaled by `share_of_steps`, rates of these parts by
    `train.common_rates`.  None: begun from nothing.  Stages of the other `start` are left out."""
    share = 1.0 if shared is None else share_of_steps(preset, seconds)
    power = 1 - share if preset.train.enough_s else 1.0
    rates = preset.train.common_rates
    slower = {part: rates[part] ** power for part in rates if part in (shared or ())}
    other = "prior" if shared is None else "nothing"
    stages = {
        name: stage.model_copy(
            update={
                "rates": {part: rate * slower.get(part, 1) for part, rate in stage.rates.items()}
            }
        )
        for name, stage in preset.train.stages.items()
        if stage.start != other
    }
    train = {"stages": stages, "scale": share * preset.train.scale}
    return preset.model_copy(update={"train": preset.train.model_copy(update=train)})


def share_of_steps(preset: Preset, seconds: float) -> float:
    """Return the share of its steps that a run begun from a prior takes on `seconds` of footage."""
    return min(1.0, seconds / preset.train.enough_s) if preset.train.enough_s else 1.0


def default_presets(device_kind: str, progress: Progress) -> list[str]:
    """Return the presets to train with if none is named: small ones without a GPU, with a note."""
    if device_kind != "cpu":
        return ["lokitalk"]
    progress.note(
        "no GPU is used: training 256 px, -p lokitalk -p small (-p lokitalk alone is 512 px, which "
        "takes a CPU days)"
    )
    return ["lokitalk", "small"]


def warning_of_slow_training(preset: Preset, train: Train, device_kind: str) -> str | None:
    """Return a warning if full-sized pictures are to be trained without a GPU, else None."""
    draws = any(stage.steps and stage.rays != "none" for stage in train.stages.values())
    if device_kind != "cpu" or preset.avatar.size != "full" or not draws:
        return None
    return (
        f"no GPU is used, and training at {preset.data.size_px} px takes a CPU days; -p small "
        "(256 px) and -p tiny (128 px) are made for one"
    )


def preset_folder() -> Path:
    """Return the folder of presets: inside the wheel, or beside the package in a checkout."""
    inside = Path(str(resources.files("talkhead_cli") / "presets"))
    return inside if inside.is_dir() else Path(__file__).parents[2] / "presets"


def preset_names() -> list[str]:
    return sorted(p.stem for p in preset_folder().glob("*.yaml"))


def is_file(name: str) -> bool:
    """Return whether the name is that of a user's file, not of a preset shipped with talkhead."""
    return name.endswith((".yaml", ".yml"))


def preset_text(name: str) -> str:
    """Return the YAML of a preset by name, or of a file whose name ends in .yaml or .yml."""
    path = Path(name) if is_file(name) else preset_folder() / f"{name}.yaml"
    if not (path.is_file() if is_file(name) else name in preset_names()):
        raise MisuseError(
            f"there is no preset '{name}'; known: {', '.join(preset_names())}, or a .yaml file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"the preset file {name} cannot be read: {error}") from error


def read_layer(name: str) -> dict[str, Any]:
    """Read one preset by name or by path, as plain values."""
    try:
        layer = yaml.safe_load(preset_text(name))
    except yaml.YAMLError as error:
        raise MisuseError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(layer, dict):
        raise MisuseError(f"{name} must hold keys and values")
    return layer


def load(names: Sequence[str], settings: Sequence[str] = ()) -> Preset:
    """Merge presets left to right, then `key=value` settings with dotted keys; validate."""
    merged: dict[str, Any] = {}
    for name in names:
        layer = read_layer(name)
        method, other = merged.get("method"), layer.get("method")
        if None not in (method, other) and method != other:
            raise MisuseError(f"presets {method} and {other} are two methods; choose one of them")
        if merged and method is None and other is not None:
            raise MisuseError(
                f"an overlay goes after the method that it changes: -p {name} -p {names[0]}"
            )
        merged = _merge(merged, _for_method(name, layer, merged))
    if names and "method" not in merged:
        raise MisuseError(
            f"preset {'+'.join(names)} names no method and goes on top of one that does: "
            f"-p lokitalk -p {names[-1]}"
        )
    for setting in settings:
        merged = _merge(merged, _parse_setting(setting))
    return validate(merged)


def _for_method(name: str, layer: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    """Return the layer called `name`; if it names no method, without the stages that `under` lacks
    and other methods have.  MisuseError for a stage that none has."""
    if "method" in layer or not under:
        return layer
    layer = copy.deepcopy(layer)
    for part in ("train", "pretrain"):
        known, stages = _stages(under, part), _stages(layer, part)
        for stage in set(stages) - set(known):
            # a complete stage, which has `learn`, is kept as a new one
            if isinstance(stages[stage], dict) and "learn" in stages[stage]:
                continue
            if is_file(name) and not any(
                stage in _stages(read_layer(shipped), part) for shipped in preset_names()
            ):
                there = ", ".join(known) or "none"
                raise MisuseError(
                    f"{name}: no method has a stage {part}.stages.{stage}; here there are {there}, "
                    "and a new one says what it learns (learn: [...])"
                )
            del stages[stage]
    return layer


def _stages(layer: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the stages of a layer's part, {} if none; `validate` rejects malformed values."""
    held = layer.get(part)
    found = held.get("stages") if isinstance(held, dict) else None
    return found if isinstance(found, dict) else {}


def from_yaml(text: str) -> Preset:
    """Parse the preset that a run was saved with."""
    try:
        values = yaml.safe_load(text)
        data = values.get("data") if isinstance(values, dict) else None
        if isinstance(data, dict) and isinstance(data.get("holdout"), float):
            data["holdout"] = min(data["holdout"], MAX_HOLDOUT)  # which older versions allowed
        return validate(values)
    except (yaml.YAMLError, MisuseError) as error:
        raise TalkheadError(
            f"the run's preset.yaml is damaged or of another version ({error}); train the run "
            "again with --fresh"
        ) from error


def run_name(names: Sequence[str]) -> str:
    """Return the name of a run, made of its presets."""
    words = []
    for stem in (Path(name).stem for name in names):
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)
        words.append(word if word == stem else f"{word}-{digest(stem)[:6]}")
    return "+".join(words)


def validate(values: dict[str, Any]) -> Preset:
    """Build a Preset from values; MisuseError names the dotted path that is wrong."""
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known_keys(first["loc"][:-1])
            hint = f"; known there: {', '.join(known)}" if known else ""
            raise MisuseError(f"unknown preset key '{path}'{hint}") from error
        match first["loc"]:
            case (str(part), "stages", str(stage), *_) if first["type"] == "missing":
                stages = values[part]["stages"]
                there = [
                    n for n, held in stages.items() if isinstance(held, dict) and "learn" in held
                ]
                raise MisuseError(
                    f"unknown stage '{part}.stages.{stage}'; known there: {', '.join(there)} (one "
                    f"of your own needs '{path.rpartition('.')[2]}', too)"
                ) from error
        said = first["msg"].removeprefix("Value error, ")
        raise MisuseError(f"preset key '{path}': {said}" if path else said) from error


def differences(held: Preset, wanted: Preset, at_most: int = 3) -> str:
    """The first few keys in which two presets differ, as 'key=held, not wanted'."""
    sides = [dict(_leaves(p.model_dump(mode="json"))) for p in (held, wanted)]
    keys = [key for key in sides[0] | sides[1] if sides[0].get(key) != sides[1].get(key)]
    told = [f"{key}={sides[0].get(key)}, not {sides[1].get(key)}" for key in keys[:at_most]]
    return "; ".join(told) + (" ..." if len(keys) > at_most else "")


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def _known_keys(parents: tuple[int | str, ...]) -> list[str]:
    model: Any = Preset
    for part in parents:
        if model is Train and part == "stages":
            model = dict
        elif model is dict:
            model = Stage
        else:
            field = model.model_fields.get(str(part))
            kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
            model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_setting(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise MisuseError(f"'{setting}' is not key=value, for example -s data.size_px=256")
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
            value = float(value) if value.lower() not in ("nan", "inf", "-inf") else value
    except (ValueError, yaml.YAMLError):
        value = text
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)
