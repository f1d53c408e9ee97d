"""Values that the score stage writes, and values that it refuses."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import stages.score.worker
from schemas.errors import ConfigError, StageFailed
from schemas.manifest import Counts, ShardRecord
from schemas.rows import SCORE
from stages.models.resolve import pin_model
from stages.policy.groups import Group, IntArray
from stages.score import run
from stages.score.checks import WorkerCheck
from stages.score.config import ScoreConfig, ScoreExecution
from stages.score.progress import PartDone, read_parts, report_part
from stages.score.rows import count_outliers
from stages.score.summary import Pace
from stages.scorers import vllm_scorer
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import SequenceGroup, SequenceLogps, score_sequences
from stages.scorers.protocol import (
    PROMPTS_AT_ONCE,
    Backend,
    FloatArray,
    Scorer,
    ScorerSettings,
    ScoreStatistics,
)
from stages.stage import AlignedShards, MakeWorker, Resources, StageResult
from stages.store.shards import StageDir, StageOutput
from tests.stages.scorers.encoded import MAX_LENGTH, Row, encoded_row, random_rows, write_encoded
from tests.stages.scorers.oracle import plain_logps
from tests.stages_running import make_context, read_rows, stage_dir
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

PROMPT, LONG, SHORT = [5, 6, 7, 8], [9, 10, 11, 12], [9, 13]


def score(
    folder: Path,
    shards: Sequence[Sequence[Row]],
    model: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **context: Any,
) -> tuple[StageDir, StageResult]:
    """Write rows as encode would, in these shards, and run the stage over them."""
    encoded = write_encoded(folder, shards)
    out = stage_dir(folder, "score")
    return out, score_encoded(encoded, out, model, dtype=dtype, **context)


def score_encoded(
    encoded: StageOutput,
    out: StageDir,
    model: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    backend: Backend = "transformers",
    **context: Any,
) -> StageResult:
    config = ScoreConfig(model=str(model), backend=backend, dtype=dtype)
    made = make_context(
        out,
        {"encode": encoded},
        pins={"model": pin_model(str(model))},
        execution=ScoreExecution(max_tokens_per_batch=256),
    )
    return run(config, dataclasses.replace(made, **context))


def wanted_logps(model: Path, row: Row) -> tuple[Any, Any]:
    """Token log-probs of both sides from a plain forward pass."""
    completions = [np.array(row[f"{side}_ids"], np.int32) for side in ("chosen", "rejected")]
    prompt_ids = np.array(row["prompt_ids"], np.int32)
    [[chosen, rejected]] = plain_logps(
        model, [Group(prompt_ids=prompt_ids, completions=tuple(completions))]
    )
    return chosen, rejected


def test_a_model_that_knows_nothing_gives_each_token_one_in_320(tmp_path: Path) -> None:
    """Row snapshot. The embeddings, tied to the output layer, are zero: all logits are equal."""
    model = make_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    row = encoded_row("a", PROMPT, LONG, SHORT, chosen_loss_mask=[True, False, False, True])
    out, _ = score(tmp_path, [[row]], model)
    [found] = read_rows(out)
    token_logp = float(np.float32(-math.log(VOCAB_SIZE)))
    assert found == {
        "pair_id": row["pair_id"],
        "prompt_id": row["prompt_id"],
        "chosen_sequence_id": row["chosen_sequence_id"],
        "rejected_sequence_id": row["rejected_sequence_id"],
        "ref_chosen_token_logps": pytest.approx([token_logp] * 4, abs=1e-6),
        "ref_rejected_token_logps": pytest.approx([token_logp] * 2, abs=1e-6),
        "ref_chosen_logp": pytest.approx(2 * token_logp, abs=1e-6),
        "ref_rejected_logp": pytest.approx(2 * token_logp, abs=1e-6),
        "num_chosen_tokens": 4,
        "num_rejected_tokens": 2,
    }
    assert list(found) == SCORE.arrow.names


def test_values_are_those_of_a_plain_forward(tmp_path: Path, tiny_model: Path) -> None:
    rows = random_rows(1, 6)
    out, result = score(tmp_path, [rows[:4], [], rows[4:]], tiny_model)
    found = read_rows(out)
    assert [row["pair_id"] for row in found] == [row["pair_id"] for row in rows]
    for row, scored in zip(rows, found, strict=True):
        for side, wanted in zip(("chosen", "rejected"), wanted_logps(tiny_model, row), strict=True):
            values = np.array(scored[f"ref_{side}_token_logps"], np.float32)
            assert np.abs(values - wanted).max() < 1e-4
            assert scored[f"ref_{side}_logp"] == pytest.approx(
                math.fsum(values.tolist()), abs=1e-12
            )
    assert result.summary["num_sequences"] == result.summary["num_sequences_scored"] == 12
    assert result.summary["pairs_per_second"] > 0


def test_equal_sequences_are_scored_once(tmp_path: Path, tiny_model: Path) -> None:
    """Six sides, five sequences: a truncated prompt counts as another prompt, despite its
    prompt_id."""
    rows = [encoded_row("a", PROMPT, LONG, SHORT), encoded_row("b", PROMPT, SHORT, [14])]
    other = encoded_row("c", PROMPT[1:], LONG, SHORT)
    out, result = score(tmp_path, [[*rows, other]], tiny_model)
    a, b, c = read_rows(out)
    assert result.summary["num_sequences_scored"] == 5
    assert result.summary["num_tokens_submitted"] == (8 + 6 + 5) + (7 + 5)
    assert a["ref_rejected_token_logps"] == b["ref_chosen_token_logps"]
    for row, scored in zip([*rows, other], [a, b, c], strict=True):
        chosen, rejected = wanted_logps(tiny_model, row)
        assert np.abs(np.array(scored["ref_chosen_token_logps"]) - chosen).max() < 1e-4
        assert np.abs(np.array(scored["ref_rejected_token_logps"]) - rejected).max() < 1e-4


def test_a_long_shard_reports_its_progress(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five prompts, two in a call: progress is reported after the second and the fourth. By the
    first report the four sequences of two pairs have been submitted."""
    rows = random_rows(1, 5)
    whole, _ = score(tmp_path / "whole", [rows], tiny_model)
    notes: list[PartDone] = []

    def report(out: StageDir, index: int, part: PartDone) -> None:
        report_part(out, index, part)
        notes.extend(read_parts(out.folder))

    monkeypatch.setitem(PROMPTS_AT_ONCE, "cpu", 2)
    monkeypatch.setattr(stages.score.worker, "report_part", report)
    out, result = score(tmp_path / "sliced", [rows], tiny_model)
    said = [(note.num_pairs_done, note.num_pairs_scored, note.num_pairs) for note in notes]
    assert said == [(2, 2, 5), (4, 4, 5)]
    assert notes[0].statistics.num_tokens_submitted == sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows[:2]
    )
    assert read_parts(out.folder) == []
    assert result.summary["num_sequences_scored"] == 10
    for one, other in zip(read_rows(whole), read_rows(out), strict=True):
        assert one["ref_chosen_token_logps"] == pytest.approx(
            other["ref_chosen_token_logps"], abs=1e-5
        )


