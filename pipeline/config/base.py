"""What every section of params.yaml is made of, and how errors in one are described."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values; ValueError where one stands there twice."""
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return values


class Section(BaseModel):
    """A part of params.yaml: frozen, no unknown key, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to append to an error about an unknown name: the nearest known one, else all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def describe_errors(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One line for each fault of an input that was to be a `root`."""
    for fault in error.errors():
        unknown = fault["type"] == "extra_forbidden"
        parts, section = _place(fault["loc"][:-1] if unknown else fault["loc"], root)
        where = ".".join(str(part) for part in parts)
        if unknown:
            key = str(fault["loc"][-1])
            known = did_you_mean(key, _keys(section)) if section else ""
            yield f"{where}.{key}".lstrip(".") + f": unknown key{known}"
        elif fault["type"] in ("literal_error", "union_tag_invalid"):
            wanted = str(fault["ctx"].get("expected") or fault["ctx"].get("expected_tags"))
            found = fault["input"]
            if isinstance(found, dict):
                found = found.get(str(fault["ctx"].get("discriminator", "kind")).strip("'"))
            options = [option.strip(" '\"") for option in wanted.replace(" or ", ", ").split(",")]
            yield f"{where}: found {found!r}, expected {wanted}{did_you_mean(str(found), options)}"
        else:
            told = fault["type"] != "missing" and not isinstance(fault["input"], dict)
            found = f" (found {fault['input']!r})" if told else ""
            yield f"{where}: {fault['msg'].removeprefix('Value error, ')}{found}"


def _place(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[list[int | str], type[BaseModel] | None]:
    """What people know of pydantic's `loc` (names and positions, no branches of unions); the model there."""
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
            continue  # a branch of a union: pydantic's word, not the person's
        shown.append(part)
    return shown, next(_models(current), None)


def _keys(section: type[BaseModel]) -> dict[str, Any]:
    """The fields of a section by the names that people write: `from` is no name for Python."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


Layers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False), AfterValidator(distinct)
]
