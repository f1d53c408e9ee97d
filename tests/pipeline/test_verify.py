"""Do verify and show count right where a row gives several pairs?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console, RenderableType

from pipeline.plan import Plan, PlannedStage
from pipeline.resolve import ResolvedStage
from pipeline.runs import Run
from pipeline.show import show_run, show_stage
from pipeline.verify import find_faults, show_verdict, verdict_to_dict
from schemas.manifest import Manifest
from stages.folders import Folder
from stages.shards import StageDir, StageOutput
from stages.validate import STAGE
from stages.validate.formats import Draft, RowReader
from tests.stages.validate.running import jsonl, validate, write
from tests.stages_running import open_output

STRINGS = "prompt_completion_strings"


READ_ONE = RowReader.read


def read_several(_: RowReader, row: Mapping[str, Any]) -> list[Draft]:
    best, *others = row["answers"]
    pairs = ({"prompt": "Q", "chosen": best, "rejected": other} for other in others)
    return [draft for pair in pairs for draft in READ_ONE(RowReader(format=STRINGS), pair)]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageOutput:
    """Three rows: one gives two pairs and drops one, one gives one, one is rejected."""
    monkeypatch.setattr(RowReader, "read", read_several)
    rows = [{"answers": answers} for answers in (["A", "B", " ", "C"], ["D", "E"], ["F", "F"])]
    file = write(tmp_path / "a.jsonl", jsonl(rows))
    outcome = validate(tmp_path / "store", file, format=STRINGS)
    output = open_output(outcome.out, "validate", outcome.shards, summary=outcome.summary)
    outcome.out.finish(output.manifest)
    return output


def plan_for(output: StageOutput, manifest: Manifest) -> Plan:
    """Plan the one stage, as if it had finished with this manifest."""
    output.folder.write_bytes("manifest.json", msgspec.json.encode(manifest))
    planned = PlannedStage(
        resolved=ResolvedStage(stage=STAGE, config=None, pins={}, inputs=()),
        fingerprint=manifest.fingerprint,
        attempt=1,
        inputs={},
        out=StageDir(folder=output.folder, footer={}),
        state="done",
        why="",
        is_selected=True,
    )
    return Plan(recipe=None, store=Folder("."), stages=[planned], warnings=[])  # type: ignore[arg-type]


def rendered(shown: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    return " ".join(capture.get().split())


def test_rows_are_accounted_for_though_pairs_are_more(output: StageOutput) -> None:
    verdict = find_faults(plan_for(output, output.manifest))
    assert verdict.faults == []
    assert verdict_to_dict(verdict)["rows"] == {
        "validate": {"in": 3, "kept": 2, "rejected": {"CHOSEN_EQ_REJECTED": 1}, "written": 3}
    }
    assert "validate 3 2 1 = 3" in rendered(show_verdict(verdict))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"num_in": 4}, "validate: 4 rows in, but 2 kept and 1 rejected."),
        ({"num_out": 4}, "validate: data/ holds 3 rows, counted were 4."),
        ({"more": {"num_rows_kept": 4}, "num_in": 5}, "validate: 4 rows kept gave only 3 pairs."),
    ],
)
def test_a_count_that_does_not_add_up_is_a_fault(
    change: dict[str, Any], fault: str, output: StageOutput
) -> None:
    counts = msgspec.structs.replace(output.manifest.counts, **change)
    manifest = msgspec.structs.replace(output.manifest, counts=counts)
    assert find_faults(plan_for(output, manifest)).faults == [fault]


def test_show_tells_rows_from_pairs(output: StageOutput) -> None:
    [planned] = plan_for(output, output.manifest).stages
    text = rendered(show_stage(planned))
    assert "3 rows in, 2 as 3 pairs kept, 1 shards" in text
    assert "findings.num_pairs 3" in text
    assert "num_pairs_dropped 1" in text
    run = Run(name="made", outputs={"validate": output})
    assert "2 as 3 pairs kept, 1 rejected" in rendered(show_run(run, report=""))


def test_show_says_what_is_notable_and_what_to_do(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": f"A{at}", "rejected": "B", "source": "x" if at else "y"}
        for at in range(10)
    ]
    outcome = validate(tmp_path / "store", write(tmp_path / "a.jsonl", jsonl(rows)))
    output = open_output(outcome.out, "validate", outcome.shards, summary=outcome.summary)
    [planned] = plan_for(output, output.manifest).stages
    text = rendered(show_stage(planned))
    assert "largest sources pairs share x 9 90.0% y 1 10.0%" in text
    assert "SOURCE_SKEW 90.0% of the pairs are from x. Noted where" in text
    assert "Take fewer rows of the large one" in text
