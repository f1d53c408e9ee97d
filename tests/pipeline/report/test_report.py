"""Report pages: numbers agree with the tables, text is escaped, missing stages are named."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import polars as pl
import pytest

from pipeline.report import write_report
from pipeline.runs import Run
from schemas.errors import ConfigError
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput
from tests.pipeline.report.made_store import HOSTILE, STAGES, MadeRun

_VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """The visible text and the elements of a page."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.source = Path(path).read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._words: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "text escaped from its element"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self._words.append(data)

    @property
    def text(self) -> str:
        """All text with single spaces and ASCII minus signs."""
        return " ".join(" ".join(self._words).split()).replace("\u2212", "-")

    def attributes(self, name: str) -> Iterator[str]:
        for _, attributes in self.elements:
            value = attributes.get(name)
            if value is not None:
                yield value


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def first(store: Folder) -> Run:
    return MadeRun(store=store, name="made-1").write()


@pytest.fixture(scope="module")
def second(store: Folder) -> Run:
    return MadeRun(store=store, name="made-2", beta=0.2, num_steps=48).write()


@pytest.fixture(scope="module")
def page(store: Folder, first: Run) -> Page:
    return Page(write_report([first], store))


@pytest.fixture(scope="module")
def comparison(store: Folder, first: Run, second: Run) -> Page:
    return Page(write_report([first, second], store))


def read(run: Run, stage: str, table: str = "data/*") -> pl.DataFrame:
    """Read a table from its folder, as a user would."""
    return pl.read_parquet(f"{run.outputs[stage].folder.path}/{table}.parquet")


def show_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def test_headline_figures_agree_with_the_tables(page: Page, first: Run) -> None:
    rows = read(first, "evaluate")
    scored = read(first, "score").join(read(first, "encode"), on="pair_id")
    num_trained = scored.filter(pl.col("split") == "train").height
    num_correct = rows.filter(pl.col("margin") > 0).height
    margin = rows["margin"].mean()
    assert (
        f"prefers the chosen answer in {num_correct} of {rows.height} held-out pairs" in page.text
    )
    assert f"held-out reward accuracy {show_percent(num_correct / rows.height)}" in page.text
    assert isinstance(margin, float)
    assert f"mean held-out reward margin +{margin:.2f}" in page.text
    assert f"training pairs {num_trained} 36 steps" in page.text
    assert "pairs per second scored by the reference 4.51" in page.text
    assert f"{first.outputs['train'].folder.path}/model" in page.text


@pytest.mark.parametrize(
    ("num_reused", "figure", "rate"),
    [
        (
            160,
            "pairs per second scored by the reference 4.51 320 pairs, engine start-up excluded; "
            "25 % of sequences reused",
            "4.51 pairs/s",
        ),
        (640, "of reference log-probs reused 100 % 640 sequences, none computed", "all reused"),
    ],
)
def test_reused_sequences_are_no_scoring_speed(
    tmp_path: Path, num_reused: int, figure: str, rate: str
) -> None:
    """320 pairs are 640 sequences."""
    store = Folder(str(tmp_path))
    made = MadeRun(store=store, name="made", is_hostile=False, num_reused=num_reused)
    page = Page(write_report([made.write(until="score")], store))
    assert (
        f"Of 640 distinct sequences, {num_reused} were reused from 1 earlier scoring run."
        in page.text
    )
    assert figure in page.text
    assert f"Reference scoring {rate}" in page.text


def test_funnel_agrees_with_the_tables(page: Page, first: Run) -> None:
    for stage in ("validate", "dedupe", "encode"):
        kept, rejected = read(first, stage), read(first, stage, "rejected/*")
        by_split = dict(kept["split"].value_counts().rows())
        said = (
            f"{stage} {kept.height} kept {by_split['train']} for training, "
            f"{by_split['eval']} held out; {rejected.height} rejected:"
        )
        assert said in page.text
        for code, amount in rejected["code"].value_counts().rows():
            assert f"{amount} {code}" in page.text
            assert f"{code} {amount} row{'s' * (amount > 1)} in {stage}" in page.text
    validate = first.manifest("validate")
    assert f"raw {validate.counts.num_in} rows read" in page.text
    assert "Kept with a warning: 4 TIE." in page.text


