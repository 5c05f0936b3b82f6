"""Reads params.yaml: every error in one message, each with its place and the nearest known name."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config.base import describe_errors, did_you_mean
from pipeline.config.checks import CHECKS, known_names, references
from pipeline.config.params import PARAMS, Params
from storage.errors import ConfigError

Entry = TypeVar("Entry")


def load_params(path: Path = PARAMS) -> Params:
    """The checked content of params.yaml.

    Raises ConfigError with every fault: of single fields first, then unknown names, then entries that do not
    fit each other, because each of the three needs the one before.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no {path} here: run this from the project's root, or copy the one in the README."
        )
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML:\n{error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is a {type(raw).__name__}, expected sections like datasets: and runs:")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        found = "\n".join(f"  {fault}" for fault in describe_errors(error, Params))
        raise ConfigError(f"{path} cannot be used:\n{found}") from None
    unknown = [
        f"  {r.field}: no {r.name!r} in {r.sections}{did_you_mean(r.name, known_names(params, r))}"
        for r in references(params)
        if r.name not in known_names(params, r)
    ]
    if unknown:
        raise ConfigError(f"{path} refers to entries that do not exist:\n" + "\n".join(unknown))
    if inconsistencies := [f"  {line}" for check in CHECKS for line in check(params)]:
        raise ConfigError(f"{path} has entries that do not fit each other:\n" + "\n".join(inconsistencies))
    return params


def pick_entry(section: Mapping[str, Entry], kind: str, name: str) -> Entry:
    """The entry `name` of a section. Raises ConfigError with the nearest name."""
    if name not in section:
        raise ConfigError(f"no {name!r} in {kind} of {PARAMS}{did_you_mean(name, section)}")
    return section[name]
