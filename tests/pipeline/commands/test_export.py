"""Tests of exports: they hold what was scored, in a format that other trainers load."""

import contextlib
import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from rich.console import Console

from pipeline.commands.export import export_logps
from pipeline.commands.export.open_instruct import keep_known
from pipeline.commands.show import show_run
from pipeline.report import write_report
from pipeline.runs import Run
from pipeline.stage_list import load_stages
from schemas.errors import ConfigError
from schemas.rows import EXPORTED
from tests.end_to_end.conftest import plan_recipe, run_recipe, tiny_recipe, write_pairs
from tests.tiny_models import CHATML, make_tiny_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Twenty scored pairs, and two with a user's turn in one side, which is not scored."""
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
        for name in ("pair_id", "chosen_ids", "rejected_sequence_id", "ref_chosen_token_logps"):
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

    monkeypatch.setattr("pipeline.commands.export.datasets.pq.write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        export_logps(plan_recipe(finished), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_score_says_what_to_run(finished: Path, tmp_path: Path) -> None:
    plan = plan_recipe(finished, "stages.score.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"score is not complete.*--until score"):
        export_logps(plan, tmp_path / "out")


@pytest.mark.parametrize("added_nats", [0.0, 3.0])
def test_trl_trains_on_an_export_without_a_reference(
    finished: Path, tiny_model: Path, tmp_path: Path, added_nats: float
) -> None:
    """The code of the README trains; the policy starts as the reference, so the first loss is ln 2.

    TRL reads the column and computes nothing itself: with 3 nats more on every chosen side, the
    margin is beta times -3, and the loss is -log sigmoid(-0.3).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_trainer import DPOTrainer

    done = export_logps(plan_recipe(finished), tmp_path / "out")
    for path in Path(done.folder).glob("train/*.parquet"):
        rows = pl.read_parquet(path)
        rows.with_columns(pl.col("ref_chosen_logps") + added_nats).write_parquet(path)
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
    assert issubclass(made["OfflineDPOTrainer"], DPOTrainer)
    assert trainer.ref_model is None
    assert len(trainer.train_dataset) == done.num_train
    trainer.train()
    margin = -0.1 * added_nats
    expected = {"loss": math.log(1 + math.exp(-margin)), "rewards/margins": margin}
    for name, value in expected.items():
        assert trainer.state.log_history[0][name] == pytest.approx(value, abs=1e-4)


def test_an_export_can_be_imported_and_gives_identical_values(
    finished: Path, tmp_path: Path
) -> None:
    """All pairs but the two with a loss mask are imported, and the recipe goes on from there.

    Training starts from the reference; evaluation does not know the engine and takes transformers.
    """
    computed = scored(finished).scan("score").collect()
    done = export_logps(plan_recipe(finished), tmp_path / "out")
    run = run_recipe(
        finished,
        "stages.score.backend=import",
        f"stages.score.table={tmp_path / 'out'}",
        "stages.train.num_epochs=1",
    )
    assert run.manifest("score").counts.reasons == {"REF_MISSING": 2}
    assert run.manifest("score").summary["num_sequences_imported"] == 40
    imported = run.scan("score").collect()
    assert imported.height == done.num_train + done.num_eval == 20
    assert imported.equals(computed.filter(pl.col("pair_id").is_in(imported["pair_id"].implode())))
    assert run.manifest("train").summary["drift"]["is_reference"]
    assert run.manifest("evaluate").summary["num_pairs"] > 0
    text = show(run)
    assert "reference imported 40 sequences" in text
    assert "reference scoring" not in text
    assert (
        "were imported from" in Path(write_report([run], plan_recipe(finished).store)).read_text()
    )


def show(run: Run) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show_run(run, load_stages()))
    return " ".join(console.export_text().split())


# --- open-instruct -------------------------------------------------------------------------------


def tokenize_like_open_instruct(
    messages: list[dict[str, str]], tokenizer: Any, max_length: int
) -> tuple[list[int], list[int]]:
    """Tokenise a whole conversation in one piece, with labels of -100 up to the last answer.

    open-instruct's preference_tulu_tokenize_and_truncate_v1 does this for one answer at the end.
    """
    ids = tokenizer.apply_chat_template(messages, return_dict=False)[:max_length]
    before = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    return ids, [-100] * len(before) + ids[len(before) :]


def test_open_instruct_reads_back_every_value_at_its_rows_index(
    finished: Path, tmp_path: Path
) -> None:
    """The file loads as in TensorCache.from_disk; the sums are recomputed from token values."""
    done = export_logps(plan_recipe(finished), tmp_path / "out", form="open-instruct")
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    ids = pl.read_parquet(tmp_path / "out" / "tokens" / "*.parquet")["pair_id"].to_list()
    run = scored(finished)
    rows = run.scan("score").join(run.scan("encode"), on="pair_id").collect()
    by_pair = {row["pair_id"]: row for row in rows.iter_rows(named=True)}
    pairs = {row["pair_id"]: row for row in run.scan("dedupe").collect().iter_rows(named=True)}
    assert len(lines) == len(ids) == done.num_train > 10
    assert done.num_eval == 0
    assert {by_pair[name]["split"] for name in ids} == {"train"}
    for name in ("sum", "mean"):
        tensors = torch.load(tmp_path / "out" / f"{name}.pt", weights_only=True, map_location="cpu")
        assert set(tensors) == {"chosen_logps", "rejected_logps"}
        for side in ("chosen", "rejected"):
            values = tensors[f"{side}_logps"]
            assert (values.dtype, values.shape) == (torch.float32, (len(ids),))
            for index, (pair_id, line) in enumerate(zip(ids, lines, strict=True)):
                pair, logps = pairs[pair_id], by_pair[pair_id][f"ref_{side}_token_logps"]
                wanted = math.fsum(logps) / (1 if name == "sum" else len(logps))
                assert values[index].item() == pytest.approx(wanted, rel=1e-6)
                texts = [message["content"] for message in json.loads(line)[side]]
                assert texts == [m["content"] for m in [*pair["prompt"], *pair[side]]]


NOTHING_AFTER_EOS = CHATML.replace("<|im_end|>\n", "<|im_end|>")


@pytest.mark.parametrize("agrees", [True, False])
def test_the_check_in_the_folder_passes_on_equal_tokens_and_on_no_others(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agrees: bool
) -> None:
    """The code of the README runs with a stand-in for open-instruct, which is not installed here.

    ChatML ends with a line break after EOS, which open-instruct scores and encode cuts.
    """
    template = NOTHING_AFTER_EOS if agrees else CHATML
    (tmp_path / "template.jinja").write_text(template)
    override = f"stages.encode.template={tmp_path / 'template.jinja'}"
    run_recipe(finished, override, last="score")

    class TokenizerConfig:
        def __init__(self, *, tokenizer_name_or_path: str) -> None:
            self.tokenizer = make_tiny_tokenizer()
            self.tokenizer.chat_template = template

    def tokenize(row: dict[str, Any], tokenizer: Any, max_seq_length: int) -> dict[str, Any]:
        for side in ("chosen", "rejected"):
            ids, labels = tokenize_like_open_instruct(row[side], tokenizer, max_seq_length)
            row[f"{side}_input_ids"], row[f"{side}_labels"] = map(torch.tensor, (ids, labels))
        return row

    package: Any = types.ModuleType("open_instruct")
    package.dataset_transformation = types.SimpleNamespace(
        TokenizerConfig=TokenizerConfig, preference_tulu_tokenize_and_truncate_v1=tokenize
    )
    monkeypatch.setitem(sys.modules, "open_instruct", package)
    export_logps(plan_recipe(finished, override), tmp_path / "out", form="open-instruct")
    monkeypatch.chdir(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    with (
        contextlib.nullcontext() if agrees else pytest.raises(AssertionError, match="other tokens")
    ):
        exec(code, {})


def test_open_instruct_gets_only_what_it_tokenises_alike() -> None:
    """One row is kept, and one is left out for each reason."""
    message = {"role": "user", "content": "Hi.", "reasoning": None, "tool_calls": None}
    message |= {"tool_call_id": None, "name": None}
    plain: dict[str, Any] = {
        "pair_id": "plain",
        "prompt": [message],
        "chosen": [{**message, "role": "assistant"}],
        "rejected": [{**message, "role": "assistant"}],
        "tools": None,
        "split": "train",
        "truncated": 0,
    }
    others: dict[str, dict[str, Any]] = {
        "held out": {"split": "eval"},
        "cut": {"truncated": 2},
        "tools": {"tools": "[]"},
        "an answer in the prompt": {"prompt": [message, {**message, "role": "assistant"}, message]},
        "a name": {"prompt": [{**message, "name": "Bob"}]},
        "a tool call": {"chosen": [{**message, "role": "assistant", "tool_calls": "[]"}]},
        "reasoning": {"rejected": [{**message, "role": "assistant", "reasoning": "Hm."}]},
    }
    rows = [plain, *({**plain, "pair_id": name, **change} for name, change in others.items())]
    messages = pl.List(pl.Struct(dict.fromkeys(message, pl.String)))
    schema: dict[str, Any] = {"tools": pl.String}
    schema |= dict.fromkeys(("prompt", "chosen", "rejected"), messages)
    kept = keep_known(pl.DataFrame(rows, schema_overrides=schema))
    assert kept["pair_id"].to_list() == ["plain"]


def test_an_unknown_format_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Formats: datasets, open-instruct"):
        export_logps(plan_recipe(finished), tmp_path / "out", form="csv")
