"""Export a trained policy: a Hugging Face model folder with its card, and the adapter if any."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml

from schemas.config import dump_config
from schemas.errors import DataError
from schemas.manifest import FileRecord
from stages.models.fetch import fetch_model, fetch_tokenizer
from stages.models.merge_adapter import merge_layers, save_model
from stages.models.resolve import ModelPin
from stages.store.local_paths import describe_files, writable_path
from stages.train.config import TrainJob
from stages.train.policy import Policy
from stages.train.probe import Agreement, Probe, check_adapter, check_model, compare_logps
from stages.train.tokens import align_end_tokens, find_end_tokens, write_tokenizer


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifest says of an export."""

    end_token_ids: list[int]
    """Tokens at which generation with the exported model stops."""
    model: Agreement
    """The exported model, compared with the trained policy."""
    adapter: Agreement | None
    """The exported adapter on its base, compared likewise; None if all weights were trained."""
    rounded_base: Agreement | None
    """The adapter on the bfloat16 or quantised weights with which it was trained, in that dtype,
    compared likewise; None if those were float32."""


def export_model(
    policy: Policy,
    job: TrainJob,
    summary: Mapping[str, Any],
    probe: Probe,
    *,
    on_rounded_base: Probe | None = None,
) -> tuple[list[FileRecord], Export]:
    """Write `model/`, and `adapter/` if one was trained. The policy is unusable afterwards.

    Weights are stored in float32, as trained, even if the start is a bfloat16 release: bfloat16
    keeps 8 bits, and most changes made by a low learning rate would be rounded away. The same
    training exports the same bytes, without dates or local paths.

    Args:
        policy: with all weights in float32 and on this worker.
        probe: what it computes.
        on_rounded_base: what its adapter computed with the weights with which it was trained, if
            those are others.
    Raises:
        DataError: what was written does not compute what the policy computes; nothing is left.
    """
    for name in ("adapter", "model"):
        job.out.folder.delete_folder(name)
    try:
        files, export = _write_export(policy, job, summary, probe)
    except DataError:
        for name in ("adapter", "model"):
            job.out.folder.delete_folder(name)
        raise
    if on_rounded_base is not None:
        rounded_base = compare_logps(on_rounded_base.logps, probe)
        export = msgspec.structs.replace(export, rounded_base=rounded_base)
    return files, export


def _write_export(
    policy: Policy, job: TrainJob, summary: Mapping[str, Any], probe: Probe
) -> tuple[list[FileRecord], Export]:
    start, device = Path(fetch_model(job.start)), policy.model.device
    found_adapter, records = None, []
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(writable_path(job.out.folder.child("model")))
        if policy.adapter is not None:
            adapter = stack.enter_context(writable_path(job.out.folder.child("adapter")))
            _write_adapter(policy, adapter, base=adapter_base(job.start))
            records += describe_files(adapter, prefix="adapter/")
        end_token_ids = _write_model(policy, model, job, start=start)
        (model / "README.md").write_text(model_card(job, summary), encoding="utf-8")
        records += describe_files(model, prefix="model/")
        policy.model.to("meta")  # Its memory is the probe's.
        found_model = check_model(model, probe, device=device)
        if policy.adapter is not None:
            found_adapter = check_adapter(adapter, start, probe, device=device)
    export = Export(
        end_token_ids=end_token_ids, model=found_model, adapter=found_adapter, rounded_base=None
    )
    return records, export


def adapter_base(start: ModelPin) -> str:
    """Name the base model of the exported adapter.

    If another adapter was merged into the start, no hub model is the right base. The label returned
    then cannot be loaded, so that nobody loads the wrong one.
    """
    return start.spec if start.adapter is None else start.label


def _write_adapter(policy: Policy, path: Path, *, base: str) -> None:
    assert policy.adapter is not None
    # The base's embeddings are not the adapter's, even where it adapts them.
    policy.adapter.save_pretrained(str(path), save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)  # peft's unfilled template.
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    # peft writes the local path of the base, and the target modules in varying order.
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_model(policy: Policy, path: Path, job: TrainJob, *, start: Path) -> list[int]:
    """Write the model's files, and return the tokens at which generation with it stops."""
    model = policy.model
    if policy.adapter is not None:
        model = merge_layers(policy.adapter)
    save_model(model.to(torch.float32), path, start=start)
    tokenizer = Path(fetch_tokenizer(job.tokenizer))
    write_tokenizer(path, tokenizer, job.template)
    return align_end_tokens(path, find_end_tokens(job.inputs["encode"], tokenizer))


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
