"""Tests that the engine knows stages by their records: a seventh one is defined here."""

import ast
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from rich.console import Console, RenderableType

from pipeline.commands.estimate import Assumptions, make_estimate
from pipeline.commands.prune import delete_leftovers, find_leftovers
from pipeline.commands.show import plan_to_dict, show_plan, show_run, show_stage, show_state
from pipeline.commands.verify import find_faults, repair
from pipeline.execute import default_run_name, execute_plan
from pipeline.plan import Plan, Selection, make_plan
from pipeline.ray.session import Capacity
from pipeline.recipe import load_recipe
from pipeline.runs import open_record
from pipeline.stage_list import STAGE_NAMES, load_stages
from schemas.config import config_class
from schemas.errors import ConfigError
from schemas.manifest import Counts, Manifest, ShardRecord
from schemas.rows import REJECTED, Column, RowSchema
from stages.cost import Workload
from stages.stage import (
    AlignedShards,
    Cost,
    Display,
    EarlierOutput,
    Execution,
    FindingsTable,
    Pin,
    RecipeView,
    Reuse,
    ShardWorker,
    Stage,
    StageContext,
    StageResult,
    StageView,
    align_shards,
)
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput, read_file
from tests.end_to_end.conftest import tiny_recipe, write_pairs

ROOT = Path(__file__).parents[2]
MAY_NAME_STAGES = (
    *("stage_list.py", "report/", "sample/", "commands/export/"),
    *("pairs.py", "dynamics.py", "commands/show_pairs.py"),
)
"""What joins or shows the tables of given stages, below pipeline/."""
HERE = Capacity(num_cpus=2, num_gpus=0, num_cpus_per_node=2)
LENGTHS = RowSchema(
    name="lengths",
    version=1,
    columns=(
        Column("pair_id", pa.string(), "The pair."),
        Column("num_tokens", pa.int64(), "Tokens of both answers."),
    ),
)


@config_class
class MeasureConfig:
    """Settings of the seventh stage."""

    words: str | None = None
    """A file; absent: the inherited content."""
    limit: int | None = None
    """Tokens; absent: encode's max_length."""
    num_skipped: int = 0
    """Rows of each shard that are lost without a trace."""


@dataclass(frozen=True)
class FilePin:
    content: str

    def identity(self) -> str:
        return self.content


def pin_words(path: str) -> FilePin:
    return FilePin(Path(path).read_text())


def complete(config: MeasureConfig, recipe: RecipeView) -> MeasureConfig:
    if config.limit is not None:
        return config
    return replace(config, limit=recipe.config("encode").max_length)


def inherit_words(config: MeasureConfig, recipe: RecipeView) -> Mapping[str, Pin]:
    return {"words": FilePin("inherited")} if config.words is None else {}


@dataclass(frozen=True, kw_only=True)
class MeasureWorker:
    """Writes the number of tokens of each pair that is not too long."""

    encoded: Folder
    out: StageDir
    limit: int
    num_skipped: int

    def __call__(self) -> ShardWorker[AlignedShards]:
        return self.measure

    def measure(self, task: AlignedShards) -> ShardRecord:
        rows = read_file(self.encoded, task.records["encode"].files["data"]).to_pylist()
        rows = rows[self.num_skipped :]
        kept = [
            {"pair_id": row["pair_id"], "num_tokens": number}
            for row in rows
            if (number := row["num_chosen_tokens"] + row["num_rejected_tokens"]) <= self.limit
        ]
        with self.out.write_shard(task.index, {"data": LENGTHS, "rejected": REJECTED}) as shard:
            shard.write_rows("data", kept)
            shard.write_rows("rejected", [])
            return shard.commit(Counts(num_in=len(rows), num_out=len(kept)))


def run(config: MeasureConfig, ctx: StageContext) -> StageResult:
    assert config.limit is not None
    encoded = ctx.inputs["encode"]
    worker = MeasureWorker(
        encoded=encoded.folder, out=ctx.out, limit=config.limit, num_skipped=config.num_skipped
    )
    shards = ctx.map_shards(worker, align_shards(ctx.inputs, ["encode"]))
    return StageResult(shards=shards, summary={"limit": config.limit})


