"""Open the scorer that the settings name."""

from stages.scorers.protocol import Scorer, ScorerSettings


def open_scorer(model_path: str, settings: ScorerSettings) -> Scorer:
    """Load a Hugging Face folder into a backend; the other backend is not imported."""
    if settings.backend == "vllm":
        from stages.scorers.vllm_scorer import VllmScorer

        return VllmScorer(model_path, settings)
    from stages.scorers.transformers_scorer import TransformersScorer

    return TransformersScorer(model_path, settings)
