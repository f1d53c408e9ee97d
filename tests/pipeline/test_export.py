"""Does an export hold what was scored, in a form that others load?"""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from pipeline.export import export_logps
from pipeline.runs import Run
from schemas.errors import ConfigError
from schemas.rows import EXPORTED
from tests.end_to_end.conftest import plan_recipe, run_recipe, tiny_recipe, write_pairs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Twenty scored pairs, and two of which one side has a user's turn, which is not scored."""
    folder = tmp_path_factory.mktemp("scored")
    write_pairs(folder / "pairs.jsonl")
    messages = [("user", "Hi."), ("assistant", "Hello!"), ("user", "And?"), ("assistant", "Done.")]
    first, *rest = [{"role": role, "content": content} for role, content in messages]
    short = [{"role": "assistant", "content": "No."}]
    sides = ({"chosen": rest, "rejected": short}, {"chosen": short, "rejected": rest})
    with (folder / "pairs.jsonl").open("a") as stream:
        for number, two in enumerate(sides):
            prompt = {**first, "content": f"Hi {number}."}
            stream.write(json.dumps({"prompt": [prompt], **two}) + "\n")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, tiny_model)))
    run_recipe(path, last="score")
    return path


def scored(path: Path) -> Run:
    return run_recipe(path, last="score")


def test_every_scored_pair_is_exported_with_its_tokens_and_log_probs(
    finished: Path, tmp_path: Path
) -> None:
    run = scored(finished)
    has_mask = pl.any_horizontal(pl.col("chosen_loss_mask", "rejected_loss_mask").is_not_null())
    encoded = run.scan("encode").select("pair_id", "split", "chosen_ids", masked=has_mask)
    wanted = run.scan("score").join(encoded, on="pair_id", maintain_order="left").collect()
    assert wanted["masked"].sum() == 2

    done = export_logps(plan_recipe(finished), tmp_path / "out")
    assert (done.num_train + done.num_eval, done.num_left_out) == (20, 2)
    for split, folder, number in (
        ("train", "train", done.num_train),
        ("eval", "test", done.num_eval),
    ):
        found = pl.read_parquet(f"{done.folder}/{folder}/*.parquet")
        assert found.columns == [column.name for column in EXPORTED.columns]
        part = wanted.filter(~pl.col("masked"), pl.col("split") == split)
        assert found.height == part.height == number > 0
        for name in ("pair_id", "chosen_ids"):
            assert found[name].to_list() == part[name].to_list()
        for side in ("chosen", "rejected"):
            for value, values in zip(
                found[f"ref_{side}_logps"], part[f"ref_{side}_token_logps"], strict=True
            ):
                assert value == pytest.approx(math.fsum(values), abs=1e-9)
    [answer] = found["chosen"][0].to_list()
    assert answer["role"] == "assistant"
    assert answer["content"].startswith("It is ")


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out exists already"):
        export_logps(plan_recipe(finished), tmp_path / "out")
    (tmp_path / "out").rmdir()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.export.pq.write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        export_logps(plan_recipe(finished), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_score_says_what_to_run(finished: Path, tmp_path: Path) -> None:
    plan = plan_recipe(finished, "stages.score.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"score is not complete.*--until score"):
        export_logps(plan, tmp_path / "out")


def test_trl_trains_on_an_export_without_a_reference(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """As the README says. The policy starts as the reference, so the first loss is ln 2."""
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = export_logps(plan_recipe(finished), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    here = f"DPOConfig(output_dir={str(tmp_path / 'trl')!r}, bf16=False, use_cpu=True, "
    here += "logging_steps=1, max_steps=1, report_to=[], save_strategy='no', "
    made: dict[str, Any] = {}
    exec(code.replace("train/*", f"{done.folder}/train/*").replace("DPOConfig(", here), made)
    trainer = made["OfflineDPOTrainer"](
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=made["config"],
        train_dataset=made["data"],
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    assert issubclass(made["OfflineDPOTrainer"], trl.DPOTrainer)
    assert trainer.ref_model is None
    assert len(trainer.train_dataset) == done.num_train
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
