"""Which engine runs the teacher of a task: the table of engines by kind."""

from pipeline.config.tasks import TASKS, Engine
from pipeline.engines.classifier import RowEngine, TokenEngine
from pipeline.engines.engine import EngineInputs, TeacherEngine, check_capabilities
from pipeline.engines.language_model import LanguageModelEngine
from storage.spec import Spec

# By the field `engine` of a task's row.
ENGINES: dict[Engine, type[TeacherEngine]] = {
    "rows": RowEngine,
    "tokens": TokenEngine,
    "language_model": LanguageModelEngine,
}


def engine_class(spec: Spec) -> type[TeacherEngine]:
    """The class of the engine that makes a cache of this spec.

    Raises TeacherError where the spec needs more than the class states that it can give.
    """
    kind = TASKS[spec.task].engine
    check_capabilities(kind, ENGINES[kind].capabilities, spec)
    return ENGINES[kind]


def engine_for(inputs: EngineInputs) -> TeacherEngine:
    """The engine for these rows; its teacher is not loaded yet. Raises TeacherError as `engine_class`."""
    return engine_class(inputs.spec)(inputs)