def test_pairs_that_where_left_out_are_in_the_funnel(tmp_path: Path, first: Run) -> None:
    train = first.outputs["train"]
    manifest = msgspec.structs.replace(
        train.manifest,
        config={**train.manifest.config, "where": "weight < 2 <b>"},
        summary={**train.manifest.summary, "num_pairs_left_out": 40, "num_eval_pairs": 64},
    )
    outputs = {**first.outputs, "train": StageOutput(folder=train.folder, manifest=manifest)}
    chosen = Page(write_report([Run(name="chosen", outputs=outputs)], Folder(str(tmp_path))))
    num_train = train.manifest.summary["num_train_pairs"]
    assert (
        f"train {num_train + 64} kept {num_train} for training, 64 held out; "
        "40 rejected: 40 not where weight < 2 <b>" in chosen.text
    )


def test_findings_about_the_data_set_are_shown_with_advice(page: Page, first: Run) -> None:
    num_pairs = read(first, "validate").height
    assert (
        f"validate kept {num_pairs} pairs. Chosen answers have 13 characters on average, "
        "rejected answers 21." in page.text
    )
    assert f"the chosen answer is longer 25 % of {num_pairs}" in page.text
    assert f"only the rejected answer is a refusal 50 % of {num_pairs}" in page.text
    assert "nearly the same words" not in page.text
    assert "LENGTH_BIAS found <script>" in page.text
    assert "Threshold: it is long. Do something about it." in page.text


def test_preferences_of_the_reference_agree_with_the_tables(page: Page, first: Run) -> None:
    scored = read(first, "score").join(
        read(first, "encode").select("pair_id", "source"), on="pair_id"
    )
    prefers = scored["ref_chosen_logp"] > scored["ref_rejected_logp"]
    share = prefers.mean()
    assert isinstance(share, float)
    assert f"The reference already prefers the chosen answer in {show_percent(share)}" in page.text
    for (source,), rows in scored.with_columns(prefers=prefers).group_by("source"):
        own = rows["prefers"].mean()
        assert isinstance(own, float)
        assert f"{source} {show_percent(own)} of {rows.height}" in page.text


def test_charts_write_out_every_pair(page: Page, first: Run) -> None:
    """The bins in the table of the margin chart, against the rows."""
    margins = read(first, "evaluate")["margin"]
    table = page.text.split("of held-out reward margins are above zero", 1)[1]
    table = table.split("bin [from, to) pairs", 1)[1].split("In ", 1)[0]
    found = re.findall(r"(-?[\d.]+|below) to (-?[\d.]+|above) (\d+)", table)
    assert sum(int(amount) for *_, amount in found) == len(margins)
    for low, high, amount in found:
        first_edge = float("-inf") if low == "below" else float(low)
        last_edge = float("inf") if high == "above" else float(high)
        assert ((margins >= first_edge) & (margins < last_edge)).sum() == int(amount)


def test_curves_and_displacement_agree_with_the_tables(page: Page, first: Run) -> None:
    held_out = read(first, "train", "eval_metrics")
    start, end = held_out["rewards/margins"][0], held_out["rewards/margins"][-1]
    assert start == 0
    assert f"The reward margin rises from 0 to {end:.2f} on held-out pairs" in page.text
    displaced = read(first, "evaluate")["displaced"].mean()
    assert isinstance(displaced, float)
    assert (
        f"In {show_percent(displaced)} of held-out pairs both answers became less likely"
        in page.text
    )
    assert "is ±0.040: smaller differences are not meaningful" in page.text


