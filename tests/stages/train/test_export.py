"""Exports: transformers computes from them what was trained, and stops where answers ended."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from schemas.errors import DataError
from stages.models.merge_adapter import save_model
from stages.train import LoraSettings, TrainConfig, export
from stages.train.config import TrainJob, read_outcome
from stages.train.probe import TOLERANCE
from stages.train.trainer import train
from tests.stages.train.made_data import (
    Row,
    make_job,
    random_rows,
    score_rows,
    write_inputs,
)
from tests.stages.train.test_train import ALONE, sha256s
from tests.stages.train.worker import start_workers
from tests.tiny_models import CHATML, make_tiny_model, shard_weights

CONFIG = TrainConfig(dtype="float32", learning_rate=1e-2, global_batch_size=4)
END_OF_TEXT, START_OF_MESSAGE, END_OF_MESSAGE = 0, 1, 2
"""Ids of the tiny tokenizer's added tokens."""


def lora(*names: str) -> TrainConfig:
    return replace(CONFIG, lora=LoraSettings(rank=4, target_modules=names))


def train_on(
    folder: Path, start: Path, config: TrainConfig, rows: Sequence[Row] = (), **job: Any
) -> Path:
    """Train on a few random pairs; return the folder of the stage."""
    rows = rows or random_rows(7, 8)
    inputs = write_inputs(folder / "inputs", rows, score_rows(rows, start), reference=start)
    made = make_job(folder, inputs, start, config, **job)
    train(made, ALONE)
    return Path(made.out.folder.path)


