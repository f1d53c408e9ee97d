"""The self-check stops a float32 stage when the scorer computes another model than plain
transformers; each test plants one fault, in the code that scores and trains, and not in the check.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from schemas.errors import StageFailed
from stages.policy.attention import pack_rows
from stages.policy.batches import Batch, RowLayout, lay_out
from stages.policy.cpu import blocks
from stages.policy.model import load_model
from stages.scorers import transformers_scorer
from tests.stages.score.test_score import score
from tests.stages.scorers.encoded import Row, encoded_row
from tests.stages_running import stage_dir
from tests.tiny_architectures import SHORT_POSITIONS, make_tiny_architecture


def make_rows(num_pairs: int = 20) -> list[Row]:
    """Short pairs of different tokens, and one as long as encode allows."""
    rows = [
        encoded_row(
            f"{pair}-",
            [3 + pair, 40, 41],
            [50 + at for at in range(9)],
            [60 + at for at in range(12)],
        )
        for pair in range(num_pairs)
    ]
    long = encoded_row("long-", list(range(3, 91)), list(range(100, 138)), [7, 8])
    return [*rows, long]


def assert_caught(folder: Path, model: Path, *, how: str = "") -> None:
    """Assert that the stage names the model and how far its values are off, and commits none."""
    with pytest.raises(StageFailed, match=rf"transformers is off .* sequences of model{how},"):
        score(folder, [make_rows()], model)
    assert stage_dir(folder, "score").committed() == {}


def pack_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack rows, though a trial or a comparison with separate rows may speak against it."""

    def choose_packed(model: PreTrainedModel, *, max_length: int) -> RowLayout:
        assert pack_rows(model)
        return "packed"

    monkeypatch.setattr(transformers_scorer, "choose_rows", choose_packed)
    of_scorer = property(lambda self: self._best_rows)
    monkeypatch.setattr(transformers_scorer.TransformersScorer, "_rows", of_scorer)


@pytest.mark.parametrize(
    "architecture", ["phimoe", "phi3-longrope", "llama-dynamic", "mistral", "gemma3"]
)
def test_without_a_fault_scoring_goes_on(architecture: str, tmp_path: Path) -> None:
    model = make_tiny_architecture(tmp_path / "model", architecture)
    _, result = score(tmp_path, [make_rows()], model)
    assert result.summary["recomputed"]["num_sequences"] == 32
    assert result.summary["recomputed"]["token_max"] < 1e-4


def test_noise_that_inference_reads_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """phimoe's router masks experts by the rate of its noise."""

    def load_without_noise(
        path: str, *, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        model = load_model(path, dtype=dtype, device=device)
        for layer in model.model.layers:
            layer.mlp.router.router_jitter_noise = 0.0
        return model

    monkeypatch.setattr(transformers_scorer, "load_model", load_without_noise)
    model = make_tiny_architecture(tmp_path / "model", "phimoe")
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "router_jitter_noise": 0.5}))
    assert_caught(tmp_path, model)


@pytest.mark.parametrize(
    ("architecture", "how"),
    [("phi3-longrope", " when computed together in one batch"), ("llama-dynamic", "")],
)
def test_rope_depends_on_the_longest_row_of_the_batch(
    architecture: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shard, the short rows of the sample are only beside short ones, so that longrope shows
    in the batch with the longest alone. Dynamic rope also counts a last token that is not read."""
    monkeypatch.setattr(transformers_scorer, "choose_rows", lambda model, max_length: "separate")
    model = make_tiny_architecture(tmp_path / "model", architecture)
    assert SHORT_POSITIONS < 88 + 38
    assert_caught(tmp_path, model, how=how)


def test_packed_rows_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every completion also sees the row from its start."""

    def lay_out_without_spans(*args: object, **kwargs: object) -> Batch:
        batch = lay_out(*args, **kwargs)  # type: ignore[arg-type]
        assert batch.spans_C6 is not None
        batch.spans_C6[:, 4] = 0
        return batch

    monkeypatch.setattr(transformers_scorer, "lay_out", lay_out_without_spans)
    pack_always(monkeypatch)
    assert_caught(tmp_path, make_tiny_architecture(tmp_path / "model", "llama"))


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_a_sliding_window_of_packed_rows_is_off_by_one(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide = blocks._hide

    def hide_one_more(num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
        return hide(num_queries, num_keys, window and window - 1)

    monkeypatch.setattr(blocks, "_hide", hide_one_more)
    pack_always(monkeypatch)
    blocks._cut_blocks.cache_clear()
    assert_caught(tmp_path, make_tiny_architecture(tmp_path / "model", architecture))
    blocks._cut_blocks.cache_clear()


def test_a_sliding_window_of_the_loader_is_off_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_architecture(tmp_path / "model", "mistral")
    other = shutil.copytree(model, tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": 8', '"sliding_window": 7'))

    def load_other(path: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        return load_model(str(other), dtype=dtype, device=device)

    monkeypatch.setattr(transformers_scorer, "load_model", load_other)
    assert_caught(tmp_path, model)
