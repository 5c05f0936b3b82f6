"""The base of all sections of params.yaml, and the description of what pydantic finds wrong in one."""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from storage.fields import MAX_LABELS, EntryName, LayerNumber, Seed

Name = EntryName
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values. Raises ValueError where one is listed twice."""
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


class Section(BaseModel):
    """A part of params.yaml: frozen; unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known name, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def describe_errors(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One line for each fault that pydantic found in the input of `root`: its place, found, expected."""
    for fault in error.errors():
        unknown = fault["type"] == "extra_forbidden"
        parts, section = _place(fault["loc"][:-1] if unknown else fault["loc"], root)
        where = ".".join(str(part) for part in parts)
        if unknown:
            key = str(fault["loc"][-1])
            known = did_you_mean(key, _keys(section)) if section else ""
            yield f"{where}.{key}".lstrip(".") + f": unknown key{known}"
        elif fault["type"] in ("literal_error", "union_tag_invalid"):
            expected = str(fault["ctx"].get("expected") or fault["ctx"].get("expected_tags"))
            found = fault["input"]
            if isinstance(found, dict):
                found = found.get(str(fault["ctx"].get("discriminator", "kind")).strip("'"))
            options = [option.strip(" '\"") for option in expected.replace(" or ", ", ").split(",")]
            yield f"{where}: found {found!r}, expected {expected}{did_you_mean(str(found), options)}"
        else:
            shown = fault["type"] != "missing" and not isinstance(fault["input"], dict)
            found = f" (found {fault['input']!r})" if shown else ""
            yield f"{where}: {fault['msg'].removeprefix('Value error, ')}{found}"


def _place(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[list[int | str], type[BaseModel] | None]:
    """(pydantic's `loc` without the branches of unions: they are not in params.yaml; the section there)."""
    current: Any = root
    shown: list[int | str] = []
    for part in loc:
        models = list(_models(current))
        named = [_keys(m)[str(part)].annotation for m in models if part in _keys(m)]
        branch: Any = Literal[part]
        tagged = [m for m in models if any(f.annotation == branch for f in m.model_fields.values())]
        if getattr(current, "__origin__", None) is dict:
            current = current.__args__[1]
        elif named:
            current = named[0]
        elif isinstance(part, str):
            current = (tagged or [current])[0]
            continue  # the name of a branch of a union
        shown.append(part)
    return shown, next(_models(current), None)


def _keys(section: type[BaseModel]) -> dict[str, Any]:
    """The fields of a section by the names in params.yaml: `from` cannot be the name of a field in Python."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


# Numbers of a teacher's layers.
Layers = Annotated[tuple[LayerNumber, ...], Field(min_length=1, strict=False), AfterValidator(distinct)]
LabelNames = Annotated[tuple[str, ...], Field(max_length=MAX_LABELS, strict=False), AfterValidator(distinct)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, strict=False), AfterValidator(distinct)]