class FreshWorkers:
    """A mapper that starts a new worker for each shard, the last shard first."""

    def map(
        self,
        make_worker: MakeWorker[AlignedShards],
        tasks: Sequence[AlignedShards],
        resources: Resources,
        on_done: Callable[[ShardRecord], None],
    ) -> None:
        for task in reversed(tasks):
            on_done(make_worker()(task))


def test_bytes_do_not_depend_on_workers_or_interruptions(tmp_path: Path, tiny_model: Path) -> None:
    shards = [random_rows(seed, 5) for seed in (1, 2, 3)]
    encoded = write_encoded(tmp_path, shards)
    outs = [stage_dir(tmp_path / name, "score") for name in ("one", "three", "resumed")]
    score_encoded(encoded, outs[0], tiny_model)
    score_encoded(encoded, outs[1], tiny_model, mapper=FreshWorkers())
    score_encoded(encoded, outs[2], tiny_model)
    outs[2].folder.delete_file("_commits/part-00001.json")
    score_encoded(encoded, outs[2], tiny_model)
    hashes = [
        [record.files[role].sha256 for record in out.committed().values() for role in record.files]
        for out in outs
    ]
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(set(hashes[0])) == 3 + 3


def test_footers_name_the_reference(tmp_path: Path, tiny_model: Path) -> None:
    """The dtype is part of the reference; equal settings give the same one."""
    rows = random_rows(1, 1)
    fingerprints = []
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16", "float32")
    for place, dtype in enumerate(dtypes):
        out, result = score(tmp_path / str(place), [rows], tiny_model, dtype=dtype)
        footer = pq.read_metadata(out.folder.file(result.shards[0].files["data"].name)).metadata
        assert footer[b"dpo.reference"].decode() == result.summary["reference"]
        fingerprints.append(result.summary["reference"])
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