@dataclass(frozen=True)
class Source:
    folder: Folder
    versions: Sequence[Mapping[str, str]]


def find_sources(stage: StageView) -> list[Source]:
    return [Source(stage.store.child("elsewhere"), [{"python": "2.7.0"}])]


def measure_share(
    stage: StageView, earlier: Sequence[EarlierOutput], inputs: Mapping[str, StageOutput]
) -> float:
    assert inputs["encode"].manifest.counts.num_out == 20
    return 0.25 * len(earlier)


def list_highlights(manifest: Manifest) -> list[tuple[str, str]]:
    return [("limit of lengths", str(manifest.summary["limit"]))]


def list_tables(manifest: Manifest) -> list[FindingsTable]:
    return [FindingsTable(title="limits", columns=("tokens",), rows=[("default", "128")])]


def count_work(stage: StageView, load: Workload) -> float:
    return 36_000 * (1 - load.share_reused)


MEASURE = Stage(
    name="measure",
    version=1,
    needs=lambda config: ("encode", "evaluate"),
    config=MeasureConfig,
    execution=Execution,
    run=run,
    complete=complete,
    pins={"words": pin_words},
    inherit_pins=inherit_words,
    row_name="lengths",
    reads_every_row=True,
    numeric_packages=("pyarrow",),
    reuse=Reuse(
        unit="lengths",
        index="lengths",
        find=find_sources,
        measure_share=measure_share,
        read_versions=lambda manifest: [{"python": "2.7.1"}],
        describe_reused=lambda counts: "1 of 20 lengths",
        describe_value=lambda counts: f"{counts.num_out} lengths",
    ),
    is_redone_whole=True,
    names_runs=True,
    cost=Cost(count_work=count_work, rate_per_core=1.0, measure=lambda manifest, store: None),
    display=Display(
        list_highlights=list_highlights,
        list_tables=list_tables,
        products={"lengths": "data"},
    ),
)


def plan_own(path: Path, *overrides: str, selection: Selection | None = None) -> Plan:
    stages = [*load_stages(), MEASURE]
    recipe = load_recipe(str(path), overrides=overrides, stage_list=stages)
    return make_plan(recipe, selection, has_gpus=False)


def rendered(shown: RenderableType) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(shown)
    return " ".join(capture.get().split())


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_pairs(folder / "pairs.jsonl")
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, tiny_model)))
    return path


@pytest.fixture(scope="module")
def finished(recipe_path: Path) -> Path:
    execute_plan(plan_own(recipe_path), capacity=HERE, is_local=True)
    return recipe_path


def test_the_engine_names_no_stage() -> None:
    """The list of stages does, and so does what is about given tables, such as the report."""
    names = set(STAGE_NAMES)
    for path in (ROOT / "pipeline").rglob("*.py"):
        place = path.relative_to(ROOT / "pipeline").as_posix()
        if place.startswith(MAY_NAME_STAGES):
            continue
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert not strings & names, place


