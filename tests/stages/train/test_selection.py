"""Training pairs are chosen and weighted by SQL over single rows, and by nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from schemas.config import dump_config, parse_config
from schemas.errors import ConfigError, DataError
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput
from stages.train import TrainConfig
from stages.train.config import read_outcome
from stages.train.order import keep_order
from stages.train.pairs import PairIndex, PairReader, index_pairs
from stages.train.selection import COLUMNS, Selection
from stages.train.trainer import train
from tests.pipeline.report.made_store import MadeRun
from tests.stages.train.made_data import Row, make_job, write_inputs
from tests.stages.train.test_train import ALONE, CONFIG, read_metrics


def read_pairs(index: PairIndex) -> dict[str, float]:
    """Read all pairs of an index: their weights by id."""
    reader = PairReader(index=index, order=keep_order(index.num_pairs_S.tolist()))
    return {pair.pair_id: pair.weight for pair in reader.read(np.arange(len(index)))}


def test_where_chooses_and_weight_multiplies(
    encoded: list[Row], scored: list[Row], reference: Path, tmp_path: Path
) -> None:
    """Every fifth pair has no margin, which is not above 2. Held-out pairs stay as they are."""
    rows = [{**row, "margin": n % 7 if n % 5 else None} for n, row in enumerate(encoded)]
    inputs = write_inputs(tmp_path, rows, scored, reference=reference)
    selection = Selection(
        where="score_margin > 2 AND NOT num_prompt_tokens IN (1, 2)",
        weight="CASE WHEN ref_margin > 0 THEN 0.5 ELSE 2 END",
    )
    indexes = index_pairs(inputs, selection=selection)
    ref_margins = {
        row["pair_id"]: row["ref_chosen_logp"] - row["ref_rejected_logp"] for row in scored
    }
    wanted = {
        row["pair_id"]: row["weight"] * (0.5 if ref_margins[row["pair_id"]] > 0 else 2)
        for row in rows
        if row["split"] == "train"
        and (row["margin"] or 0) > 2
        and row["num_prompt_tokens"] not in (1, 2)
    }
    assert 2 < len(wanted) < 14
    assert len(set(wanted.values())) > 1
    assert read_pairs(indexes["train"]) == wanted
    assert indexes["train"].num_left_out == 17 - len(wanted)
    held_out = {row["pair_id"]: row["weight"] for row in rows if row["split"] == "eval"}
    assert read_pairs(indexes["eval"]) == held_out
    assert len(indexes["train"].num_common_tokens_P) == len(wanted)


def test_a_training_takes_only_the_chosen_pairs(
    inputs: dict[str, StageOutput], encoded: list[Row], reference: Path, tmp_path: Path
) -> None:
    lengths = sorted(row["num_prompt_tokens"] for row in encoded if row["split"] == "train")
    config = parse_config(
        TrainConfig,
        {**dump_config(CONFIG), "where": f"num_prompt_tokens <= {lengths[7]}"},
        path="",
    )
    job = make_job(tmp_path, inputs, reference, config)
    train(job, ALONE)
    num_chosen = sum(length <= lengths[7] for length in lengths)
    assert sum(row["num_pairs"] for row in read_metrics(job)) == 2 * num_chosen
    outcome = read_outcome(job)
    assert outcome is not None
    assert outcome.summary["num_pairs_left_out"] == 17 - num_chosen
    nothing = parse_config(TrainConfig, {"dtype": "float32", "where": "weight > 7"}, path="")
    with pytest.raises(DataError, match=r"'weight > 7' leaves out all 17 training pairs\. Ask"):
        train(make_job(tmp_path / "none", inputs, reference, nothing), ALONE)


def test_columns_have_the_names_and_values_that_a_run_shows(tmp_path: Path) -> None:
    """Each column decides alone: by its value as a factor, or, as text, as a condition."""
    run = MadeRun(store=Folder(str(tmp_path)), name="made", is_hostile=False).write(until="score")
    is_read = (pl.col("split") == "train") & pl.col("ref_margin").is_not_null()
    shown = run.pairs().filter(is_read).collect()
    inputs = {name: run.outputs[name] for name in ("encode", "score", "dedupe")}
    for name in COLUMNS:
        if shown[name].dtype.is_numeric():
            weight = f"ABS(COALESCE({name}, 7)) / 1000"
            factors = index_pairs(inputs, selection=Selection(weight=weight))["train"].factors_S
            assert factors is not None
            wanted = (shown[name].cast(pl.Float64).fill_null(7).abs() / 1000).to_numpy()
            np.testing.assert_allclose(np.concatenate(factors), wanted, rtol=1e-6, err_msg=name)
        elif shown[name].dtype == pl.String:
            found = index_pairs(inputs, selection=Selection(where=f"{name} >= 'm'"))["train"]
            assert len(found) == (shown[name] >= "m").sum(), name


@pytest.mark.parametrize(
    "where",
    [
        "source LIKE 'hh%' OR source IN ('a', 'b')",
        "ref_margin / (num_chosen_tokens + 1) BETWEEN -2 AND 2",
        "NOT (truncated & 2 = 2) AND score_margin IS NOT NULL",
        "ARRAY_CONTAINS(warnings, 'TIE') OR LENGTH(extra) > 3",
        "GREATEST(num_chosen_tokens, num_rejected_tokens) < 1.5 * LEAST(num_prompt_tokens, 9)",
        "CASE source WHEN 'a' THEN 1 ELSE 2 END = 1 AND LN(ABS(ref_margin)) > 0",
    ],
)
def test_conditions_on_single_rows_are_accepted(where: str) -> None:
    assert parse_config(TrainConfig, {"where": where}, path="").where == where


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"where": "ref_margin >"}, r"train\.where: not an SQL expression: .* \(found 'ref_m"),
        ({"where": "margin > 0"}, "no column 'margin'; there are pair_id, .*score_margin"),
        ({"where": "ref_margin"}, "a condition that is true or false is needed; .* Float64"),
        ({"where": "source + 1 > 2"}, "it cannot be computed"),
        ({"where": "ref_margin > AVG(ref_margin)"}, r"looks across rows \(Agg\)"),
        ({"where": "SUM(weight) OVER (PARTITION BY source) > 1"}, r"across rows \((Over|Agg)\)"),
        ({"where": "ROW_NUMBER() OVER (ORDER BY weight) < 9"}, "it looks across rows"),
        ({"where": "RANK() OVER (ORDER BY weight) < 9"}, "it looks across rows"),
        ({"where": "LAG(weight) OVER (ORDER BY pair_id) > 1"}, "it looks across rows"),
        ({"where": "COUNT(*) > 3"}, r"across rows \(Len\)"),
        ({"where": "QUANTILE_CONT(weight, 0.5) > 1"}, r"not known not to \(Quantile\)"),
        ({"where": "UNNEST(warnings) = 'TIE'"}, r"across rows \(Explode\)"),
        ({"where": "NOW() > CURRENT_DATE"}, "date or time"),
        ({"where": "weight > (SELECT 1)"}, "across rows"),
        ({"weight": "source"}, r"train\.weight: a number is needed; this is of type String"),
        ({"weight": "weight > 1"}, "a number is needed; this is of type Boolean"),
        (
            {"where": "ref_margin > 0", "loss": {"kind": "simpo"}},
            "names a reference log-prob, but this loss uses no reference",
        ),
    ],
)
def test_anything_else_is_refused_with_the_recipe(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(TrainConfig, settings, path="stages.train")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("score_margin", "'score_margin' is null for pair"),
        ("-weight", r"'-weight' is -1\.0 for pair"),
        ("LN(weight - weight)", "is -inf for pair"),
        ("CAST(source AS DOUBLE)", "stages.train.weight: 'CAST.* fails: conversion from"),
    ],
)
def test_weights_that_are_no_weights_are_refused(
    weight: str, said: str, inputs: dict[str, StageOutput]
) -> None:
    with pytest.raises(DataError, match=said):
        index_pairs(inputs, selection=Selection(weight=weight))


def test_only_what_is_named_is_read_and_hashed() -> None:
    """Stores made before the keys existed stay valid: absent keys are not part of the hash."""
    plain = TrainConfig()
    assert not {"where", "weight"} & dump_config(plain).keys()
    assert plain.needed_stages == ("encode", "score")
    chosen = TrainConfig(where="score_chosen > 3")
    assert dump_config(chosen)["where"] == "score_chosen > 3"
    assert chosen.needed_stages == ("encode", "score", "dedupe")
    free = parse_config(TrainConfig, {"loss": {"kind": "simpo"}, "where": "weight = 1"}, path="")
    assert free.needed_stages == ("encode",)