class AlteredScorer:
    """The real scorer, with altered results."""

    def __init__(
        self, real: Scorer, alter: Callable[[int, IntArray, FloatArray], FloatArray]
    ) -> None:
        self._real = real
        self.shares_prompts = True
        self._alter = alter
        self._num_calls = 0

    @property
    def statistics(self) -> ScoreStatistics:
        return self._real.statistics

    def score(
        self, groups: Sequence[Group], *, in_one_batch: bool = False
    ) -> list[tuple[FloatArray, ...]]:
        self._num_calls += 1
        return [
            tuple(
                self._alter(self._num_calls, ids, values)
                for ids, values in zip(group.completions, arrays, strict=True)
            )
            for group, arrays in zip(
                groups, self._real.score(groups, in_one_batch=in_one_batch), strict=True
            )
        ]

    def generate(self, prompts: Sequence[IntArray], *, max_new_tokens: int) -> list[IntArray]:
        return self._real.generate(prompts, max_new_tokens=max_new_tokens)

    def close(self) -> None:
        self._real.close()


def alter_engine(
    monkeypatch: pytest.MonkeyPatch,
    alter: Callable[[int, IntArray, FloatArray], FloatArray],
    altered: type[AlteredScorer] = AlteredScorer,
) -> None:
    """Alter the results of the engine."""

    def open_altered(model_path: str, settings: ScorerSettings) -> Scorer:
        return altered(open_scorer(model_path, settings), alter)

    monkeypatch.setattr(stages.score.worker, "open_scorer", open_altered)