def test_planning_imports_neither_torch_nor_vllm_nor_ray(recipe_path: Path) -> None:
    code = (
        "import sys; from pipeline.plan import make_plan; from pipeline.recipe import load_recipe; "
        f"make_plan(load_recipe({str(recipe_path)!r}), has_gpus=False); "
        "print([name for name in ('torch', 'vllm', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_its_settings_are_completed_pinned_and_hashed(recipe_path: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("one two")
    inherited = plan_own(recipe_path).stage("measure").resolved.identity
    assert inherited == {"words": "inherited", "limit": 128, "num_skipped": 0}
    given = plan_own(recipe_path, f"stages.measure.words={words}", "stages.measure.limit=5")
    assert given.stage("measure").resolved.identity == {
        "words": "one two",
        "limit": 5,
        "num_skipped": 0,
    }


def test_it_is_selected_by_its_name(recipe_path: Path) -> None:
    with pytest.raises(ConfigError, match="measure needs encode, which is not complete"):
        plan_own(recipe_path, selection=Selection(only="measure"))
    with pytest.raises(ConfigError, match=r"Stages: validate, .*, evaluate, measure"):
        plan_own(recipe_path, selection=Selection(only="mesure"))


def test_what_it_would_reuse_is_planned_and_warned_of(recipe_path: Path) -> None:
    plan = plan_own(recipe_path)
    assert "equal lengths are reused from 1 earlier" in plan.stage("measure").why
    [warning] = [warning for warning in plan.warnings if "measure" in warning]
    assert "measure would reuse values from" in warning
    assert "python 2.7.0 (now 3." in warning


def test_it_is_run_and_shown(finished: Path) -> None:
    plan = plan_own(finished)
    assert [stage.state for stage in plan.stages] == ["done"] * 7
    assert plan_to_dict(plan)[-1]["stage"] == "measure"
    measured = plan.stage("measure")
    assert default_run_name(plan) == f"tiny-{measured.ref.folder}"
    assert "✓ done" in rendered(show_plan(plan))
    assert "measure ✓ done 20 20 0" in rendered(show_state(plan))
    shown = rendered(show_stage(measured))
    assert "20 rows in, 20 kept, 3 shards" in shown
    assert "limits tokens default 128" in shown
    record = execute_plan(plan, capacity=HERE, is_local=True)
    summed_up = rendered(show_run(open_record(plan.store, record), plan.recipe.stage_list))
    assert "measure 20 kept, 0 rejected" in summed_up
    assert "limit of lengths 128" in summed_up
    assert f"lengths {measured.out.folder.uri}/data" in summed_up
    [warning] = [warning for warning in plan.warnings if "measure" in warning]
    assert "measure holds values from earlier outputs that python 2.7.1" in warning


def test_it_is_estimated(finished: Path) -> None:
    """27,000 of 36,000 rows, a quarter is reused, at one row a second and core take 7.5 hours."""
    found = make_estimate(plan_own(finished, "stages.measure.limit=9"), HERE, Assumptions())
    own = found.stages[-1]
    assert own.stage == "measure"
    assert (own.hours - 60 / 3600) * own.num_workers == pytest.approx(7.5)
    assert found.share_reused == 0.25


def test_its_files_and_rows_are_verified_and_it_is_redone_whole(finished: Path) -> None:
    plan = plan_own(finished)
    assert find_faults(plan).faults == []
    folder = Path(plan.stage("measure").out.folder.path)
    victim = next((folder / "data").iterdir())
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    verdict = find_faults(plan)
    assert str(victim) in verdict.faults[0].sentence
    assert repair(plan, verdict) == ["measure"]
    assert not folder.exists()
    execute_plan(plan_own(finished), capacity=HERE, is_local=True)
    assert victim.read_bytes() == content
    assert find_faults(plan_own(finished)).faults == []


def test_rows_that_it_loses_are_noticed(finished: Path) -> None:
    """One in each of three shards; its own counts agree with each other."""
    losing = plan_own(finished, "stages.measure.num_skipped=1")
    execute_plan(losing, capacity=HERE, is_local=True, run_name="losing")
    [fault] = find_faults(losing).faults
    assert fault.sentence == "measure read 17 rows, encode has 20."


def test_what_no_run_needs_of_it_is_pruned(finished: Path) -> None:
    shorter = plan_own(finished, "stages.measure.limit=9")
    execute_plan(shorter, capacity=HERE, is_local=True, run_name="shorter")
    (Path(shorter.store.path) / "runs" / "shorter.json").unlink()
    folder = shorter.stage("measure").ref.folder
    entry = Path(shorter.store.path) / "lengths" / "key" / f"{folder}.json"
    entry.parent.mkdir(parents=True)
    entry.write_text("{}")
    stages = [*load_stages(), MEASURE]
    found = find_leftovers(shorter.store, min_age_hours=0.0, stage_list=stages)
    [leftover] = found.going
    assert leftover.path == f"measure/{folder}"
    assert "later ones could reuse" in leftover.why
    assert delete_leftovers(found) == [leftover]
    assert not entry.exists()
    assert plan_own(finished).stage("measure").state == "done"
