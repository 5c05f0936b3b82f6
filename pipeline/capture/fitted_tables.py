"""What is fitted to the first rows of a capture: principal axes of hidden states, frequencies of ids."""

import numpy as np

from pipeline.engines.engine import EngineInputs, TeacherEngine
from pipeline.engines.hidden_states import principal_components
from storage import hidden
from storage.spec import HiddenSpec

RANKED_TARGETS = 1024  # whose probabilities say which ids are frequent
BASIS_VECTORS = 8192  # hidden states that principal axes are those of


def fit_bases(spec: HiddenSpec, asked: EngineInputs, teaching: TeacherEngine) -> dict[str, hidden.Basis]:
    """The mean and the principal axes of each layer's states, from the first rows."""
    enough = BASIS_VECTORS
    if spec.pool == "none":
        enough = int(np.searchsorted(asked.tokens.offsets, BASIS_VECTORS))
    first = np.arange(min(enough, len(asked.row_ids)))
    said = teaching.answer(first).hidden
    return {name: principal_components(said[name], spec.kept_width(name)) for name in spec.component_names}
