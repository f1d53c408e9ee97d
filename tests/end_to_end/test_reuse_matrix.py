"""The reuse table of docs/explanation/reuse.md: how many sequences a change scores again.

Every row is run: a recipe is scored, something is changed, and it is scored again beside the first
output. The count in the manifest is compared with two numbers: the row's own, derived by hand, and
one from an oracle that compares tokens and uses no hash: sequences of the second run that are not
in the first, or all of them where the reference changed.
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

import stages.score.worker
from pipeline.runs import Run
from schemas.config import fields_of
from stages.score.config import ScoreConfig, ScoreExecution
from stages.scorers.opening import open_scorer
from stages.scorers.protocol import Scorer, ScorerSettings
from tests.end_to_end.conftest import plan_recipe, run_recipe
from tests.tiny_adapters import make_tiny_adapter
from tests.tiny_models import CHATML, make_tiny_model, shard_weights

DOCUMENT = Path(__file__).parents[2] / "docs" / "explanation" / "reuse.md"
BEGIN, END = "<!-- reuse table: begin -->", "<!-- reuse table: end -->"

NUM_PAIRS = 30
NUM_SEQUENCES = 2 * NUM_PAIRS
MAX_LENGTH, MAX_PROMPT_LENGTH = 128, 64

Sequence = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids and completion ids."""


def make_pair(number: int) -> dict[str, Any]:
    """Make a pair with a prompt of its own; every fifth is long."""
    long = number % 5 == 0
    return {
        "prompt": [
            {
                "role": "user",
                "content": f"What is {number} plus {3 * number}?" + long * " Do tell me, please.",
            }
        ],
        "chosen": [{"role": "assistant", "content": f"It is {4 * number}." + long * " Sure." * 12}],
        "rejected": [
            {"role": "assistant", "content": f"Who cares about {number}?" + long * " No." * 20}
        ],
    }


@dataclass(frozen=True, kw_only=True)
class Base:
    """A scored recipe, from which every change starts."""

    folder: Path
    recipe: dict[str, Any]
    sequences: set[Sequence]


@dataclass(kw_only=True)
class Workspace:
    """A copy of the store, and a recipe to change."""

    folder: Path
    base: Base
    recipe: dict[str, Any]
    selection: dict[str, Any] = field(default_factory=dict)
    run_name: str | None = None

    def stage(self, name: str) -> dict[str, Any]:
        block: dict[str, Any] = self.recipe["stages"].setdefault(name, {})
        return block

    def execution(self, name: str, **settings: Any) -> None:
        self.recipe.setdefault("execution", {})[name] = settings

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.base.folder / "pairs.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def write_rows(self, rows: list[dict[str, Any]], name: str = "changed.jsonl") -> None:
        """Write an input file, in place of the first run's."""
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        inputs = self.stage("validate")["inputs"]
        self.stage("validate")["inputs"] = [
            *(i for i in inputs if Path(i).parent == self.folder),
            str(path),
        ]

    def copy_model(self) -> Path:
        """Copy the model for score, so that the test may change it."""
        folder = self.folder / "model"
        shutil.copytree(self.stage("score")["model"], folder)
        self.stage("score")["model"] = str(folder)
        return folder

    def edit_config(self, **changed: Any) -> None:
        """Change keys of the model's config.json."""
        path = self.copy_model() / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **changed}))

    def run(self) -> Run:
        """Score the recipe as changed so far, before the row's own change."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return run_recipe(path, last="score")

    def write_template(self, text: str) -> None:
        path = self.folder / "template.jinja"
        path.write_text(text)
        self.stage("encode")["template"] = str(path)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A row of the table."""

    what: str
    apply: Callable[[Workspace], None]
    again: str
    """The sequences that are scored again, in the words of the table."""
    expected: int | Callable[[set[Sequence]], int]
    """Their number; a function of the first run's sequences where lengths decide."""
    scores_all: bool = False
    """Whether the reference itself changes, so that equal tokens are scored again, too."""


