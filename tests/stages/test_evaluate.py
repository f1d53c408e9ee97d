"""Rewards, summary and generations of the evaluate stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest

from schemas.manifest import Counts
from schemas.rows import EVALUATION, GENERATION, REJECTED, SCORE
from stages.evaluate import EvaluateConfig, run
from stages.models.resolve import pin_model
from stages.policy.groups import Group
from stages.scorers.protocol import ScoringExecution
from stages.stage import StageResult
from stages.store.shards import StageDir, StageOutput
from tests.stages.scorers.encoded import Row, encoded_row, random_rows, write_encoded
from tests.stages.scorers.oracle import plain_greedy, plain_logps
from tests.stages_running import make_context, open_output, read_rows, stage_dir
from tests.tiny_models import TOKEN_IDS, make_tiny_model, make_tiny_tokenizer

BETA = 0.2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The start, which is also the reference, and another model in place of the trained policy."""
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_model(folder / "start"), make_tiny_model(folder / "train" / "model", seed=1)


def logps_of(model: Path, row: Row) -> dict[str, float]:
    """Summed log-probs of both sides under the loss mask, from a plain forward pass."""
    completions = tuple(np.array(row[f"{side}_ids"], np.int32) for side in ("chosen", "rejected"))
    prompt_ids = np.array(row["prompt_ids"], np.int32)
    [arrays] = plain_logps(model, [Group(prompt_ids=prompt_ids, completions=completions)])
    masks = [row[f"{side}_loss_mask"] or [True] * len(row[f"{side}_ids"]) for side in SIDES]
    return {
        side: float(array[np.array(mask)].sum(dtype=np.float64))
        for side, array, mask in zip(SIDES, arrays, masks, strict=True)
    }


SIDES = ("chosen", "rejected")


def write_scores(
    folder: Path, shards: Sequence[Sequence[Row]], reference: Mapping[str, Mapping[str, float]]
) -> StageOutput:
    """Write summed log-probs (`reference`, by pair_id) as score would: all that evaluate reads."""
    out = stage_dir(folder, "score")
    records = []
    for index, rows in enumerate(shards):
        scored = [
            {
                **{name: row[name] for name in SCORE.arrow.names if name in row},
                **{f"ref_{side}_token_logps": [] for side in SIDES},
                **{f"ref_{side}_logp": reference[row["pair_id"]][side] for side in SIDES},
            }
            for row in rows
            if row["pair_id"] in reference
        ]
        with out.write_shard(index, {"data": SCORE, "rejected": REJECTED}) as shard:
            shard.write_rows("data", scored)
            records.append(shard.commit(Counts(num_in=len(rows), num_out=len(scored))))
    config = {"backend": "transformers", "dtype": "float32"}
    return open_output(out, "score", records, config=config)


def evaluate(
    folder: Path,
    shards: Sequence[Sequence[Row]],
    models: tuple[Path, Path],
    reference: Mapping[str, Mapping[str, float]],
    **config: Any,
) -> tuple[StageDir, StageResult]:
    start, trained = models
    summary = {
        "start_model": msgspec.to_builtins(pin_model(str(start))),
        "reward": {"of": "log_ratio", "scale": BETA},
    }
    train = open_output(
        stage_dir(folder, "train"), "train", [], config={"dtype": "float32"}, summary=summary
    )
    train.folder.create()
    Path(train.folder.path, "model").symlink_to(trained)
    inputs = {
        "encode": write_encoded(folder, shards),
        "score": write_scores(folder, shards, reference),
        "train": train,
    }
    out = stage_dir(folder, "evaluate")
    context = make_context(out, inputs, execution=ScoringExecution())
    return out, run(EvaluateConfig(**config), context)


