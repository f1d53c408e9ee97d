"""Four fault rounds; `python -m tests.faults --rounds 40` plays a long schedule."""

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.arena import Arena, find_differences, make_arena
from tests.faults.injections import FAULTS
from tests.faults.schedule import Appointment, make_schedule, play_round

SEED = 11
SHORT = [
    Appointment(number=1, fault="kill driver", stage="dedupe"),
    Appointment(number=2, fault="full disk", stage="score"),
    Appointment(number=3, fault="two runs", stage="train"),
    Appointment(number=4, fault="damage unfinished", stage="encode"),
]
"""Rounds that take seconds; tests/end_to_end kills the actors and workers of Ray."""


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return make_arena(tmp_path_factory.mktemp("faults"), num_pairs=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "appointment", SHORT, ids=lambda appointment: f"{appointment.fault} in {appointment.stage}"
)
def test_the_same_command_again_gives_the_same_bytes(
    arena: Arena, appointment: Appointment
) -> None:
    if missing := FAULTS[appointment.fault].needs():
        pytest.skip(missing)
    outcome = play_round(arena, SEED, appointment)
    assert outcome.failures == (), outcome.said


def test_a_schedule_follows_from_its_seed_and_has_every_kind_before_any_comes_again() -> None:
    schedule = make_schedule(5, 40)
    assert schedule == make_schedule(5, 40)
    assert schedule != make_schedule(6, 40)
    possible = {name for name, fault in FAULTS.items() if not fault.needs()}
    assert {appointment.fault for appointment in schedule[: len(possible)]} == possible
    assert all(appointment.stage in FAULTS[appointment.fault].stages for appointment in schedule)


@pytest.mark.slow
def test_what_is_changed_missing_or_more_is_a_difference(arena: Arena, tmp_path: Path) -> None:
    """find_differences sees changed, missing and extra files and records, not times and hosts."""
    store = tmp_path / "store"
    shutil.copytree(arena.undisturbed, store)
    for path in store.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "host": "another", "seconds": 1.0}))
    assert find_differences(arena, store, "evaluate") == []
    files = sorted((arena.stage_dir(store, "encode") / "data").iterdir())
    content = bytearray(files[0].read_bytes())
    content[100] ^= 1
    files[0].write_bytes(content)
    files[1].unlink()
    (files[2].with_name("part-00099-00000000.parquet")).write_bytes(b"")
    record = next((arena.stage_dir(store, "score") / "_commits").iterdir())
    changed = json.loads(record.read_text())
    changed["counts"]["num_in"] += 1
    record.write_text(json.dumps(changed))
    assert find_differences(arena, store, "evaluate") == [
        f"encode/data/{files[0].name} differs",
        f"encode/data/{files[1].name} is missing",
        "encode/data/part-00099-00000000.parquet more",
        f"score/_commits/{record.name} differs",
    ]