def test_training_pairs_agree_with_the_tables(page: Page, first: Run) -> None:
    """In both epochs the margins of every eleventh pair fall below the others' trend."""
    visits = read(first, "train", "dynamics").join(read(first, "dedupe"), on="pair_id")
    falling = visits.filter(pl.col("source_row") % 11 == 0)
    swapped = set(falling["pair_id"])
    assert f"The margins of {len(swapped)} were far below the trend" in page.text
    table = page.text.split("Training pairs by source", 1)[1]
    for (source,), rows in visits.group_by("source"):
        # They are never learnt either, the others at once, and only theirs are not displaced:
        # all chosen answers fell, and the rejected ones as far as the margin rose.
        num_pairs = rows["pair_id"].n_unique()
        num_swapped = len(swapped & set(rows["pair_id"]))
        numbers = (num_pairs, num_swapped, 0, num_pairs - num_swapped, num_swapped)
        assert f"{source} {' '.join(map(str, numbers))}" in table
    shown = page.text.split("The most suspicious pairs", 1)[1].split("Held-out evaluation", 1)[0]
    found = re.findall(r"pair ([0-9a-f]{32})", shown)
    assert len(found) == 8
    assert set(found) <= swapped
    assert shown.count("Chosen Because of") == 8


def test_a_run_without_recorded_pairs_says_how_to_get_them(tmp_path: Path, first: Run) -> None:
    """Training recorded no pairs in stores of earlier versions."""
    train = first.outputs["train"]
    files = [file for file in train.manifest.files if file.name != "dynamics.parquet"]
    manifest = msgspec.structs.replace(train.manifest, files=files)
    outputs = {**first.outputs, "train": StageOutput(folder=train.folder, manifest=manifest)}
    old = Run(name="old", outputs=outputs)
    with pytest.raises(ConfigError, match=r"old was trained before .* with `--again train`"):
        old.dynamics()
    assert (
        "trained before training recorded its pairs"
        in Page(write_report([old], Folder(str(tmp_path)))).text
    )


def test_smoothed_rewards_are_means_over_pairs(page: Page, first: Run) -> None:
    """Values of 36 steps are averaged over two, which have 16 pairs each."""
    steps = read(first, "train", "metrics")
    chosen, rejected = (steps[f"rewards/{side}"].tail(2).mean() for side in ("chosen", "rejected"))
    assert isinstance(chosen, float)
    assert isinstance(rejected, float)
    assert (
        f"The reward ends at +{chosen:.3f} for chosen answers, {rejected:.2f} for rejected answers"
        in page.text
    )


def test_prompts_are_shown_as_messages(page: Page, comparison: Page) -> None:
    """Roles and contents come from the data, not from the rendered prompt of the generations."""
    for made in (page, comparison):
        assert "system Answer briefly. user <script>" in made.text
        calls = '[tool calls] [{"name": "search"}]'
        assert f"user Look it up. assistant {calls} tool (search) Nothing found." in made.text
        assert "<|im_start|>" not in made.text
        assert "What is the capital of France?" not in made.text


def test_a_prompt_without_messages_is_shown_as_rendered(tmp_path: Path) -> None:
    """dedupe's rows, which have the messages, were deleted."""
    store = Folder(str(tmp_path))
    whole = MadeRun(store=store, name="made", is_hostile=False).write()
    outputs = {stage: output for stage, output in whole.outputs.items() if stage != "dedupe"}
    text = Page(write_report([Run(name="made", outputs=outputs)], store)).text
    assert "<|im_start|>user What is the capital of France?<|im_end|>" in text


def test_rejected_pairs_are_shown_as_messages(page: Page, first: Run) -> None:
    """dedupe and encode reject pairs; validate rejects raw rows."""
    for stage, code, place in (
        ("dedupe", "DUP_EXACT", 1),
        ("encode", "SPECIAL_TOKEN_IN_TEXT", 321),
    ):
        part = page.text.split(f"{code} ", 2)[2]
        assert part.index(f"in {stage}") < part.index(f"user Question {place}: why")
        assert f"Chosen Because of {place}. Rejected Who cares about {place}?" in part


