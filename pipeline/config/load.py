"""Reads params.yaml: every error in one message, each with its place and the nearest known name."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config.base import describe_errors, did_you_mean
from pipeline.config.checks import (
    broken_chains,
    circular_mixtures,
    known_names,
    multitask_inconsistencies,
    references,
    teacher_inconsistencies,
)
from pipeline.config.params import PARAMS, Params
from storage.errors import ConfigError

Entry = TypeVar("Entry")


def load_params(path: Path = PARAMS) -> Params:
    """The checked content of params.yaml. Raises ConfigError with every fault in it."""
    if not path.is_file():
        raise ConfigError(
            f"there is no {path} here: run this from the project's root, or copy the one in the README."
        )
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML:\n{error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected names like datasets: and runs:")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        found = "\n".join(f"  {fault}" for fault in describe_errors(error, Params))
        raise ConfigError(f"{path} cannot be used:\n{found}") from None
    if unknown := [r for r in references(params) if r.name not in known_names(params, r)]:
        lines = [
            f"  {r.field}: no {r.name!r} in {r.shelf}{did_you_mean(r.name, known_names(params, r))}"
            for r in unknown
        ]
        raise ConfigError(f"{path} names things that are not on the shelf:\n" + "\n".join(lines))
    if twice := sorted({*params.datasets} & {*params.augmented}):
        raise ConfigError(
            f"{path}: {twice[0]!r} stands in datasets and in augmented: both would be data/{twice[0]}.\n"
            "Give one of them another name."
        )
    if twice := sorted({*params.received} & {*params.caches, *params.mixtures}):
        raise ConfigError(
            f"{path}: {twice[0]!r} stands in received and in caches or mixtures: both would be "
            f"caches/{twice[0]}.\nGive one of them another name."
        )
    if broken := list(broken_chains(params)):
        raise ConfigError(f"{path} chains runs that do not fit:\n  " + "\n  ".join(broken))
    if circular := list(circular_mixtures(params)):
        raise ConfigError(f"{path} mixes caches that cannot be mixed:\n  " + "\n  ".join(circular))
    if unfit := list(multitask_inconsistencies(params)):
        raise ConfigError(f"{path} trains tasks together that do not fit:\n  " + "\n  ".join(unfit))
    if wrong := list(teacher_inconsistencies(params)):
        raise ConfigError(f"{path} asks teachers for what they cannot give:\n  " + "\n  ".join(wrong))
    return params


def pick_entry(shelf: Mapping[str, Entry], kind: str, name: str) -> Entry:
    """The entry called `name`. Raises ConfigError that names the nearest one."""
    if name not in shelf:
        raise ConfigError(f"no {name!r} in {kind} of {PARAMS}{did_you_mean(name, shelf)}")
    return shelf[name]
