"""Tests of prune: it finds what is left over, touches nothing else, and spares running runs."""

import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import yaml

from pipeline.commands.prune import Leftovers, delete_leftovers, find_leftovers
from pipeline.commands.verify import find_faults
from pipeline.execute import write_run_record
from schemas.errors import ConfigError, DataError
from stages.store.filesystems import Folder
from tests.end_to_end.conftest import (
    list_contents,
    plan_recipe,
    run_recipe,
    tiny_recipe,
    write_pairs,
)

OTHER_DATA = "stages.validate.eval_fraction=0.5"
"""Gives every stage another fingerprint."""
HEX = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe with one run, which has scored."""
    folder = tmp_path_factory.mktemp("scored")
    write_pairs(folder / "pairs.jsonl")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, tiny_model)))
    run_recipe(path, last="score")
    return path


@pytest.fixture
def recipe_path(scored: Path, tmp_path: Path) -> Path:
    """The recipe, with a copy of its store that a test may change."""
    recipe = yaml.safe_load(scored.read_text())
    shutil.copytree(scored.parent / "store", tmp_path / "store")
    recipe["store"] = str(tmp_path / "store")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def store(recipe_path: Path) -> Path:
    return recipe_path.parent / "store"


def find(store: Path, dropped: Iterable[str] = (), **options: bool | float) -> Leftovers:
    settings: dict[str, bool | float] = {"min_age_hours": 0.0, **options}
    return find_leftovers(Folder(str(store)), dropped=list(dropped), **settings)  # type: ignore[arg-type]


def listed(leftovers: Leftovers) -> set[str]:
    return {leftover.path for leftover in leftovers.going}


def paths_of(recipe: Path, *overrides: str, until: str = "score") -> set[str]:
    """Name the directories of a recipe's stages below its store."""
    uris = [stage.out.folder.uri for stage in plan_recipe(recipe, *overrides).stages]
    paths = {"/".join(uri.split("/")[-2:]) for uri in uris}
    names = ("validate", "dedupe", "encode", "score", "train", "evaluate")
    return {path for path in paths if names.index(path.split("/")[0]) <= names.index(until)}