def test_hostile_text_is_shown_and_does_nothing(page: Page, comparison: Page) -> None:
    for made in (page, comparison):
        tags = {tag for tag, _ in made.elements}
        assert not tags & {"script", "img", "iframe", "object", "form", "base", "textarea"}
        handlers = [n for _, attributes in made.elements for n in attributes if n.startswith("on")]
        assert handlers == []
        assert not set("\x00\x07\x1b\u202e\r") & set(made.source)
        assert "<script>document.title='owned'</script><img src=x onerror=" in made.text
        assert "{{ 7 * 7 }}" in made.text
        assert "␛[31mred␛[0m␀␇⟨U+202E⟩gnitirw desrever⟨U+202C⟩" in made.text
    assert "re<b>writing</b>" in page.text


def test_nothing_is_loaded_from_elsewhere(page: Page, comparison: Page) -> None:
    for made in (page, comparison):
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            for value in made.attributes(name):
                assert value.startswith(("#", "data:,")), (name, value)
        for value in [*made.attributes("style"), made.source.split("</style>")[0]]:
            assert not re.search(r"url\((?!#)|@import|https?:", value)
        policies = [a["content"] for t, a in made.elements if t == "meta" and "http-equiv" in a]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_references_within_the_page_lead_somewhere(page: Page, comparison: Page) -> None:
    for made in (page, comparison):
        ids = list(made.attributes("id"))
        assert len(ids) == len(set(ids))
        links = [value[1:] for value in made.attributes("href") if value.startswith("#")]
        clips = re.findall(r"url\(#([\w-]+)\)", made.source)
        labels = list(made.attributes("aria-labelledby"))
        assert {*links, *clips, *labels} <= set(ids)
        declared = set(re.findall(r"(--[\w-]+):", made.source))
        assert set(re.findall(r"var\((--[\w-]+)\)", made.source)) <= declared


def test_every_chart_is_described(page: Page) -> None:
    labels = [a["aria-label"] for _, a in page.elements if a.get("role") == "img"]
    assert len(labels) == 15
    assert all(label is not None and len(label) > 30 for label in labels)
    assert page.source.count('<svg viewBox="0 0 360') == len(labels)
    assert len(page.source) < 500_000


def test_equal_runs_give_equal_bytes(store: Folder, first: Run, page: Page) -> None:
    """Written again in this process, and in one with another hash seed."""
    assert Path(write_report([first], store)).read_text(encoding="utf-8") == page.source
    script = (
        "from pathlib import Path\n"
        "from pipeline.report import write_report\n"
        "from stages.store.filesystems import Folder\n"
        "from tests.pipeline.report.made_store import MadeRun\n"
        f"store = Folder({store.uri!r})\n"
        "run = MadeRun(store=store, name='made-1').write()\n"
        f"write_report([run], store, output={store.file('again.html')!r})\n"
    )
    checkout = Path(__file__).parents[3]
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(checkout), "HOME": store.path}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=checkout, env=environment)
    assert Path(store.file("again.html")).read_text(encoding="utf-8") == page.source


@pytest.mark.parametrize("until", STAGES[:-1])
def test_missing_stages_are_named(tmp_path: Path, until: str) -> None:
    store = Folder(str(tmp_path))
    run = MadeRun(store=store, name="part", num_pairs=40).write(until=until)
    text = Page(write_report([run], store)).text
    missing = set(STAGES[STAGES.index(until) + 1 :])
    for stage, title in {
        "validate": "The data set as a whole",
        "encode": "Token counts",
        "score": "Reference log-probs",
        "train": "Training",
        "evaluate": "Held-out evaluation",
    }.items():
        left_out = f"{title} Not available: this run has no complete {stage} stage."
        assert (left_out in text) == (stage in missing)


