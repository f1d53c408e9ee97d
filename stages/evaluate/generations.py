"""Greedy answers to held-out prompts, before and after training."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from schemas.manifest import Counts, ShardRecord
from schemas.rows import GENERATION
from stages.evaluate.trained import LocalModel, Trained
from stages.models.fetch import fetch_model
from stages.models.resolve import ModelPin
from stages.policy.groups import IntArray
from stages.scorers.opening import open_scorer
from stages.scorers.pairs import list_values
from stages.scorers.protocol import ScorerSettings
from stages.stage import ShardWorker
from stages.store.shards import StageDir, StageOutput

PROMPT_COLUMNS = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """The only task of generation."""

    index: int = 0
    description: str = "generations"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out pair whose prompt both models answer."""

    pair_id: str
    prompt_ids: IntArray
    chosen_ids: IntArray
    rejected_ids: IntArray


def choose_pairs(encoded: StageOutput, num_pairs: int) -> dict[int, set[str]]:
    """Choose the first held-out pairs by pair_id, one for each prompt.

    Returns:
        pair_ids by shard number; equal prompts are always in the same shard.
    """
    firsts: list[tuple[str, int]] = []
    for record in encoded.manifest.shards:
        rows = encoded.read(record, columns=["pair_id", "prompt_id", "split"])
        held_out = rows.filter(pc.equal(rows["split"], "eval"))
        by_prompt = held_out.group_by("prompt_id").aggregate([("pair_id", "min")])
        found = [(pair_id, record.index) for pair_id in by_prompt["pair_id_min"].to_pylist()]
        firsts = heapq.nsmallest(num_pairs, [*firsts, *found])
    chosen: dict[int, set[str]] = {}
    for pair_id, index in firsts:
        chosen.setdefault(index, set()).add(pair_id)
    return chosen


def read_questions(encoded: StageOutput, num_pairs: int) -> list[Question]:
    """Read the chosen pairs, sorted by pair_id."""
    chosen = choose_pairs(encoded, num_pairs)
    questions = [
        question
        for record in encoded.manifest.shards
        if record.index in chosen
        for question in _read_shard(encoded, record)
        if question.pair_id in chosen[record.index]
    ]
    return sorted(questions, key=lambda question: question.pair_id)


def _read_shard(encoded: StageOutput, record: ShardRecord) -> Iterator[Question]:
    rows = encoded.read(record, columns=PROMPT_COLUMNS)
    ids = [list_values(rows, name) for name in PROMPT_COLUMNS[1:]]
    for pair_id, prompt_ids, chosen_ids, rejected_ids in zip(
        rows["pair_id"].to_pylist(), *ids, strict=True
    ):
        yield Question(
            pair_id=pair_id, prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids
        )


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """Picklable settings of the worker; calling it in the worker's process makes the worker."""

    encoded: StageOutput
    out: StageDir
    start: ModelPin
    trained: Trained
    settings: ScorerSettings
    """Scorer settings for both models."""
    num_generations: int
    max_new_tokens: int

    def __call__(self) -> ShardWorker[GenerationTask]:
        return self.generate

    def generate(self, task: GenerationTask) -> ShardRecord:
        """Answer every question with both models in turn, and commit the texts."""
        questions = read_questions(self.encoded, self.num_generations)
        before = self._answer(fetch_model(self.start), questions)
        with self.trained.fetch() as path:
            after = self._answer(path, questions)
            rows = describe_answers(path, questions, before=before, after=after)
        with self.out.write_shard(task.index, {"data": GENERATION}) as shard:
            shard.write_rows("data", rows)
            return shard.commit(Counts(num_in=len(rows), num_out=len(rows)))

    def _answer(self, path: LocalModel, questions: Sequence[Question]) -> list[IntArray]:
        scorer = open_scorer(path, self.settings)
        answers = scorer.generate(
            [question.prompt_ids for question in questions], max_new_tokens=self.max_new_tokens
        )
        scorer.close()
        return answers


def describe_answers(
    path: LocalModel,
    questions: Sequence[Question],
    *,
    before: Sequence[IntArray],
    after: Sequence[IntArray],
) -> list[Mapping[str, Any]]:
    """Decode token ids with the tokenizer of the trained model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    def read(ids: IntArray, *, is_prompt: bool = False) -> str:
        text = tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=not is_prompt)
        assert isinstance(text, str)
        return text

    return [
        {
            "pair_id": question.pair_id,
            "prompt": read(question.prompt_ids, is_prompt=True),
            "before": read(before_ids),
            "after": read(after_ids),
            "chosen": read(question.chosen_ids),
            "rejected": read(question.rejected_ids),
        }
        for question, before_ids, after_ids in zip(questions, before, after, strict=True)
    ]