def all_files(store: Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def forget(store: Path) -> None:
    """Delete the newest run's record."""
    max((store / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime_ns).unlink()


def test_a_run_needs_all_that_it_wrote(store: Path) -> None:
    assert find(store).found == []


def test_all_that_no_run_needs_goes_and_nothing_else(recipe_path: Path, store: Path) -> None:
    before = all_files(store)
    run_recipe(recipe_path, OTHER_DATA, last="score")
    forget(store)
    score = next((store / "score").iterdir())
    encode = store / sorted(path for path in paths_of(recipe_path) if path.startswith("encode/"))[0]
    shard = next((encode / "data").iterdir())
    planted = {
        encode / "_staging" / "part-00000.data.parquet",
        encode / "_work" / "pass" / "data" / "part-00000.parquet",
        shard.with_name("part-00000-ffffffff.parquet"),
        encode / f".manifest.json.{HEX}",
        store / "runs" / f".tiny.json.{HEX}",
        store / "reference" / "aaaaaaaaaaaa" / "bbbbbbbbbbbb.json",
    }
    for path in planted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    (store / "notes").mkdir()
    (store / "notes" / "mine.txt").write_text("not a stage's")
    (store / "score" / "mine").mkdir()
    found = find(store)
    within = {path.relative_to(store) for path in planted}
    folders = {encode.relative_to(store) / "_staging", encode.relative_to(store) / "_work"}
    expected = {str(path) for path in within if not folders & set(path.parents)}
    expected |= {str(path) for path in folders} | paths_of(recipe_path, OTHER_DATA)
    assert listed(found) == expected
    assert score.exists()  # Listing deletes nothing.
    assert {leftover.path for leftover in delete_leftovers(found)} == expected
    mine = {"notes/mine.txt": b"not a stage's"}
    assert all_files(store) == {**before, **mine}
    assert (store / "score" / "mine").exists()
    assert find_faults(plan_recipe(recipe_path)).faults == []
    assert find(store).found == []


def test_a_stage_that_a_run_has_begun_is_named_by_it(recipe_path: Path, store: Path) -> None:
    """It is kept however old it is, because the run may wait for a machine."""
    planned = plan_recipe(recipe_path, OTHER_DATA)
    write_run_record(planned, "begun")
    folder = Path(planned.stage("validate").out.folder.uri)
    (folder / "_staging").mkdir(parents=True)
    (folder / "_staging" / "part-00000.data.parquet").write_bytes(b"half")
    assert find(store).found == []
    assert listed(find(store, ["begun"])) == {"runs/begun.json", f"validate/{folder.name}"}


def test_what_was_written_recently_stays(recipe_path: Path, store: Path) -> None:
    run_recipe(recipe_path, OTHER_DATA, last="dedupe")
    forget(store)
    found = find(store, min_age_hours=1.0)
    assert {leftover.path for leftover in found.found} == paths_of(
        recipe_path, OTHER_DATA, until="dedupe"
    )
    assert all(leftover.kept_because.startswith("written ") for leftover in found.found)
    assert delete_leftovers(found) == []


def test_a_dropped_run_takes_along_only_what_no_other_needs(recipe_path: Path, store: Path) -> None:
    """Two runs share validate and dedupe; only encode and score of the dropped one are deleted."""
    [first] = [path.stem for path in (store / "runs").glob("*.json")]
    shorter = "stages.encode.max_length=100"
    before = run_recipe(recipe_path, shorter, last="score")
    contents = list_contents(before, ["validate", "dedupe", "encode", "score"])
    found = find(store, [first])
    gone = {path for path in paths_of(recipe_path) if path.startswith(("encode/", "score/"))}
    assert listed(found) == {f"runs/{first}.json", *gone}
    delete_leftovers(found)
    after = run_recipe(recipe_path, shorter, last="score")
    assert list_contents(after, ["validate", "dedupe", "encode", "score"]) == contents
    assert find_faults(plan_recipe(recipe_path, shorter)).faults == []


def test_a_dropped_run_keeps_its_record_while_something_of_it_stays(
    recipe_path: Path, store: Path
) -> None:
    [name] = [path.stem for path in (store / "runs").glob("*.json")]
    found = find(store, [name], min_age_hours=1.0)
    assert found.going == []
    assert (store / "runs" / f"{name}.json").exists()


def test_scores_go_with_their_entry_or_stay_with_it(recipe_path: Path, store: Path) -> None:
    run_recipe(recipe_path, "stages.score.dtype=bfloat16", last="score")
    forget(store)
    entries = set((store / "reference").rglob("*.json"))
    assert len(entries) == 2
    [kept] = find(store, keeps_scores=True).found
    assert kept.kept_because == "--keep-scores"
    assert "log-probs of 40 sequences" in kept.why  # Two for each of 20 pairs, all different.
    delete_leftovers(find(store))
    [left] = set((store / "reference").rglob("*.json"))
    assert (store / "score" / left.stem / "manifest.json").exists()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no runs/\*.json"):
        find(tmp_path)


def test_an_unknown_run_is_not_dropped(store: Path) -> None:
    with pytest.raises(ConfigError, match="other: no run has this name"):
        find(store, ["other"])


def test_nothing_goes_while_a_record_cannot_be_read(store: Path) -> None:
    (store / "runs" / "broken.json").write_text('{"name": "bro')
    with pytest.raises(DataError, match=r"broken\.json cannot be read"):
        find(store)


def test_a_run_that_begins_after_the_listing_keeps_its_outputs(
    recipe_path: Path, store: Path
) -> None:
    record = next((store / "runs").glob("*.json"))
    run_recipe(recipe_path, OTHER_DATA, last="dedupe")
    content = record.read_bytes()
    record.unlink()
    found = find(store)
    assert listed(found) == paths_of(recipe_path)
    before = all_files(store)
    record.write_bytes(content)
    assert delete_leftovers(found) == []
    assert all_files(store) == {**before, f"runs/{record.name}": content}
    assert find_faults(plan_recipe(recipe_path)).faults == []


def test_a_deletion_that_was_interrupted_is_finished_or_undone(
    recipe_path: Path, store: Path
) -> None:
    """It died after the rename; a run names one of the two stages that it had moved away."""
    before = all_files(store)
    run_recipe(recipe_path, OTHER_DATA, last="validate")
    forget(store)
    for number, path in enumerate(sorted(paths_of(recipe_path, until="validate"))):
        (store / "_pruned" / str(number) / "validate").mkdir(parents=True)
        shutil.move(store / path, store / "_pruned" / str(number) / path)
    [unnamed] = paths_of(recipe_path, OTHER_DATA, until="validate")
    (store / "_pruned" / "x" / "validate").mkdir(parents=True)
    shutil.move(store / unnamed, store / "_pruned" / "x" / unnamed)
    delete_leftovers(find(store))
    assert all_files(store) == before
    assert find_faults(plan_recipe(recipe_path)).faults == []


def test_objects_are_deleted_like_files(recipe_path: Path, store: Path) -> None:
    """Where folders cannot be renamed, a run that begins in the meantime keeps its manifests."""
    run_recipe(recipe_path, OTHER_DATA, last="dedupe")
    records = sorted((store / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    memory = fsspec.filesystem("memory")
    memory.put(str(store), "/pruned-store", recursive=True)
    folder = Folder("memory://pruned-store")
    late, content = f"runs/{records[-1].name}", records[-1].read_bytes()
    folder.delete_file(late)
    unnamed = paths_of(recipe_path, OTHER_DATA, until="dedupe")
    assert find_leftovers(folder, min_age_hours=1.0).going == []  # This storage has no file times.
    found = find_leftovers(folder, min_age_hours=0.0)
    assert listed(found) == unnamed
    folder.write_bytes(late, content)
    before = {file.name for file in folder.walk()}
    assert delete_leftovers(found) == []
    assert {file.name for file in folder.walk()} == before
    folder.delete_file(late)
    assert {leftover.path for leftover in delete_leftovers(found)} == unnamed
    after = {file.name for file in folder.walk()}
    assert after == {name for name in before if not name.startswith((*unnamed, late))}


def run_late(recipe: Path, *, delay_s: float) -> None:
    time.sleep(delay_s)
    run_recipe(recipe, last="dedupe")


def test_runs_that_begin_while_a_store_is_pruned_succeed_or_report_it(
    recipe_path: Path, tmp_path: Path
) -> None:
    """A run reuses complete outputs that no run names while they are being deleted."""
    stages = ("validate", "dedupe")
    run_recipe(recipe_path, OTHER_DATA, last="validate")  # A store needs a run.
    undisturbed = run_recipe(recipe_path, store=tmp_path / "undisturbed", last="dedupe")
    store = recipe_path.parent / "store"
    for name in ("score", "encode", "reference"):
        shutil.rmtree(store / name)
    for attempt in range(12):
        run_recipe(recipe_path, last="dedupe")
        forget(store)
        found = find(store)
        assert listed(found) == paths_of(recipe_path, until="dedupe")
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(run_late, recipe_path, delay_s=attempt * 0.001)
            delete_leftovers(found)
        if (error := late.exception()) is not None:
            assert "was deleted while this run began" in str(error)
        assert find_faults(plan_recipe(recipe_path)).faults == []
        again = run_recipe(recipe_path, last="dedupe")
        assert list_contents(again, stages) == list_contents(undisturbed, stages)