def edit_rows(edit: Callable[[list[dict[str, Any]]], None]) -> Callable[[Workspace], None]:
    def apply(space: Workspace) -> None:
        rows = space.rows()
        edit(rows)
        space.write_rows(rows)

    return apply


def configure(stage: str, **settings: Any) -> Callable[[Workspace], None]:
    return lambda space: space.stage(stage).update(settings)


def spread(stage: str, **settings: Any) -> Callable[[Workspace], None]:
    return lambda space: space.execution(stage, **settings)


def change_one_byte(space: Workspace) -> None:
    """Change the lowest bits of the last number in one of the weight files."""
    path = sorted(space.copy_model().glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(bytes(content))


def copy_model(space: Workspace) -> None:
    space.copy_model()


def quantise_the_cache(space: Workspace) -> None:
    """Add the file of NVIDIA's ModelOpt, which vLLM reads and transformers does not."""
    content = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (space.copy_model() / "hf_quant_config.json").write_text(json.dumps(content))


def add_adapter(space: Workspace) -> None:
    adapter = make_tiny_adapter(space.folder / "adapter", Path(space.stage("score")["model"]))
    space.stage("score")["adapter"] = str(adapter)


def change_one_byte_of_the_adapter(space: Workspace) -> None:
    add_adapter(space)
    space.run()
    path = space.folder / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(bytes(content))


def rename_adapter(space: Workspace) -> None:
    add_adapter(space)
    space.run()
    (space.folder / "adapter").rename(space.folder / "renamed")
    space.stage("score")["adapter"] = str(space.folder / "renamed")


def import_values(space: Workspace) -> None:
    """Import the first run's own values from a table."""
    rows = pl.read_parquet(f"{space.recipe['store']}/score/*/data/*.parquet")
    rows.write_parquet(space.folder / "table.parquet")
    table = str(space.folder / "table.parquet")
    space.stage("score").update(backend="import", table=table)


def change_one_imported_value(space: Workspace) -> None:
    import_values(space)
    space.run()
    path = space.folder / "table.parquet"
    rows = pl.read_parquet(path).to_dicts()
    rows[7]["ref_chosen_token_logps"][0] -= 1e-6
    pl.DataFrame(rows).write_parquet(path)


def rename_table(space: Workspace) -> None:
    import_values(space)
    space.run()
    (space.folder / "table.parquet").rename(space.folder / "renamed.parquet")
    space.stage("score")["table"] = str(space.folder / "renamed.parquet")


def rename_weights(space: Workspace) -> None:
    folder = space.copy_model()
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0", "part-0"))
    for path in folder.glob("model-*.safetensors"):
        path.rename(folder / path.name.replace("model-", "part-"))


def reformat_tokenizer(space: Workspace) -> None:
    path = space.copy_model() / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=7))


def drop_merges(space: Workspace) -> None:
    """Delete the tokenizer's merges, so that every token of text is one byte."""
    path = space.copy_model() / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))


def split_input(space: Workspace) -> None:
    rows = space.rows()
    space.write_rows(rows[:11], "one.jsonl")
    space.write_rows(rows[11:], "two.jsonl")


def move_store(space: Workspace) -> None:
    shutil.move(space.recipe["store"], space.folder / "moved")
    space.recipe["store"] = str(space.folder / "moved")


def use_other_store(space: Workspace) -> None:
    space.execution("score", reuse_from=[space.recipe["store"]])
    space.recipe["store"] = str(space.folder / "empty")


def edit_prompt(rows: list[dict[str, Any]]) -> None:
    rows[3]["prompt"][0]["content"] += "!"


def edit_answer(rows: list[dict[str, Any]]) -> None:
    rows[3]["chosen"][0]["content"] += "!"


