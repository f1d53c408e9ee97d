"""Command line of the fault rounds: `python -m tests.faults --seed 1 --rounds 40`.

`--table docs/explanation/faults.md` writes the page's table. `--record FILE` stores each round as
it ends and skips the rounds already stored, so that a long schedule can be interrupted.
"""

import argparse
import collections
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.faults.arena import make_arena
from tests.faults.injections import FAULTS, SCORING
from tests.faults.schedule import Outcome, make_schedule, play_round


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument(
        "--fault", action="append", choices=sorted(FAULTS), help="play only this fault; repeatable"
    )
    parser.add_argument("--stage", action="append", help="hit only this stage; repeatable")
    parser.add_argument("--record", type=Path, help="JSON lines file to resume from")
    parser.add_argument("--table", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # Runs the clean-up.
    stages = arguments.stage or (SCORING if arguments.backend == "vllm" else None)
    schedule = make_schedule(
        arguments.seed, arguments.rounds, faults=arguments.fault, stages=stages
    )
    played = {outcome.appointment: outcome for outcome in read_record(arguments.record)}
    waiting = [appointment for appointment in schedule if appointment not in played]
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        arena = make_arena(Path(folder), arguments.backend) if waiting else None
        for appointment in waiting:
            assert arena is not None
            played[appointment] = play_round(arena, arguments.seed, appointment)
            print(_line(played[appointment]), flush=True)
            if arguments.record:
                with arguments.record.open("ab") as stream:
                    stream.write(msgspec.json.encode(played[appointment]) + b"\n")
    outcomes = [played[appointment] for appointment in schedule]
    num_failed = sum(bool(outcome.failures) for outcome in outcomes)
    print(f"{len(outcomes) - num_failed} passed, {num_failed} failed")
    if arguments.table:
        write_table(arguments.table, arguments.backend, arguments.seed, outcomes)
    return 1 if num_failed else 0


def read_record(path: Path | None) -> list[Outcome]:
    """Read the outcomes of rounds played before."""
    if path is None or not path.exists():
        return []
    return [msgspec.json.decode(line, type=Outcome) for line in path.read_bytes().splitlines()]


def _line(outcome: Outcome) -> str:
    appointment = outcome.appointment
    words = "; ".join(failure[:3000] for failure in outcome.failures) or "same bytes"
    head = f"{appointment.number:3} {appointment.fault} in {appointment.stage}"
    return f"{head}: {outcome.said} -> {words} ({outcome.seconds:.0f} s)"


def write_table(page: Path, backend: str, seed: int, outcomes: list[Outcome]) -> None:
    """Write the table of outcomes between its marks on a page."""
    lines = ["| | fault | stage | what happened | again | s |", "|---:|---|---|---|---|---:|"]
    for outcome in outcomes:
        appointment = outcome.appointment
        said = outcome.said.replace("|", "\\|")
        again = "; ".join(outcome.failures) or "the same bytes"
        title = FAULTS[appointment.fault].title
        lines.append(
            f"| {appointment.number} | {title} | {appointment.stage} | {said} | {again} "
            f"| {outcome.seconds:.0f} |"
        )
    counted = collections.Counter(outcome.appointment.fault for outcome in outcomes)
    summary = f"{len(outcomes)} rounds, seed {seed}, backend `{backend}`; {len(counted)} kinds."
    begin, end = f"<!-- faults {backend}: begin -->", f"<!-- faults {backend}: end -->"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    table = "\n".join([begin, summary, "", *lines, end])
    page.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
