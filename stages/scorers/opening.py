"""Open the scorer that the settings name, and the plain model that its values are checked with."""

from typing import TYPE_CHECKING

from stages.scorers.protocol import Scorer, ScorerSettings

if TYPE_CHECKING:
    from stages.scorers.plain import PlainModel


def open_scorer(model_path: str, settings: ScorerSettings) -> Scorer:
    """Load a Hugging Face folder into a backend; the other backend is not imported."""
    if settings.backend == "vllm":
        from stages.scorers.vllm_scorer import VllmScorer

        return VllmScorer(model_path, settings)
    from stages.scorers.transformers_scorer import TransformersScorer

    return TransformersScorer(model_path, settings)


def open_plain(model_path: str, *, num_threads: int) -> "PlainModel":
    """Open a Hugging Face folder for plain transformers, which loads it when it is needed."""
    from stages.scorers.plain import PlainModel

    return PlainModel(path=model_path, num_threads=num_threads)
