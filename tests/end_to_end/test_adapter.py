"""A reference with an SFT adapter: scored, used as the start of training, kept in the export."""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.runs import Run
from stages.store.caches import user_cache
from tests.end_to_end.conftest import plan_recipe, run_recipe, tiny_recipe, write_pairs
from tests.tiny_adapters import make_tiny_adapter
from tests.tiny_models import TOKEN_IDS

pytestmark = pytest.mark.slow

TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Use a user cache of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_tiny_adapter(tmp_path_factory.mktemp("adapters") / "sft", tiny_model)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, adapter: Path) -> Path:
    """A recipe that scores with the adapter and trains a LoRA on top of it."""
    folder = tmp_path_factory.mktemp("recipe")
    write_pairs(folder / "pairs.jsonl")
    content = tiny_recipe(folder, tiny_model)
    content["stages"]["score"]["adapter"] = str(adapter)
    content["stages"]["train"].update(lora={"rank": 2}, num_epochs=1, dtype="float32")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Run:
    """The finished run of `recipe`."""
    return run_recipe(recipe)


def merged_folder() -> Path:
    """Find the only merged model in the user cache."""
    [folder] = (path for path in (user_cache() / "merged").iterdir() if path.is_dir())
    return folder


def score_plainly(model: Any, prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
    """Compute a completion's token log-probs by one plain forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits
    logps = logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    found: Tensor = logps[range(len(completion_ids)), completion_ids]
    return found


@pytest.fixture(scope="module")
def unmerged(tiny_model: Path, adapter: Path) -> Any:
    """The oracle: peft's own forward, with base and adapter unmerged."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def check_values(run: Run, model: Any) -> None:
    """Compare every stored reference log-prob with the model's own."""
    scored = run.scan("score").join(run.scan("encode"), on="pair_id").collect()
    assert scored.height == 20
    for row in scored.iter_rows(named=True):
        for side in ("chosen", "rejected"):
            wanted = score_plainly(model, row["prompt_ids"], row[f"{side}_ids"])
            found = torch.tensor(row[f"ref_{side}_token_logps"])
            assert (found - wanted).abs().max() < TOLERANCE_NATS


def test_the_reference_is_the_base_with_the_adapter(finished: Run, unmerged: Any) -> None:
    check_values(finished, unmerged)


@pytest.mark.vllm
def test_vllm_scores_the_same_reference(recipe: Path, finished: Run, unmerged: Any) -> None:
    run = run_recipe(recipe, "stages.score.backend=vllm", last="score")
    assert run.manifest("score").summary["num_sequences_reused"] == 0
    check_values(run, unmerged)


def test_training_starts_from_it_and_trains_an_adapter_on_top(finished: Run) -> None:
    """The drift gate finds that the start is the reference, and the first loss is ln 2."""
    summary = finished.manifest("train").summary
    assert summary["drift"]["is_reference"]
    assert summary["drift"]["max"] < TOLERANCE_NATS
    assert summary["first"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["last"]["loss"] < math.log(2)


def test_the_export_holds_the_trained_adapter_on_top_of_the_merged_start(finished: Run) -> None:
    """model/ equals the merged start with adapter/ applied to it."""
    folder = Path(finished.outputs["train"].folder.path)
    start = AutoModelForCausalLM.from_pretrained(merged_folder(), dtype=torch.float32)
    both = PeftModel.from_pretrained(start, str(folder / "adapter")).eval()
    found = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = (list(range(5, 12)), list(range(20, 40)))
    difference = score_plainly(both, *ids) - score_plainly(found, *ids)
    assert difference.abs().max() < TOLERANCE_NATS
    assert not (folder / "model" / "SHA256SUMS").exists()


def test_the_card_names_base_and_adapter_and_the_new_adapter_names_both_as_its_base(
    finished: Run, tiny_model: Path
) -> None:
    """Applied to the base alone, the new adapter would be wrong, so it names no existing model."""
    folder = Path(finished.outputs["train"].folder.path)
    card = (folder / "model" / "README.md").read_text()
    label = f"{tiny_model.name} with sft merged"
    assert f"# {label}, trained on preferences" in card
    assert "| start, sft merged into it |" in card
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == label


def answer_greedily(model: Any, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """Decode greedily, one plain forward a token."""
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == TOKEN_IDS["eos_token_id"]:
                break
    return ids[len(prompt_ids) :]


def test_answers_before_training_are_those_of_base_and_adapter(
    finished: Run, unmerged: Any, tiny_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answers = pl.read_parquet(f"{finished.outputs['evaluate'].folder.path}/generations.parquet")
    prompts = finished.scan("encode").select("pair_id", "prompt_ids").collect()
    asked = answers.join(prompts, on="pair_id")
    assert asked.height == 2
    for row in asked.iter_rows(named=True):
        ids = answer_greedily(unmerged, row["prompt_ids"], 8)
        assert row["before"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_start_without_the_adapter_is_another_model(
    recipe: Path, finished: Run, tiny_model: Path
) -> None:
    plan = plan_recipe(recipe, f"stages.train.model={tiny_model}")
    assert plan.stage("score").state == "done"
    assert plan.stage("train").why.startswith("model.adapter")
    run = run_recipe(recipe, f"stages.train.model={tiny_model}", last="train")
    drift = run.manifest("train").summary["drift"]
    assert not drift["is_reference"]
    assert drift["max"] > 0.1