def open_plainly(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def summary(folder: Path) -> dict[str, Any]:
    outcome = json.loads((folder / "_work" / "train" / "outcome.json").read_bytes())
    found: dict[str, Any] = outcome["summary"]["export"]
    return found


def largest_difference(model: PreTrainedModel | PeftModel, other: PreTrainedModel) -> float:
    """Compare the logits of two models on random tokens."""
    ids = torch.randint(3, 300, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = (each(input_ids=ids).logits for each in (model, other))
    return float((found - wanted).abs().max())


TIED = {
    "input side": ("llama", ("q_proj", "embed_tokens")),
    "output side": ("llama", ("q_proj", "lm_head")),
    "both sides": ("llama", ("embed_tokens", "lm_head")),
    "transposed layers": ("gpt2", ("c_attn", "wte")),
    "scaled embeddings": ("gemma3", ("embed_tokens",)),
    "soft caps": ("gemma2", ("embed_tokens", "o_proj")),
}


@pytest.mark.parametrize("kind", TIED)
def test_an_adapter_on_tied_embeddings_is_exported_untied(tmp_path: Path, kind: str) -> None:
    """The oracle is peft's own forward of base and adapter; a shared matrix would be far off."""
    architecture, names = TIED[kind]
    start = make_tiny_model(tmp_path / "start", architecture)
    folder = train_on(tmp_path, start, lora(*names))
    exported = open_plainly(folder / "model")
    adapted = PeftModel.from_pretrained(open_plainly(start), str(folder / "adapter")).eval()
    assert largest_difference(exported, adapted) < 1e-4
    assert largest_difference(open_plainly(start), adapted) > 1e-2
    assert (
        json.loads((folder / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert summary(folder)["model"]["max"] < 1e-4
    assert summary(folder)["adapter"]["max"] < 1e-4
    held = set(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert all(".lora_" in name for name in held), "the base's embeddings are not the adapter's"


def test_tied_embeddings_stay_tied_without_an_adapter_on_them(tmp_path: Path) -> None:
    start = make_tiny_model(tmp_path / "start")
    folder = train_on(tmp_path, start, lora("q_proj"))
    configs = [json.loads((at / "config.json").read_text()) for at in (folder / "model", start)]
    assert configs[0] == configs[1]
    assert "lm_head.weight" not in load_file(folder / "model" / "model.safetensors")


def untie(folder: Path) -> Path:
    """Untie a checkpoint's output layer, and leave its config saying that it is tied."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("config", [CONFIG, lora("q_proj", "embed_tokens")], ids=["full", "lora"])
def test_a_checkpoint_with_two_matrices_is_exported_with_two(
    tmp_path: Path, config: TrainConfig
) -> None:
    """Engines that believe the config would read one of them alone."""
    start = untie(make_tiny_model(tmp_path / "start"))
    folder = train_on(tmp_path, start, config)
    assert (
        json.loads((folder / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert "lm_head.weight" in load_file(folder / "model" / "model.safetensors")
    assert summary(folder)["model"]["max"] < 1e-4


def test_a_start_in_several_files_is_exported(tmp_path: Path) -> None:
    start = shard_weights(make_tiny_model(tmp_path / "start"))
    folder = train_on(tmp_path, start, CONFIG)
    assert summary(folder)["model"]["max"] < 1e-4
    assert not (folder / "model" / "model.safetensors.index.json").exists()


def test_training_in_bfloat16_is_probed_in_float32(tmp_path: Path) -> None:
    """Autocast rounds products, but the exported weights are the policy's own float32."""
    start = make_tiny_model(tmp_path / "start")
    folder = train_on(tmp_path, start, replace(CONFIG, dtype="bfloat16"))
    assert summary(folder)["model"]["max"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, lora("q_proj", "embed_tokens")], ids=["full", "lora"])
def test_a_sharded_policy_is_probed_before_it_is_gathered(
    tmp_path: Path, config: TrainConfig
) -> None:
    start = make_tiny_model(tmp_path / "start")
    rows = random_rows(7, 8)
    inputs = write_inputs(tmp_path / "inputs", rows, score_rows(rows, start), reference=start)
    job = make_job(tmp_path, inputs, start, config, parallelism="fsdp2")
    workers = start_workers(job, scratch=tmp_path / "scratch", size=2)
    assert [worker.wait(timeout=400) for worker in workers] == [0, 0]
    found = summary(Path(job.out.folder.path))
    assert found["model"]["num_sequences"] == 8
    assert found["model"]["max"] < 1e-4


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, file: str, change: float) -> None:
    """Add to every number of a file, right after a function of the export wrote it."""
    write = getattr(export, name)

    def write_and_spoil(*args: Any, **options: Any) -> Any:
        written = write(*args, **options)
        path = next(arg for arg in args if isinstance(arg, Path)) / file
        save_file(
            {key: tensor + change for key, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
        return written

    monkeypatch.setattr(export, name, write_and_spoil)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("save_model", "model.safetensors", "The exported model does not compute"),
        (
            "_write_adapter",
            "adapter_model.safetensors",
            "The exported adapter on its base does not",
        ),
    ],
)
def test_an_export_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, message: str
) -> None:
    spoil(monkeypatch, name, file, 1e-2)
    with pytest.raises(DataError, match=f"{message}.*nats"):
        train_on(tmp_path, make_tiny_model(tmp_path / "start"), lora("q_proj"))
    [folder] = (tmp_path / "train").iterdir()
    assert not (folder / "model").exists()
    assert not (folder / "adapter").exists()
    assert not (folder / "_work" / "train" / "outcome.json").exists()


def test_an_export_that_cannot_be_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = save_model

    def write_and_tear(model: PreTrainedModel, folder: Path, *, start: Path) -> None:
        write(model, folder, start=start)
        tensors = folder / "model.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:1000])

    monkeypatch.setattr(export, "save_model", write_and_tear)
    with pytest.raises(DataError, match="model cannot be opened by transformers"):
        train_on(tmp_path, make_tiny_model(tmp_path / "start"), CONFIG)


def test_rounding_is_far_below_the_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that forgets an adapter trained at a low learning rate is above it."""
    config = replace(lora("q_proj", "v_proj"), learning_rate=5e-4, num_epochs=2)
    start = make_tiny_model(tmp_path / "start")
    folder = train_on(tmp_path / "whole", start, config)
    assert summary(folder)["model"]["max"] < TOLERANCE / 50
    monkeypatch.setattr(export, "merge_layers", lambda adapted: adapted.unload())
    with pytest.raises(DataError, match="does not compute what was trained"):
        train_on(tmp_path / "lost", start, config)


# --- tokenizer, template, end tokens -------------------------------------------------------------


def ending_in(rows: Sequence[Row], end: int, **changes: Any) -> list[Row]:
    """End all answers with a token."""
    return [
        {
            **row,
            **{f"{side}_ids": [*row[f"{side}_ids"][:-1], end] for side in ("chosen", "rejected")},
            "chosen_loss_mask": None,
            **changes,
        }
        for row in rows
    ]


def change_json(path: Path, **changes: Any) -> Path:
    """Change keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def stops(folder: Path) -> list[Any]:
    """Read where generation stops, by generation config and by config."""
    model = folder / "model"
    return [
        json.loads((model / name).read_text()).get("eos_token_id")
        for name in ("generation_config.json", "config.json")
    ]


def start_ending_at(folder: Path, eos: int | list[int]) -> Path:
    start = make_tiny_model(folder)
    for name in ("config.json", "generation_config.json"):
        change_json(start / name, eos_token_id=eos)
    return start


def test_the_export_stops_where_training_ended_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The start's own end stays, behind the new one; both files agree, and the log says so."""
    start = start_ending_at(tmp_path / "start", END_OF_TEXT)
    folder = train_on(tmp_path, start, CONFIG, ending_in(random_rows(7, 8), END_OF_MESSAGE))
    assert stops(folder) == [[END_OF_MESSAGE, END_OF_TEXT]] * 2
    assert summary(folder)["end_token_ids"] == [END_OF_MESSAGE, END_OF_TEXT]
    assert "training ended answers with <|im_end|> (2)" in caplog.text
    generated = open_plainly(folder / "model").generation_config.eos_token_id
    assert generated == [END_OF_MESSAGE, END_OF_TEXT]


@pytest.mark.parametrize("eos", [END_OF_MESSAGE, [END_OF_TEXT, END_OF_MESSAGE]])
def test_end_tokens_that_the_start_has_already_change_nothing(
    tmp_path: Path, eos: int | list[int]
) -> None:
    start = start_ending_at(tmp_path / "start", eos)
    folder = train_on(tmp_path, start, CONFIG, ending_in(random_rows(7, 8), END_OF_MESSAGE))
    assert stops(folder) == [eos, eos]
    name = "generation_config.json"
    assert (folder / "model" / name).read_bytes() == (start / name).read_bytes()


def test_a_start_without_generation_config_gets_one_where_it_must_stop_elsewhere(
    tmp_path: Path,
) -> None:
    start = start_ending_at(tmp_path / "start", END_OF_TEXT)
    (start / "generation_config.json").unlink()
    folder = train_on(tmp_path, start, CONFIG, ending_in(random_rows(7, 8), END_OF_MESSAGE))
    assert json.loads((folder / "model" / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": [END_OF_MESSAGE, END_OF_TEXT],
    }


def test_generation_settings_that_transformers_refuses_to_save_are_kept(tmp_path: Path) -> None:
    """save_pretrained raises for a temperature without sampling, as some releases have it."""
    start = make_tiny_model(tmp_path / "start")
    change_json(start / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
    folder = train_on(tmp_path, start, CONFIG, ending_in(random_rows(7, 8), START_OF_MESSAGE))
    found = json.loads((folder / "model" / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"]) == (0.6, 0.9)
    assert found["eos_token_id"] == [START_OF_MESSAGE, END_OF_MESSAGE]


def test_every_token_that_ends_a_turn_counts_and_no_other(tmp_path: Path) -> None:
    """Of two steps, one ends at 0 and one at 2; the last token of a cut answer is no end."""
    rows = ending_in(random_rows(7, 8), END_OF_MESSAGE)
    steps = [5, 6, END_OF_TEXT, 7, 7, 8, END_OF_MESSAGE]
    mask = [True, True, True, False, False, True, True]
    rows[0] = {**rows[0], "chosen_ids": steps, "chosen_loss_mask": mask, "num_chosen_tokens": 7}
    cut = [9, 9, START_OF_MESSAGE]
    rows[1] = {**rows[1], "rejected_ids": cut, "num_rejected_tokens": 3, "truncated": 4}
    start = make_tiny_model(tmp_path / "start")
    folder = train_on(tmp_path, start, CONFIG, rows)
    assert summary(folder)["end_token_ids"] == [END_OF_MESSAGE, END_OF_TEXT]


def test_answers_that_end_in_words_leave_the_end_tokens_alone(tmp_path: Path) -> None:
    start = make_tiny_model(tmp_path / "start")
    folder = train_on(tmp_path, start, CONFIG, ending_in(random_rows(7, 8), 77))
    assert stops(folder) == [END_OF_MESSAGE, END_OF_MESSAGE]


TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_the_template_of_training_is_the_exports_only_one(tmp_path: Path) -> None:
    """Whatever templates the tokenizer had, in whichever of their four places."""
    start = make_tiny_model(tmp_path / "start")
    (start / "additional_chat_templates").mkdir()
    (start / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (start / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    change_json(start / "tokenizer_config.json", chat_template="older")
    folder = train_on(tmp_path, start, CONFIG, template=TEMPLATE) / "model"
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert not (folder / "chat_template.json").exists()
    assert not (folder / "additional_chat_templates").exists()


def test_the_tokenizer_of_training_is_exported_whole(tmp_path: Path) -> None:
    """The start's own tokenizer files go, also those that the other tokenizer has not."""
    start = make_tiny_model(tmp_path / "start")
    (start / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (start / "LICENSE").write_text("Do good.")
    other = make_tiny_model(tmp_path / "other")
    shutil.rmtree(other / "additional_chat_templates", ignore_errors=True)
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (other / "chat_template.jinja").write_text(CHATML.replace("assistant", "model"))
    folder = train_on(tmp_path, start, CONFIG, tokenizer=other) / "model"
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert not (folder / "special_tokens_map.json").exists()
    assert (folder / "LICENSE").read_text() == "Do good."


def test_the_export_names_no_code(tmp_path: Path) -> None:
    """The start's code is neither run nor copied, so the config must not ask for it."""
    start = make_tiny_model(tmp_path / "start")
    change_json(start / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    folder = train_on(tmp_path, start, CONFIG) / "model"
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_equal_trainings_export_equal_bytes(tmp_path: Path) -> None:
    start = start_ending_at(tmp_path / "start", END_OF_TEXT)
    rows = ending_in(random_rows(7, 8), END_OF_MESSAGE)
    inputs = write_inputs(tmp_path / "inputs", rows, score_rows(rows, start), reference=start)
    jobs: list[TrainJob] = []
    for name in ("one", "two"):
        config = lora("q_proj", "embed_tokens")
        jobs.append(make_job(tmp_path / name, inputs, start, config, template=TEMPLATE))
        train(jobs[-1], ALONE)
    assert sha256s(jobs[0]) == sha256s(jobs[1])
    outcome = read_outcome(jobs[0])
    assert outcome is not None
    assert {"adapter/adapter_model.safetensors", "model/chat_template.jinja"} <= {
        file.name for file in outcome.files
    }
