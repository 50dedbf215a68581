"""Settings from YAML files and command lines: their names, in any spelling, and their types."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sp_fast.errors import TrainingError
from sp_fast.training.official_flags import WORDS, translate
from sp_fast.training.recipe import HELP, STAGES, Recipe

RECIPES = Path(__file__).parent / "recipes"
_TYPES = typing.get_type_hints(Recipe)
_OF_FINETUNE = ("lora_rank", "lora_alpha", "projector_learning_rate")
# Where the command line has one, the file's other is not meant.
_INSTEAD = {"gradient_accumulation_steps": "global_batch_size", "global_batch_size": "gradient_accumulation_steps"}


def read_recipe(
    stage: str, config: str | None, overrides: Mapping[str, Any], unused: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """A stage's recipe: its file, and above it what was said on the command line.

    Args:
        config: a file, or the name of one of ``RECIPES``; None: the stage's published one.
        overrides: as ``read_options`` gives them.
        unused: of settings that a recipe has to have, those that nobody will look at.

    Raises:
        TrainingError: an unknown setting or a value of a wrong kind, named with where it stands.
    """
    if stage not in STAGES:
        raise TrainingError(f"{stage!r} is no stage: choose {' or '.join(STAGES)}")
    path = _recipe_file(config or stage)
    said = settings(stage, overrides, "the command line")
    not_meant = {_INSTEAD[name] for name in said if name in _INSTEAD}
    values = {k: v for k, v in settings(stage, _read_yaml(path), str(path)).items() if k not in not_meant} | said
    values = {**unused, **values}
    if missing := [one for one in ("output", "data") if one not in values]:
        raise TrainingError(f"{' and '.join(missing)} must be given: --{missing[0]} PATH, or a line of {path}")
    if stage == "pretrain" and (alien := [one for one in _OF_FINETUNE if values.get(one) is not None]):
        raise TrainingError(f"{alien[0]} belongs to finetune, and this is pretrain: leave it out")
    return Recipe(**values)


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """``--name value``, ``--name=value``, ``--name a b`` and ``--name`` alone (true), in any spelling of ``name``."""
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word.removeprefix("--").partition("=")
            if name in found:
                raise TrainingError(f"--{name} is given twice")
            found[name] = [value] if has_value else []
        elif name is None:
            raise TrainingError(f"{word!r} stands before any option: give --name value")
        else:
            found[name].append(word)
    return {name: values[0] if len(values) == 1 else values or True for name, values in found.items()}


def published(stage: str) -> Mapping[str, Any]:
    """What the stage's shipped recipe says."""
    return _read_yaml(RECIPES / f"{stage}.yaml")


def _recipe_file(config: str) -> Path:
    for path in (Path(config), RECIPES / f"{config}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise TrainingError(f"--config {config} is no file, and none of the recipes {shipped}")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise TrainingError(f"{path} must hold settings, a line each: name: value")
    return values


def settings(stage: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """By our names, in our types; names of the official scripts are translated."""
    found: dict[str, Any] = {}
    for said, value in given.items():
        name = str(said).replace("-", "_")
        for ours, translated in translate(stage, name, value) if name not in HELP else [(name, value)]:
            if ours not in HELP:
                near = difflib.get_close_matches(ours, HELP, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise TrainingError(f"{where} has {said}, which is no setting of a recipe{hint}")
            if ours in found:
                raise TrainingError(f"{where} sets {ours} twice, the second time as {said}: leave one out")
            found[ours] = _converted(ours, translated, where)
    return found


def _converted(name: str, value: Any, where: str) -> Any:
    kinds = typing.get_args(_TYPES[name]) if isinstance(_TYPES[name], types.UnionType) else (_TYPES[name],)
    if value is None or (value == "null" and type(None) in kinds):
        if type(None) in kinds:
            return None
        raise TrainingError(f"{where} has no value for {name}")
    kinds = [one for one in kinds if one is not type(None)]
    for kind in kinds:
        with suppress(TypeError, ValueError, KeyError, OverflowError):
            return _CONVERTERS.get(kind, _one_of(kind))(value)
    expected = " or ".join(str(_KINDS.get(kind, kind)) for kind in kinds)
    raise TrainingError(f"{where} has {name}={value!r} where {expected} is expected")


def _bool(value: Any) -> bool:
    return WORDS[str(value).lower()]


def _int(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)  # YAML reads 1e-3 as text


def _str(value: Any) -> str:
    if not isinstance(value, (str, Path)) or not str(value):
        raise TypeError
    return str(value)


def _paths(value: Any) -> tuple[Path, ...]:
    return tuple(Path(_str(one)) for one in (value if isinstance(value, (list, tuple)) else [value]))


def _fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {_str(name): one for name, one in value.items()}


def _one_of(kind: Any) -> Any:
    def convert(value: Any) -> Any:
        if value not in typing.get_args(kind):
            raise ValueError
        return value

    return convert


_CONVERTERS = {
    bool: _bool, int: _int, float: _float, str: _str, Path: lambda value: Path(_str(value)), tuple[Path, ...]: _paths,
    dict[str, Any]: _fields,
}  # fmt: skip
_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path",
    tuple[Path, ...]: "paths", dict[str, Any]: "fields with their values",
}  # fmt: skip
