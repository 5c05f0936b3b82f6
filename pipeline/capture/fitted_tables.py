"""Tables that are fitted to a teacher's outputs on the first rows: frequent ids, principal axes.

They are fitted once, by the first capture of an identity, and kept in the store under that identity: every
later capture and every worker finds them there. Their fingerprints are part of the cache's identity
(identity.with_tables).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.engines.engine import EngineInputs, TeacherEngine
from pipeline.engines.hidden_states import principal_components
from pipeline.engines.inference import Indices
from storage import compact, hidden
from storage.fingerprints import Sha256, sha256_json
from storage.spec import HiddenSpec, Identity, Spec
from storage.writer import Store

RANKED_TARGETS = 1024  # targets whose probabilities rank the ids
BASIS_VECTORS = 8192  # hidden states that principal axes are fitted to


class FittedTables(NamedTuple):
    """The tables of an identity; empty where its spec needs none."""

    ranks: Indices | None  # of a compact layout: the ids, most frequent first
    basis: Path | None  # the directory of the principal axes of hidden states
    bases: Mapping[str, hidden.Basis]  # its content, by name of hidden state

    @property
    def ranks_fingerprint(self) -> Sha256 | None:
        """What the spec's codec names."""
        return None if self.ranks is None else sha256_json(self.ranks.tolist())

    @property
    def basis_fingerprint(self) -> Sha256 | None:
        """What the spec's hidden states name."""
        return hidden.fingerprint(self.bases) if self.bases else None


def find_tables(store: Store, bare: Identity) -> FittedTables:
    """The tables that are kept in the store under this identity."""
    return _tables(
        bare.spec,
        store.ranks(bare) if bare.spec.ranked else None,
        store.basis(bare) if _needs_basis(bare.spec) else None,
    )


def fit_tables(store: Store, bare: Identity, inputs: EngineInputs, engine: TeacherEngine) -> FittedTables:
    """The same; a table that is missing is fitted with the teacher, and kept."""
    found = find_tables(store, bare)
    ranks, basis = found.ranks, found.basis
    if ranks is None and bare.spec.ranked:
        ranks = store.keep_ranks(bare, compact.rank_by(engine.probability_mass(RANKED_TARGETS)))
    if basis is None and _needs_basis(bare.spec):
        assert bare.spec.hidden is not None
        basis = store.keep_basis(bare, _fit_bases(bare.spec.hidden, inputs, engine))
    return _tables(bare.spec, ranks, basis)


def _needs_basis(spec: Spec) -> bool:
    return spec.hidden is not None and spec.hidden.pca is not None


def _tables(spec: Spec, ranks: Indices | None, basis: Path | None) -> FittedTables:
    if basis is None or spec.hidden is None:
        return FittedTables(ranks, None, {})
    return FittedTables(ranks, basis, hidden.read_bases(basis, spec.hidden))


def _fit_bases(spec: HiddenSpec, inputs: EngineInputs, engine: TeacherEngine) -> dict[str, hidden.Basis]:
    """The mean and the principal axes of each layer's states, from the first rows."""
    enough = BASIS_VECTORS
    if spec.pool == "none":
        enough = int(np.searchsorted(inputs.tokens.offsets, BASIS_VECTORS))
    first = np.arange(min(enough, len(inputs.row_ids)))
    states = engine.answer(first).hidden
    return {name: principal_components(states[name], spec.kept_width(name)) for name in spec.component_names}
