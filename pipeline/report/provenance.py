"""What exactly made this run, and where does it lie?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from pipeline.report.wording import duration, one_line, visible
from pipeline.runs import Run
from schemas.fingerprint import attempt_folder
from schemas.manifest import Manifest

_SETTINGS_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True)
class StageProvenance:
    """One stage's record, in words."""

    stage: str
    fingerprint: str
    version: int
    inputs: str
    started_at: str
    host: str
    seconds: str
    versions: str
    folder: str
    settings: str
    """Its block of the recipe, every default filled in, as JSON."""


def describe_provenance(run: Run) -> list[StageProvenance]:
    """Give the records of all complete stages."""
    return [
        _describe_stage(run.manifest(stage), run.outputs[stage].folder.path)
        for stage in run.outputs
    ]


def model_folder(run: Run) -> str:
    """Give where the trained model lies."""
    return f"{run.outputs['train'].folder.path}/model"


def flatten(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Give every value of nested settings with its dotted key."""
    for key, value in settings.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, dotted)
        else:
            yield dotted, value


def _describe_stage(manifest: Manifest, folder: str) -> StageProvenance:
    settings = msgspec.json.format(msgspec.json.encode(manifest.settings), indent=2).decode()
    return StageProvenance(
        stage=manifest.stage,
        fingerprint=attempt_folder(manifest.fingerprint, manifest.attempt),
        version=manifest.version,
        inputs=", ".join(f"{name} {ref.folder}" for name, ref in manifest.inputs.items()),
        started_at=manifest.started_at,
        host=one_line(manifest.host),
        seconds=duration(manifest.seconds),
        versions=", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        folder=one_line(folder, max_characters=1000),
        settings=visible(settings, max_characters=_SETTINGS_CHARACTERS),
    )