def test_a_run_without_complete_stages_has_a_page(tmp_path: Path) -> None:
    path = write_report([Run(name="none", outputs={})], Folder(str(tmp_path)))
    assert "No stage is complete yet." in Page(path).text


@pytest.mark.parametrize("num_pairs", [0, 1, 6])
def test_few_pairs_have_a_page(tmp_path: Path, num_pairs: int) -> None:
    store = Folder(str(tmp_path))
    run = MadeRun(store=store, name="few", num_pairs=num_pairs, num_steps=1).write()
    other = MadeRun(store=store, name="other", num_pairs=num_pairs, beta=0.3, num_steps=1).write()
    num_held_out = read(run, "evaluate").height
    text = Page(write_report([run], store)).text
    assert ("No pairs were held out." in text) == (num_held_out == 0)
    write_report([run, other], store)


def test_long_training_stays_a_light_page(tmp_path: Path) -> None:
    store = Folder(str(tmp_path))
    run = MadeRun(store=store, name="long", num_pairs=40, num_steps=20_000).write()
    page = Page(write_report([run], store))
    assert len(page.source) < 500_000
    assert "20,000 steps" in page.text


def test_comparison_shows_differences_and_results(
    comparison: Page, first: Run, second: Run
) -> None:
    differences = comparison.text.split("Differences Settings", 1)[1].split("Curves", 1)[0]
    rows = differences.split("made-1 made-2", 1)[1]
    assert rows.split() == ["train.loss.beta", "0.1", "0.2"]
    means = [
        read(run, "evaluate").select(pl.col("margin").mean()).item() for run in (first, second)
    ]
    said = " ".join(f"+{mean:.2f}" for mean in means)
    assert f"mean held-out reward margin {said}" in comparison.text
    assert "All runs were trained and evaluated on the same encoded pairs." in comparison.text
    assert "the 95 % confidence intervals overlap" in comparison.text


def test_a_winner_is_named_where_intervals_are_apart(tmp_path: Path, first: Run) -> None:
    store = Folder(str(tmp_path))
    worse = MadeRun(store=store, name="worse", rejected_change=4.0).write()
    text = Page(write_report([worse, first], store)).text
    shares = [
        read(run, "evaluate").select(pl.col("correct").mean()).item() for run in (first, worse)
    ]
    said = f"{show_percent(shares[0])}, against {show_percent(shares[1])}."
    assert f"made-1 has the highest held-out accuracy: {said}" in text


def test_comparison_of_different_data_says_so(tmp_path: Path, first: Run) -> None:
    store = Folder(str(tmp_path))
    other = MadeRun(store=store, name="other-data", num_pairs=100).write()
    text = Page(write_report([first, other], store)).text
    assert "compare accuracies and margins with care" in text


def test_pages_go_to_the_store_or_to_the_given_path(
    store: Folder, first: Run, second: Run, tmp_path: Path
) -> None:
    assert write_report([first], store) == store.file("runs/made-1.html")
    assert write_report([first, second], store) == store.file("runs/compare-made-1-made-2.html")
    output = str(tmp_path / "deeper" / "page.html")
    assert write_report([first], store, output=output) == output
    assert Path(output).read_bytes() == Path(store.file("runs/made-1.html")).read_bytes()


@pytest.mark.parametrize("amount", [0, 7])
def test_more_runs_than_colours_are_refused(store: Folder, first: Run, amount: int) -> None:
    with pytest.raises(ConfigError, match=f"up to 6 runs; {amount} were given"):
        write_report([first] * amount, store)


def test_hostile_fixture_is_hostile() -> None:
    """The tests above search for these characters."""
    assert {"\x1b", "\x00", "\u202e", "\r", "<", '"', "'"} <= set(HOSTILE)
