"""The table that a sweep ends with."""

import io

from rich.console import Console

from pipeline.commands.sweep.ranking import RankedRun, Ranking, show_ranking
from pipeline.report.data import Share


def ranked(name: str, num_true: int | None, **fields: str) -> RankedRun:
    share = None if num_true is None else Share(label="", num_true=num_true, num_pairs=100)
    return RankedRun(
        name=name,
        settings={"beta": name[-1]},
        **{"state": "done", "why": "", **fields},
        accuracy=share,
        mean_margin=None if share is None else 0.5,
        loss=None,
        rungs=[],
        model=None if share is None else f"/store/{name}/model",
    )


def test_the_table_names_the_best_model_and_how_sure_that_is() -> None:
    """95 % Wilson intervals by hand: 90 of 100 is 82.6 to 94.5, 85 is 76.7 to 90.7, 60 below."""
    runs = [
        ranked("run-1", 90),
        ranked("run-2", 85),
        ranked("run-3", 60),
        ranked("run-4", None, state="stopped", why="after step 2 of 8"),
    ]
    stream = io.StringIO()
    Console(file=stream, width=200).print(
        show_ranking(Ranking(name="sweep", runs=runs, page="/store/sweeps/sweep.html"))
    )
    shown = stream.getvalue()
    first = next(line for line in shown.splitlines() if line.startswith("1 "))
    assert first.split() == ["1", "1", "90.0%", "82.6%", "to", "94.5%", "+0.500", "done", "run-1"]
    assert "stopped after step 2 of 8" in shown
    assert "best model: /store/run-1/model" in shown
    assert "The best run's interval overlaps with those of 1 of 2 others" in shown
    assert "page: /store/sweeps/sweep.html" in shown
