"""Knowledge distillation from cached teachers, for your own training loop.

    import stillroom
    cache = stillroom.Cache.open("caches/reviews")       # needs no torch
    data = stillroom.CachedDataset("caches/reviews", "data/reviews", batch_size=64)
    loss = stillroom.DistillationLoss(alpha=0.5, temperature=2.0)
    params = stillroom.load_params()                     # the checked content of params.yaml

A name is imported when it is first used: `stillroom.Cache` never imports torch. docs/your-own-loop.md has
whole loops.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.load import load_params
    from pipeline.objectives.loss import DistillationLoss
    from pipeline.streaming.dataset import CachedDataset
    from storage.errors import StillroomError
    from storage.reader import Cache

__version__ = "0.1.0"
__all__ = ["Cache", "CachedDataset", "DistillationLoss", "StillroomError", "load_params"]

_MODULES = {
    "Cache": "storage.reader",
    "CachedDataset": "pipeline.streaming.dataset",
    "DistillationLoss": "pipeline.objectives.loss",
    "StillroomError": "storage.errors",
    "load_params": "pipeline.config.load",
}


def __getattr__(name: str) -> Any:
    """The object of this name, imported now. Raises AttributeError for a name that is not public."""
    if name not in _MODULES:
        raise AttributeError(f"module 'stillroom' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
