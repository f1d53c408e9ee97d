"""Worker of the score stage: join in earlier values, score the rest, check the engine."""

import dataclasses
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from schemas.manifest import ShardRecord
from schemas.rows import REJECTED, SCORE
from stages.models.fetch import fetch_model
from stages.models.resolve import ModelPin
from stages.policy.groups import Group
from stages.score.checks import (
    SharingCheck,
    StartedCheck,
    WorkerCheck,
    choose_neighbours,
    choose_siblings,
    compare_sample,
    compare_sharing,
    judge_sample,
    recompute_sample,
    score_together,
    write_check,
)
from stages.score.progress import PartDone, forget_part, report_part
from stages.score.reuse import EarlierScore, ScoreReader
from stages.score.rows import commit_scores
from stages.score.summary import count_found
from stages.scorers.opening import open_plain, open_scorer
from stages.scorers.pairs import (
    ENCODED_COLUMNS,
    Fault,
    SequenceGroup,
    SequenceLogps,
    list_groups,
    score_sequences,
)
from stages.scorers.protocol import FloatArray, Scorer, ScorerSettings, ScoreStatistics
from stages.stage import AlignedShards, ShardWorker
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_file


def leave_out(groups: Iterable[SequenceGroup], found: Container[str]) -> Iterator[SequenceGroup]:
    """Drop the sequences whose values are known; groups without any other are left out."""
    for sequences in groups:
        left = sequences.without(found)
        if left is not None:
            yield left


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Picklable settings of a worker; calling it in the worker's process makes the worker."""

    encoded: Folder
    out: StageDir
    model: ModelPin
    settings: ScorerSettings
    reference: str
    """Fingerprint of the reference."""
    earlier: Sequence[EarlierScore]
    """Earlier scores to look up values in before computing any."""

    def __call__(self) -> ShardWorker[AlignedShards]:
        return ShardScorer(
            job=self, reader=ScoreReader(scores=self.earlier, reference=self.reference)
        )


@dataclass(kw_only=True)
class ShardScorer:
    """Scores shards with one engine. No value depends on earlier shards.

    The model is fetched when the first sequence is needed that no earlier score holds.
    """

    job: ScoreJob
    reader: ScoreReader
    _model_path: str | None = None
    _scorer: Scorer | None = None
    _is_checked: bool = False

    def __call__(self, task: AlignedShards) -> ShardRecord:
        try:
            return self._score_shard(task)
        except Exception:
            # The engine may have lost a process or still hold requests, so the next shard opens a
            # new one, which is checked like the first.
            self._close_scorer()
            self._is_checked = False
            raise
        finally:
            forget_part(self.job.out, task.index)

    def _score_shard(self, task: AlignedShards) -> ShardRecord:
        job = self.job
        encoded = read_file(
            job.encoded, task.records["encode"].files["data"], columns=ENCODED_COLUMNS
        )
        found = self.reader.find(encoded)
        all_groups = list_groups(encoded)
        groups = list(leave_out(all_groups, found.logps))
        # Sample from all groups: few may be left to score, and the check needs enough sequences.
        check = self._begin_check(all_groups) if groups and not self._is_checked else None
        num_sequences = sum(len(sequences.sequence_ids) for sequences in all_groups)
        started = time.perf_counter()

        def report(num_scored: int, statistics: ScoreStatistics) -> None:
            pairs_per_sequence = encoded.num_rows / num_sequences
            part = PartDone(
                num_pairs=encoded.num_rows,
                num_pairs_done=round((len(found.logps) + num_scored) * pairs_per_sequence),
                num_pairs_scored=round(num_scored * pairs_per_sequence),
                seconds=time.perf_counter() - started,
                statistics=statistics,
            )
            report_part(job.out, task.index, part)

        with job.out.write_shard(task.index, {"data": SCORE, "rejected": REJECTED}) as shard:
            scored, statistics = self._score(groups, report)
            if check:
                groups_left = check.sample.list_groups(besides=scored)
                of_sample = {**scored, **self._score(groups_left, report)[0]}
                self._finish_check(task.index, check, of_sample)
            return commit_scores(
                shard,
                encoded,
                {**found.logps, **scored},
                more={
                    "num_sequences_scored": len(scored),
                    **count_found(found),
                    **dataclasses.asdict(statistics),
                },
            )

    def _score(
        self,
        groups: Sequence[SequenceGroup],
        report: Callable[[int, ScoreStatistics], None],
    ) -> tuple[SequenceLogps, ScoreStatistics]:
        """Score groups, reporting progress between calls; without groups no engine is started."""
        if not groups:
            return {}, ScoreStatistics()
        scorer = self._open_scorer()
        before = scorer.statistics
        logps: dict[str, FloatArray | Fault] = {}
        num_at_once = self.job.settings.num_prompts_at_once
        for start in range(0, len(groups), num_at_once):
            if start:
                report(len(logps), scorer.statistics.since(before))
            logps.update(score_sequences(scorer, groups[start : start + num_at_once]))
        return logps, scorer.statistics.since(before)

    def _fetch_model(self) -> str:
        if self._model_path is None:
            self._model_path = fetch_model(self.job.model)
        return self._model_path

    def _open_scorer(self) -> Scorer:
        if self._scorer is None:
            self._scorer = open_scorer(self._fetch_model(), self.job.settings)
        return self._scorer

    def _close_scorer(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None

    def _begin_check(self, groups: Sequence[SequenceGroup]) -> StartedCheck:
        """Recompute a sample with plain transformers, and try the engine on a few sequences.

        The engine is closed while plain transformers computes, to free memory.
        """
        self._close_scorer()
        plain = open_plain(self._fetch_model(), num_threads=self.job.settings.num_threads)
        sample = recompute_sample(plain, groups)
        plain.close()
        sharing = self._try_sharing(choose_siblings(groups))
        beside_longest = score_together(self._open_scorer(), choose_neighbours(sample.groups))
        return StartedCheck(sample=sample, sharing=sharing, beside_longest=beside_longest)

    def _try_sharing(self, groups: Sequence[Group]) -> SharingCheck:
        """Score prompts with and without sharing; stop sharing if the values differ."""
        scorer = self._open_scorer()
        shared = scorer.score(groups)
        scorer.shares_prompts = False
        whole = scorer.score(groups)
        found = compare_sharing(whole, shared, groups, self.job.settings.dtype)
        scorer.shares_prompts = found.is_trusted
        return found

    def _finish_check(self, index: int, check: StartedCheck, logps: SequenceLogps) -> None:
        """Compare the engine's values of the sample with the recomputed ones, and record how far
        they are off.

        Raises:
            DataError: in float32, a token is off by more than rounding explains.
        """
        settings, expected = self.job.settings, check.sample.logps
        beside_longest = {name: expected[name] for name in check.beside_longest}
        for wanted, found, how in (
            (expected, logps, ""),
            (beside_longest, check.beside_longest, " when computed together in one batch"),
        ):
            judge_sample(
                wanted,
                found,
                what=self.job.model.label + how,
                engine=settings.backend,
                dtype=settings.dtype,
            )
        write_check(
            self.job.out.folder,
            index,
            WorkerCheck(
                recomputed=compare_sample(expected, logps),
                beside_longest=compare_sample(beside_longest, check.beside_longest),
                sharing=check.sharing,
            ),
        )
        self._is_checked = True