def test_rows_compare_the_policy_with_the_reference(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    """Rewards are beta * (policy - reference); training pairs are left out."""
    rows = random_rows(1, 5, split="eval", source="a")
    rows[2]["chosen_loss_mask"] = [place % 2 == 0 for place in range(len(rows[2]["chosen_ids"]))]
    rows[3]["split"] = "train"
    reference = {row["pair_id"]: logps_of(models[0], row) for row in rows}
    out, result = evaluate(tmp_path, [rows[:1], [], rows[1:]], models, reference)
    found = read_rows(out)
    wanted_rows = [rows[place] for place in (0, 1, 2, 4)]
    assert [row["pair_id"] for row in found] == [row["pair_id"] for row in wanted_rows]
    assert list(found[0]) == EVALUATION.arrow.names
    for row, got in zip(wanted_rows, found, strict=True):
        policy, ref = logps_of(models[1], row), reference[row["pair_id"]]
        gained = {side: policy[side] - ref[side] for side in SIDES}
        margin = BETA * (gained["chosen"] - gained["rejected"])
        for side in SIDES:
            assert got[f"policy_{side}_logp"] == pytest.approx(policy[side], abs=1e-3)
            assert got[f"ref_{side}_logp"] == ref[side]
            assert got[f"reward_{side}"] == pytest.approx(BETA * gained[side], abs=1e-3)
        assert got["margin"] == pytest.approx(margin, abs=1e-3)
        assert got["correct"] == (margin > 0)
        assert got["displaced"] == (gained["chosen"] < 0 and gained["rejected"] < 0)
    assert [shard.counts.num_in for shard in result.shards] == [1, 0, 3]


def test_the_summary_counts_by_source(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """The reference's sums are set around the policy's, so that every margin is known.

    a: margins 0.2 * (1 - 2) and 0.2 * (3 + 4), the first with both log-probs up; b: both fell,
    by 2 and by 1, margin -0.2. Pair x was rejected by score.
    """
    rows = [
        encoded_row("a1", [5, 6], [7], [8], split="eval", source="a"),
        encoded_row("a2", [5, 7], [7], [8], split="eval", source="a"),
        encoded_row("b1", [5, 8], [7], [8], split="eval", source="b"),
        encoded_row("x1", [5, 9], [7], [8], split="eval", source="x"),
    ]
    gained = {"a1": (1.0, 2.0), "a2": (3.0, -4.0), "b1": (-2.0, -1.0)}
    reference = {}
    for row in rows[:3]:
        chosen, rejected = gained[row["pair_id"][:2]]
        policy = logps_of(models[1], row)
        reference[row["pair_id"]] = {
            "chosen": policy["chosen"] - chosen,
            "rejected": policy["rejected"] - rejected,
        }
    _, result = evaluate(tmp_path, [rows], models, reference, num_generations=0)
    of_a, of_b = result.summary["by_source"]["a"], result.summary["by_source"]["b"]
    assert set(result.summary["by_source"]) == {"a", "b"}
    assert of_a == {
        "num_pairs": 2,
        "accuracy": 0.5,
        "mean_margin": pytest.approx(0.2 * (-1 + 7) / 2, abs=1e-4),
        "share_displaced": 0.0,
    }
    assert of_b == {
        "num_pairs": 1,
        "accuracy": 0.0,
        "mean_margin": pytest.approx(-0.2, abs=1e-4),
        "share_displaced": 1.0,
    }
    assert result.summary["accuracy"] == pytest.approx(1 / 3)
    assert result.summary["mean_margin"] == pytest.approx(0.2 * (-1 + 7 - 1) / 3, abs=1e-4)
    assert result.summary["num_generations"] == 0


def test_generations_are_greedy_answers_of_both_models(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    """Of five held-out pairs in two shards, the first two by pair_id with distinct prompts."""
    shards = [
        [
            encoded_row("c", [40, 41, 42], [50, 2], [60, 2], split="eval", prompt_id="1" * 32),
            encoded_row("d", [40, 41, 42], [51, 2], [61, 2], split="eval", prompt_id="1" * 32),
            encoded_row("a", [43, 44], [52, 2], [62, 2], split="train", prompt_id="2" * 32),
        ],
        [
            encoded_row("e", [45, 46], [53, 2], [63, 2], split="eval", prompt_id="3" * 32),
            encoded_row("b", [47, 48, 49], [54, 2], [64, 2], split="eval", prompt_id="4" * 32),
        ],
    ]
    rows = {row["pair_id"]: row for shard in shards for row in shard}
    reference = {pair_id: dict.fromkeys(SIDES, 0.0) for pair_id in rows}
    out, result = evaluate(tmp_path, shards, models, reference, num_generations=2, max_new_tokens=6)
    tokenizer = make_tiny_tokenizer()
    found = pl.read_parquet(out.folder.file("generations.parquet"))
    assert found.columns == GENERATION.arrow.names
    assert [row["pair_id"][0] for row in found.to_dicts()] == ["b", "c"]
    for got in found.to_dicts():
        row = rows[got["pair_id"]]
        prompt_ids = np.array(row["prompt_ids"], np.int32)
        answers = [
            plain_greedy(model, prompt_ids, num_new=6, stop=TOKEN_IDS["eos_token_id"])
            for model in models
        ]
        assert answers[0] != answers[1]
        for name, ids in zip(("before", "after"), answers, strict=True):
            assert got[name] == tokenizer.decode(ids, skip_special_tokens=True)
        assert got["prompt"] == tokenizer.decode(row["prompt_ids"])
        assert got["chosen"] == tokenizer.decode(row["chosen_ids"][:1])
    assert [file.name for file in result.files] == ["generations.parquet"]
    assert result.summary["num_generations"] == 2


def test_without_held_out_pairs_there_is_an_empty_result(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    rows = random_rows(1, 2)
    reference = {row["pair_id"]: dict.fromkeys(SIDES, 0.0) for row in rows}
    out, result = evaluate(tmp_path, [rows], models, reference)
    assert result.summary == {"num_pairs": 0, "by_source": {}, "num_generations": 0}
    assert read_rows(out) == []
    assert pl.read_parquet(out.folder.file("generations.parquet")).height == 0


def test_pairs_that_the_policy_cannot_score_are_rejected(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's first answer is NaN."""
    from stages.scorers.transformers_scorer import TransformersScorer

    real = TransformersScorer.score

    def broken(self: TransformersScorer, groups: Sequence[Group]) -> Any:
        return [
            tuple(
                values * np.nan if ids[0] == 50 else values
                for ids, values in zip(group.completions, arrays, strict=True)
            )
            for group, arrays in zip(groups, real(self, groups), strict=True)
        ]

    monkeypatch.setattr(TransformersScorer, "score", broken)
    rows = [
        encoded_row("a", [40, 41], [60, 2], [50, 2], split="eval"),
        encoded_row("b", [40, 41], [61, 2], [62, 2], split="eval"),
    ]
    reference = {row["pair_id"]: dict.fromkeys(SIDES, 0.0) for row in rows}
    out, result = evaluate(tmp_path, [rows], models, reference, num_generations=0)
    assert [row["pair_id"][0] for row in read_rows(out)] == ["b"]
    [rejected] = read_rows(out, "rejected")
    assert (rejected["code"], rejected["field"]) == ("POLICY_NONFINITE", "rejected_ids")
    assert result.shards[0].counts.reasons == {"POLICY_NONFINITE": 1}
