"""Which engine runs the teacher of a task."""

from pipeline.engines.classifier import ClassifierEngine
from pipeline.engines.engine import EngineInputs, TeacherEngine
from pipeline.engines.language_model import LanguageModelEngine
from storage.tasks import LANGUAGE


def engine_for(about: EngineInputs) -> TeacherEngine:
    """The one that fits the task."""
    return LanguageModelEngine(about) if about.spec.task in LANGUAGE else ClassifierEngine(about)
