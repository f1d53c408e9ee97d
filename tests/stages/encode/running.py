"""Runs encode in this process over hand-made pairs, for tests."""

from pathlib import Path
from typing import Any

from schemas.manifest import Counts
from schemas.rows import PAIR, REJECTED
from stages.encode import run
from stages.encode.config import EncodeConfig, TemplatePin
from stages.models.resolve import pin_tokenizer
from stages.stage import Pin
from stages.store.shards import StageDir
from tests.stages_running import make_context, open_output, stage_dir


def run_stage(
    folder: Path, model: Path, rows: list[dict[str, Any]], template: str, **config: Any
) -> StageDir:
    before = stage_dir(folder, "dedupe")
    with before.write_shard(0, {"data": PAIR, "rejected": REJECTED}) as shard:
        shard.write_rows("data", rows)
        record = shard.commit(Counts(num_in=len(rows), num_out=len(rows)))
    out = stage_dir(folder, "encode")
    pins: dict[str, Pin] = {
        "tokenizer": pin_tokenizer(str(model)),
        "template": TemplatePin(template),
    }
    context = make_context(out, {"dedupe": open_output(before, "dedupe", [record])}, pins=pins)
    run(EncodeConfig(**{"max_reject_fraction": 1.0, **config}), context)
    return out
