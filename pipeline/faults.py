"""What pydantic found wrong with an input, for the person who wrote it: place, found, expected, nearest."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ValidationError


def nearest(name: str, known: Iterable[str]) -> str:
    """What to append to an error about an unknown name: the nearest known one, else all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def faults(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One line for each fault of an input that was to be a `root`."""
    for fault in error.errors():
        unknown = fault["type"] == "extra_forbidden"
        parts, section = _place(fault["loc"][:-1] if unknown else fault["loc"], root)
        where = ".".join(str(part) for part in parts)
        if unknown:
            key = str(fault["loc"][-1])
            known = nearest(key, _keys(section)) if section else ""
            yield f"{where}.{key}".lstrip(".") + f": unknown key{known}"
        elif fault["type"] in ("literal_error", "union_tag_invalid"):
            wanted = str(fault["ctx"].get("expected") or fault["ctx"].get("expected_tags"))
            found = fault["input"]
            if isinstance(found, dict):
                found = found.get(str(fault["ctx"].get("discriminator", "kind")).strip("'"))
            options = [option.strip(" '\"") for option in wanted.replace(" or ", ", ").split(",")]
            yield f"{where}: found {found!r}, expected {wanted}{nearest(str(found), options)}"
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
