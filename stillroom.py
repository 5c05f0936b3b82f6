"""Knowledge distillation from cached teachers, for your own training loop.

    import stillroom
    cache = stillroom.Cache.open("caches/reviews")          # needs no torch
    params = stillroom.load_params(Path("params.yaml"))     # the checked content of params.yaml

Each name is imported when it is first used: `stillroom.Cache` never imports torch. docs/your-own-loop.md has
whole loops.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.load import load_params
    from storage.errors import StillroomError
    from storage.reader import Cache

__version__ = "0.1.0"
__all__ = ["Cache", "StillroomError", "load_params"]

_HOMES = {
    "Cache": "storage.reader",
    "StillroomError": "storage.errors",
    "load_params": "pipeline.config.load",
}


def __getattr__(name: str) -> Any:
    """The object of this name, imported now. Raises AttributeError for a name that is not public."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stillroom' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