def test_an_engine_that_fails_costs_one_shard(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard opens an engine that breaks on the second shard. The third shard opens one
    again."""
    opened: list[ScorerSettings] = []

    def open_noted(model_path: str, settings: ScorerSettings) -> Scorer:
        opened.append(settings)
        return open_scorer(model_path, settings)

    def score_or_break(scorer: Scorer, groups: Sequence[SequenceGroup]) -> SequenceLogps:
        if groups[0].sequence_ids[0] == broken:
            raise RuntimeError("lost")
        return score_sequences(scorer, groups)

    shards = [random_rows(seed, 2) for seed in (1, 2, 3)]
    broken = shards[1][0]["chosen_sequence_id"]
    monkeypatch.setattr(stages.score.worker, "open_scorer", open_noted)
    monkeypatch.setattr(stages.score.worker, "score_sequences", score_or_break)
    with pytest.raises(StageFailed, match=r"1 of 3 shards failed(.|\n)*RuntimeError: lost"):
        score(tmp_path, shards, tiny_model)
    assert set(stage_dir(tmp_path, "score").committed()) == {0, 2}
    assert len(opened) == 2


def test_answers_that_are_next_to_impossible_are_counted() -> None:
    """Means of -15, -15.5 and -1, and of -1, -1 and -20 nats a token: the last two have one."""
    rows = pa.table(
        {
            "ref_chosen_logp": [-30.0, -31.0, -2.0],
            "num_chosen_tokens": pa.array([2, 2, 2], pa.int32()),
            "ref_rejected_logp": [-1.0, -1.0, -20.0],
            "num_rejected_tokens": pa.array([1, 1, 1], pa.int32()),
        }
    )
    assert count_outliers(rows) == {"REF_OUTLIER": 2}
    assert count_outliers(rows.slice(0, 1)) == {}
    assert count_outliers(rows.slice(0, 0)) == {}


FAULTS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "REF_NONFINITE": lambda values: np.where(np.arange(len(values)) == 1, np.nan, values),
    "REF_LENGTH": lambda values: values[1:],
    "REF_POSITIVE": lambda values: -values,
}


@pytest.mark.parametrize("code", FAULTS)
def test_impossible_values_reject_their_pairs(
    code: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b's chosen side is a's rejected side, which always fails."""

    def alter(call: int, ids: IntArray, values: FloatArray) -> FloatArray:
        return FAULTS[code](values) if ids.tolist() == SHORT else values

    alter_engine(monkeypatch, alter)
    rows = [
        encoded_row("a", PROMPT, LONG, SHORT),
        encoded_row("b", PROMPT, SHORT, [14]),
        encoded_row("c", PROMPT, LONG, [14]),
    ]
    out, result = score(tmp_path, [rows], tiny_model)
    assert [row["pair_id"][0] for row in read_rows(out)] == ["c"]
    rejected = read_rows(out, "rejected")
    assert [(row["pair_id"][0], row["code"], row["field"]) for row in rejected] == [
        ("a", code, "rejected_ids"),
        ("b", code, "chosen_ids"),
    ]
    assert result.shards[0].counts.reasons == {code: 2}
    assert (result.shards[0].counts.num_in, result.shards[0].counts.num_out) == (3, 1)


def test_a_sequence_that_fails_once_is_scored_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three calls belong to the checks: short beside long, then with and without sharing."""

    def alter(call: int, ids: IntArray, values: FloatArray) -> FloatArray:
        return values * np.nan if call == 4 and ids.tolist() == SHORT else values

    alter_engine(monkeypatch, alter)
    row = encoded_row("a", PROMPT, LONG, SHORT)
    out, _ = score(tmp_path, [[row]], tiny_model)
    [found] = read_rows(out)
    _, rejected = wanted_logps(tiny_model, row)
    assert np.abs(np.array(found["ref_rejected_token_logps"]) - rejected).max() < 1e-4


def test_a_float32_engine_that_computes_something_else_is_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alter_engine(monkeypatch, lambda call, ids, values: values - np.float32(0.002))
    with pytest.raises(StageFailed, match=r"off by up to 0\.00\d+ nats a token") as caught:
        score(tmp_path, [random_rows(1, 2)], tiny_model)
    assert f"in 4 of 4 sequences of {tiny_model.name}," in str(caught.value)
    assert stage_dir(tmp_path, "score").committed() == {}


def test_lower_precision_is_recorded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a nat is added to every token of both sides, on top of the rounding of bfloat16."""
    alter_engine(monkeypatch, lambda call, ids, values: values - np.float32(0.5))
    row = encoded_row("a", PROMPT, LONG, SHORT)
    out, result = score(tmp_path, [[row]], tiny_model, dtype="bfloat16")
    recomputed = result.summary["recomputed"]
    assert recomputed["num_sequences"] == 2
    assert recomputed["num_tokens"] == 6
    assert recomputed["token_median"] == pytest.approx(0.5, abs=0.1)
    assert recomputed["sequence_max"] == pytest.approx(2.0, abs=0.2)
    [check] = result.files
    content = out.folder.read_bytes(check.name)
    of_worker = msgspec.json.decode(content, type=WorkerCheck)
    assert msgspec.structs.asdict(of_worker.recomputed) == recomputed


class SharingScorer(AlteredScorer):
    """The real scorer, with altered results while it shares prompts."""

    def score(
        self, groups: Sequence[Group], *, in_one_batch: bool = False
    ) -> list[tuple[FloatArray, ...]]:
        is_altered = self.shares_prompts and not in_one_batch
        return super().score(groups) if is_altered else self._real.score(groups)


@pytest.mark.parametrize(("dtype", "shift"), [("float32", 0.002), ("bfloat16", 0.07)])
def test_prompts_are_not_shared_where_that_changes_scores(
    dtype: Literal["float32", "bfloat16"],
    shift: float,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alter = lambda call, ids, values: values - np.float32(shift)  # noqa: E731
    alter_engine(monkeypatch, alter, altered=SharingScorer)
    rows = random_rows(1, 6)
    out, result = score(tmp_path, [rows[:3], rows[3:]], tiny_model, dtype=dtype)
    sharing = result.summary["prompt_sharing"]
    assert (sharing["num_workers"], sharing["num_workers_without"]) == (1, 1)
    assert sharing["num_failed"] == 0
    assert sharing["token_max"] == pytest.approx(shift, rel=0.9)
    assert "1 of 1 workers computed every prompt again for each completion" in caplog.text
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for row, scored in zip(rows, read_rows(out), strict=True):
        chosen, _ = wanted_logps(tiny_model, row)
        found = np.array(scored["ref_chosen_token_logps"])
        assert abs(np.median(found - chosen)) < tolerance


def test_prompts_are_shared_where_that_changes_nothing(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, result = score(tmp_path, [random_rows(1, 6)], tiny_model)
    sharing = result.summary["prompt_sharing"]
    assert (sharing["num_workers"], sharing["num_workers_without"]) == (1, 0)
    assert sharing["num_sequences"] >= 4
    assert 0 < sharing["token_max"] < 1e-4
    assert "computed every prompt" not in caplog.text


@pytest.mark.slow
@pytest.mark.vllm
def test_a_cache_that_gives_uncomputed_values_is_turned_off(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM without the guard, with 0.0 in memory that was never computed: finite and not above 0,
    so no other check notices. Prompts of two whole blocks are a trap for the rejected sides."""
    from vllm.v1.outputs import LogprobsTensors

    empty_cpu = LogprobsTensors.empty_cpu

    def zeros(num_positions: int, num_tokens: int) -> LogprobsTensors:
        made = empty_cpu(num_positions, num_tokens)
        made.logprobs.zero_()
        return made

    monkeypatch.setattr(LogprobsTensors, "empty_cpu", staticmethod(zeros))
    monkeypatch.setattr(
        vllm_scorer, "find_cache_traps", lambda requests, block_size: [False] * len(requests)
    )
    monkeypatch.setattr(vllm_scorer, "check_cached_tokens", lambda request, num_cached: None)
    monkeypatch.setattr(
        vllm_scorer,
        "end_of_prompt",
        lambda request, found: np.array(found.logprobs[-len(request.completion_ids) :], np.float32),
    )
    prompt = list(range(3, 67))
    rows = [
        encoded_row(name, [first, *prompt[1:]], [5, 6, 7], [8, 9])
        for name, first in (("a", 70), ("b", 71), ("c", 72), ("d", 73))
    ]
    out, result = score(tmp_path, [rows], tiny_model, backend="vllm")
    assert result.summary["prompt_sharing"]["num_workers_without"] == 1
    assert result.summary["num_tokens_computed"] == result.summary["num_tokens_submitted"]
    for row, scored in zip(rows, read_rows(out), strict=True):
        for side, wanted in zip(("chosen", "rejected"), wanted_logps(tiny_model, row), strict=True):
            assert np.abs(np.array(scored[f"ref_{side}_token_logps"]) - wanted).max() < 1e-4


def record(num_pairs: int, *, scored: int, reused: int, computed: int, seconds: float) -> Any:
    counts = Counts(
        num_in=num_pairs,
        num_out=num_pairs,
        more={
            "num_sequences_scored": scored,
            "num_sequences_reused": reused,
            "num_tokens_submitted": 1000 if scored else 0,
            "num_tokens_computed": computed,
        },
    )
    return ShardRecord(index=0, files={}, counts=counts, seconds=seconds, writer="here:1")


def test_the_progress_line_tells_speed_and_savings_so_far() -> None:
    """10 pairs in 4 s by one of two workers; then 10 more with half reused, so 15 pairs in 8 s by
    two workers: 3.75 pairs/s. 600 + 800 of 2,000 tokens are computed: 30 % shared."""
    pace = Pace(num_workers=2)
    assert pace.describe(record(10, scored=20, reused=0, computed=600, seconds=4.0)) == (
        "2.5 pairs/s, 40% of tokens from shared prompts"
    )
    assert pace.describe(record(10, scored=10, reused=10, computed=800, seconds=4.0)) == (
        "3.8 pairs/s, 30% of tokens from shared prompts, 25% reused"
    )
    reused = record(10, scored=0, reused=20, computed=0, seconds=0.1)
    assert Pace(num_workers=1).describe(reused) == "100% reused"


def test_a_model_with_fewer_positions_than_max_length_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    config = model / "config.json"
    config.write_text(config.read_text().replace("2048", str(MAX_LENGTH - 1)))
    with pytest.raises(ConfigError, match=r"127 positions, but stages\.encode\.max_length is 128"):
        score(tmp_path, [random_rows(1, 1)], model)
