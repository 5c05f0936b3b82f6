"""Which engine runs the teacher of a task."""

from pipeline.config.tasks import TASKS
from pipeline.engines.classifier import ClassifierEngine
from pipeline.engines.engine import EngineInputs, TeacherEngine
from pipeline.engines.language_model import LanguageModelEngine


def engine_for(about: EngineInputs) -> TeacherEngine:
    """The one that fits the task."""
    kind = TASKS[about.spec.task].engine
    return LanguageModelEngine(about) if kind == "language_model" else ClassifierEngine(about)