def add_system_prompt(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["prompt"].insert(0, {"role": "system", "content": "Be kind."})


def flip_labels(rows: list[dict[str, Any]]) -> None:
    rows[3]["chosen"], rows[3]["rejected"] = rows[3]["rejected"], rows[3]["chosen"]


def append_pairs(rows: list[dict[str, Any]]) -> None:
    rows += [make_pair(NUM_PAIRS + number) for number in range(3)]


def append_answer(rows: list[dict[str, Any]]) -> None:
    """Append a pair with a known prompt and chosen answer and a new rejected one."""
    rows.append({**rows[3], "rejected": [{"role": "assistant", "content": "Ask someone else."}]})


def longer_than(limit: int) -> Callable[[set[Sequence]], int]:
    return lambda sequences: sum(len(p) + len(c) > limit for p, c in sequences)


def with_prompt_longer_than(limit: int) -> Callable[[set[Sequence]], int]:
    return lambda sequences: sum(len(p) > limit for p, _ in sequences)


def cut_by(limit: int) -> Callable[[set[Sequence]], int]:
    return lambda sequences: sum(len(p) + len(c) == limit for p, c in sequences)


EVERYTHING, NOTHING = "everything", "nothing"

MATRIX = [
    Change(
        what="one byte of one weight file",
        apply=change_one_byte,
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`config.json`: rope scaling",
        apply=lambda space: space.edit_config(
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        ),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`config.json`: epsilon of the norms",
        apply=lambda space: space.edit_config(rms_norm_eps=1e-3),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`hf_quant_config.json`: dtype of keys and values",
        apply=quantise_the_cache,
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`stages.score.adapter` added",
        apply=add_adapter,
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="one byte of the adapter's weights",
        apply=change_one_byte_of_the_adapter,
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`stages.score.backend`: import, of the very values that are there",
        apply=import_values,
        again="everything is taken from the table",
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`stages.score.table`: one value in it",
        apply=change_one_imported_value,
        again="everything is taken from the table",
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`stages.score.dtype`",
        apply=configure("score", dtype="bfloat16"),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`stages.score.backend`",
        apply=configure("score", backend="vllm"),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="`--again score`",
        apply=lambda space: space.selection.update(again="score"),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
        scores_all=True,
    ),
    Change(
        what="chat template: other text around the messages",
        apply=lambda space: space.write_template(CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n")),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
    ),
    Change(
        what="chat template: BOS in front",
        apply=lambda space: space.write_template("<|endoftext|>" + CHATML),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
    ),
    Change(
        what="chat template: none",
        apply=configure("encode", template="none"),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
    ),
    Change(
        what="a system prompt in every row",
        apply=edit_rows(add_system_prompt),
        again=EVERYTHING,
        expected=NUM_SEQUENCES,
    ),
    Change(
        what="`tokenizer.json`: no merges",
        apply=drop_merges,
        again="sequences with other tokens, here everything",
        expected=NUM_SEQUENCES,
    ),
    Change(
        what="`stages.encode.max_length`, smaller",
        apply=configure("encode", max_length=96),
        again="sequences longer than that",
        expected=longer_than(96),
    ),
    Change(
        what="`stages.encode.max_length`, larger",
        apply=configure("encode", max_length=256),
        again="sequences that were cut",
        expected=cut_by(MAX_LENGTH),
    ),
    Change(
        what="`stages.encode.max_prompt_length`, smaller",
        apply=configure("encode", max_prompt_length=36),
        again="both sides of pairs with longer prompts",
        expected=with_prompt_longer_than(36),
    ),
    Change(
        what="one prompt edited",
        apply=edit_rows(edit_prompt),
        again="both sides of that pair",
        expected=2,
    ),
    Change(what="one answer edited", apply=edit_rows(edit_answer), again="that side", expected=1),
    Change(
        what="three pairs appended",
        apply=edit_rows(append_pairs),
        again="both sides of each",
        expected=3 * 2,
    ),
    Change(
        what="one pair appended that shares prompt and chosen answer with another",
        apply=edit_rows(append_answer),
        again="its other answer",
        expected=1,
    ),
    Change(
        what="labels of one pair flipped", apply=edit_rows(flip_labels), again=NOTHING, expected=0
    ),
    Change(
        what="pairs removed",
        apply=edit_rows(lambda rows: rows.__delitem__(slice(5, 15))),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="duplicates appended",
        apply=edit_rows(lambda rows: rows.extend(rows[:4])),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="rows of the input shuffled",
        apply=edit_rows(random.Random(0).shuffle),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="input file renamed", apply=edit_rows(lambda rows: None), again=NOTHING, expected=0
    ),
    Change(what="input split into two files", apply=split_input, again=NOTHING, expected=0),
    Change(
        what="`stages.validate.eval_fraction`",
        apply=configure("validate", eval_fraction=0.5),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`stages.validate.split_seed`",
        apply=configure("validate", split_seed=7),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`stages.validate.split_bytes`",
        apply=configure("validate", split_bytes=1000),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`stages.dedupe.rows_per_shard`",
        apply=configure("dedupe", rows_per_shard=5),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`--again encode`",
        apply=lambda space: space.selection.update(again="encode"),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`tokenizer.json`: only its white space",
        apply=reformat_tokenizer,
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="chat template: a comment in it",
        apply=lambda space: space.write_template("{# ours #}" + CHATML),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="model folder copied or renamed",
        apply=copy_model,
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="adapter's folder renamed",
        apply=rename_adapter,
        again=NOTHING,
        expected=0,
    ),
    Change(what="imported table renamed", apply=rename_table, again=NOTHING, expected=0),
    Change(
        what="weight files renamed, and their index",
        apply=rename_weights,
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`config.json`: `transformers_version`",
        apply=lambda space: space.edit_config(transformers_version="4.0.0"),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`stages.train.learning_rate`",
        apply=configure("train", learning_rate=1e-2),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`stages.train.loss.beta`",
        apply=configure("train", loss={"kind": "sigmoid", "beta": 0.5}),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`stages.train.loss.kind`",
        apply=configure("train", loss={"kind": "ipo"}),
        again=NOTHING,
        expected=0,
    ),
    Change(what="`stages.train.seed`", apply=configure("train", seed=7), again=NOTHING, expected=0),
    Change(
        what="`execution.score.num_workers`",
        apply=spread("score", num_workers=3),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`execution.score.num_cpus_per_worker`",
        apply=spread("score", num_cpus_per_worker=1),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`execution.score.num_gpus_per_worker`",
        apply=spread("score", num_gpus_per_worker=0),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`execution.score.keep_logs`",
        apply=spread("score", keep_logs=True),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`execution.score.kv_cache_gib`",
        apply=spread("score", kv_cache_gib=0.5),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`execution.score.gpu_memory_fraction`",
        apply=spread("score", gpu_memory_fraction=0.5),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`execution.score.max_tokens_per_batch`",
        apply=spread("score", max_tokens_per_batch=999),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="`execution.score.tensor_parallel_size`",
        apply=spread("score", tensor_parallel_size=2),
        again=NOTHING,
        expected=0,
    ),
    Change(
        what="name of the recipe",
        apply=lambda space: space.recipe.update(name="another"),
        again=NOTHING,
        expected=0,
    ),
    Change(what="path of the store", apply=move_store, again=NOTHING, expected=0),
    Change(
        what="another store, and this one in `execution.score.reuse_from`",
        apply=use_other_store,
        again=NOTHING,
        expected=0,
    ),
]


def list_sequences(run: Run) -> set[Sequence]:
    """Collect the distinct sequences of the encoded pairs, as tokens."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    return {
        (tuple(prompt_ids), tuple(completion_ids))
        for prompt_ids, *sides in run.scan("encode").select(columns).collect().iter_rows()
        for completion_ids in sides
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    rows = "".join(json.dumps(make_pair(number)) + "\n" for number in range(NUM_PAIRS))
    (folder / "pairs.jsonl").write_text(rows)
    recipe = {
        "name": "matrix",
        "store": str(folder / "store"),
        "stages": {
            "validate": {"inputs": [str(folder / "pairs.jsonl")], "eval_fraction": 0.2},
            "dedupe": {"rows_per_shard": 8},
            "encode": {"max_length": MAX_LENGTH, "max_prompt_length": MAX_PROMPT_LENGTH},
            "score": {
                "model": str(shard_weights(make_tiny_model(folder / "model"))),
                "backend": "transformers",
                "dtype": "float32",
            },
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = run_recipe(folder / "recipe.yaml", last="score")
    sequences = list_sequences(run)
    assert len(sequences) == NUM_SEQUENCES
    assert run.manifest("score").summary["num_sequences_scored"] == NUM_SEQUENCES
    assert len(run.manifest("score").shards) == 4
    return Base(folder=folder, recipe=recipe, sequences=sequences)


@pytest.fixture
def space(base: Base, tmp_path: Path) -> Workspace:
    recipe = json.loads(json.dumps(base.recipe))
    shutil.copytree(recipe["store"], tmp_path / "store")
    recipe["store"] = str(tmp_path / "store")
    return Workspace(folder=tmp_path, base=base, recipe=recipe)


def open_as_transformers(model_path: str, settings: ScorerSettings) -> Scorer:
    """Replace vLLM by transformers: the counts do not depend on the engine."""
    return open_scorer(model_path, dataclasses.replace(settings, backend="transformers"))


MERGES_ADAPTERS = (add_adapter, change_one_byte_of_the_adapter, rename_adapter)
"""Changes that take seconds."""


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            change,
            id=change.what,
            marks=[pytest.mark.slow] if change.apply in MERGES_ADAPTERS else [],
        )
        for change in MATRIX
    ],
)
def test_exactly_what_changed_is_scored_again(
    change: Change, space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.score.worker, "open_scorer", open_as_transformers)
    monkeypatch.setenv("XDG_CACHE_HOME", str(space.base.folder / "cache"))
    change.apply(space)
    path = space.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(space.recipe))
    was_done = plan_recipe(path, last="score", **space.selection).stage("score").state == "done"
    run = run_recipe(path, last="score", **space.selection)
    counts = run.manifest("score").counts
    assert counts.num_rejected == 0
    num_imported = counts.more.get("num_sequences_imported", 0)
    num_scored = 0 if was_done else counts.more["num_sequences_scored"] + num_imported

    expected = change.expected
    assert num_scored == (expected if isinstance(expected, int) else expected(space.base.sequences))
    sequences = list_sequences(run)
    new = sequences if change.scores_all else sequences - space.base.sequences
    assert num_scored == len(new)
    if not was_done:
        assert counts.more["num_sequences_reused"] == len(sequences) - len(new)


def test_lengths_are_such_that_every_limit_matters(base: Base) -> None:
    """Each row about a length limit scores some sequences again, and not all."""
    for change in MATRIX:
        if not isinstance(change.expected, int):
            assert 0 < change.expected(base.sequences) < NUM_SEQUENCES


def test_no_setting_of_score_is_left_out() -> None:
    """Without a row, a setting could change values unnoticed, or rescore everything needlessly."""
    rows = " ".join(change.what for change in MATRIX)
    model = {"`stages.score.model`"}  # Rows about its files and its name cover it.
    settings = {f"`stages.score.{name}`" for name in fields_of(ScoreConfig)} - model
    settings |= {f"`execution.score.{name}`" for name in fields_of(ScoreExecution)}
    assert {name for name in settings if name not in rows} == set()


def make_table(sequences: set[Sequence]) -> str:
    """Build the table of the document from the sequences of the first run."""
    lines = [f"| what changes | what is scored again | of {NUM_SEQUENCES} |", "|---|---|---:|"]
    for change in MATRIX:
        expected = change.expected
        number = expected if isinstance(expected, int) else expected(sequences)
        lines.append(f"| {change.what} | {change.again} | {number} |")
    return "\n".join(lines)


def test_the_document_holds_the_table_that_is_tested(base: Base) -> None:
    table = make_table(base.sequences)
    found = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    assert found == table, f"paste this between the marks of {DOCUMENT}:\n{table}"
