"""Export a trained policy: a Hugging Face model folder with its card, and the adapter if any."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from schemas.config import dump_config
from schemas.manifest import FileRecord
from stages.models.digest import list_companions
from stages.models.fetch import fetch_model
from stages.models.resolve import ModelPin
from stages.store.local_paths import describe_files, writable_path
from stages.train.config import TrainJob
from stages.train.policy import Policy


def export_model(policy: Policy, job: TrainJob, summary: Mapping[str, Any]) -> list[FileRecord]:
    """Write `model/`, and `adapter/` if one was trained. The policy is unusable afterwards.

    Weights are stored in float32, as trained, even if the start is a bfloat16 release: bfloat16
    keeps 8 bits, and most changes made by a low learning rate would be rounded away. The same
    training exports the same bytes, without dates or local paths.
    """
    records = []
    if policy.adapter is not None:
        folder = job.out.folder.child("adapter")
        job.out.folder.delete_folder("adapter")
        with writable_path(folder) as path:
            _write_adapter(policy, path, base=adapter_base(job.start))
            records += describe_files(path, prefix="adapter/")
    job.out.folder.delete_folder("model")
    with writable_path(job.out.folder.child("model")) as path:
        _write_model(policy, path, start=Path(fetch_model(job.start)))
        (path / "README.md").write_text(model_card(job, summary), encoding="utf-8")
        records += describe_files(path, prefix="model/")
    return records


def adapter_base(start: ModelPin) -> str:
    """Name the base model of the exported adapter.

    If another adapter was merged into the start, no hub model is the right base. The label returned
    then cannot be loaded, so that nobody loads the wrong one.
    """
    return start.spec if start.adapter is None else start.label


def _write_adapter(policy: Policy, path: Path, *, base: str) -> None:
    assert policy.adapter is not None
    policy.adapter.save_pretrained(str(path))
    (path / "README.md").unlink(missing_ok=True)  # peft's unfilled template.
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    # peft writes the local path of the base, and the target modules in varying order.
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_model(policy: Policy, path: Path, *, start: Path) -> None:
    model = policy.model
    if policy.adapter is not None:
        model = policy.adapter.merge_and_unload()
    model.to(torch.float32).save_pretrained(path)
    # Loading turned dropout and the KV cache off; the export gets the start's own config.
    for name in ("config.json", "generation_config.json"):
        (path / name).unlink(missing_ok=True)
    for file in list_companions(start):
        shutil.copyfile(file, path / file.name)
    config = json.loads((start / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # The key's former name.
    config["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def model_card(job: TrainJob, summary: Mapping[str, Any]) -> str:
    """Write the model card: how the model was made, in Markdown with the hub's front matter."""
    base = job.start.label
    front = {"library_name": "transformers", "tags": ["dpo", "preference-tuning"]}
    if job.start.commit is not None:
        front["base_model"] = job.start.spec
    reference = job.inputs["score"].manifest.config if job.has_reference else None
    losses = " + ".join(loss.kind for loss in job.config.losses)
    how = "The reference's log-probabilities were computed once, before training."
    first, last = summary["first"], summary["last"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {base}, trained on preferences",
        "",
        f"Preference optimisation (`{losses}` loss) of {base} on "
        f"{summary['num_train_pairs']:,} pairs, {job.config.num_epochs} epochs, "
        f"{summary['num_steps']:,} steps. {how if reference else 'No reference is involved.'} "
        f"These are the weights after step {summary['exported_step']:,}"
        + (", the best on the held-out pairs." if summary["eval_best"] else "."),
        "",
        "The weights are float32, as trained. Rounded to bfloat16 they lose small changes: compare "
        "before serving them so.",
        "",
        "| step | loss | reward margin | reward accuracy |",
        "|---|---|---|---|",
        _curve_row("first", first),
        _curve_row("last", last),
        *_evaluation_rows(summary),
        "",
        "## How to make it again",
        "",
        "```yaml",
        yaml.safe_dump({"train": dump_config(job.config)}, sort_keys=True).strip(),
        "```",
        "",
        "| what | digest |",
        "|---|---|",
        f"| this training | {job.out.footer['dpo.fingerprint']} |",
        *(f"| {name} | {ref.manifest.fingerprint} |" for name, ref in job.inputs.items()),
        f"| start, weights | {job.start.weights} |",
        *_describe_adapter(job.start),
        *(f"| reference, {key} | {value} |" for key, value in _reference(reference)),
        "",
    ]
    return "\n".join(lines)


def _describe_adapter(start: ModelPin) -> list[str]:
    if start.adapter is None:
        return []
    return [f"| start, {start.adapter.label} merged into it | {start.adapter.weights} |"]


def _curve_row(name: str, metrics: Mapping[str, float]) -> str:
    values = (metrics["loss"], metrics["rewards/margins"], metrics["rewards/accuracies"])
    return f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |"


def _evaluation_rows(summary: Mapping[str, Any]) -> list[str]:
    return [
        _curve_row(f"held-out pairs, {when}", summary[f"eval_{when}"])
        for when in ("before", "best", "after")
        if summary[f"eval_{when}"]
    ]


def _reference(config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if config is None:
        return []
    adapter = {"adapter": config["adapter"]["weights"]} if config["adapter"] else {}
    named = {**config["model"], **adapter}
    return [(key, str(value)) for key, value in sorted(named.items())]
