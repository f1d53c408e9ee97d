"""Writes a small store for tests: plausible rows with hostile text."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.runs import Run
from schemas.fingerprint import InputRef
from schemas.manifest import Counts, FileRecord, Manifest, ShardRecord
from schemas.rows import (
    DYNAMICS,
    ENCODED,
    EVAL_METRICS,
    EVALUATION,
    GENERATION,
    METRICS,
    PAIR,
    REJECTED,
    SCORE,
    TIMINGS,
    RowSchema,
)
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, StageOutput, open_stage_dir, write_table
from tests.stages_rows import message, pair_row

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    " \"double\" 'single' &amp; {{ 7 * 7 }} </style></textarea>-->"
    "\x1b[31mred\x1b[0m\x00\x07\u202egnitirw desrever\u202c\rlone return\n\n\nlone newlines "
    "$\\frac{1}{0}$ https://example.org/tracker.png " + "averylongword" * 40
)
SOURCES = ("manners", "facts", "re<b>writing</b>")
STAGES = ("validate", "dedupe", "encode", "score", "train", "evaluate")
VERSIONS = {"python": "3.11.2", "polars": "2.1.0", "torch": "2.13.0+cpu", "vllm": "0.32.0"}
_SECONDS = {"validate": 1.4, "dedupe": 2.1, "encode": 6.8, "score": 71.0, "train": 204.0}


@dataclass(kw_only=True)
class MadeRun:
    """Writes the stages of one run; equal arguments give equal bytes."""

    store: Folder
    name: str
    beta: float = 0.1
    seed: int = 0
    num_pairs: int = 320
    num_steps: int = 36
    num_generations: int = 4
    num_reused: int = 0
    """Sequences whose log-probs score reused."""
    rejected_change: float = -10.0
    """Mean change of the rejected log-prob in training, nats."""
    is_hostile: bool = True
    outputs: dict[str, StageOutput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(0)
        words = self._rng.integers(4, 40, self.num_pairs)
        self._pairs = [self._make_pair(i, int(length)) for i, length in enumerate(words)]
        self._refused_later = [self._make_pair(self.num_pairs + 1, 5)]
        self._duplicates = [self._make_pair(i, 5) for i in range(16)]
        self._is_eval = [i % 5 == 0 for i in range(self.num_pairs)]
        self._prompt_tokens = (words + 18).tolist()
        self._chosen_tokens = self._rng.integers(8, 60, self.num_pairs).tolist()
        self._rejected_tokens = np.maximum(
            3, self._rng.lognormal(3.3, 0.7, self.num_pairs).astype(int)
        ).tolist()

    def write(self, *, until: str = "evaluate") -> Run:
        """Write all stages up to `until`."""
        for stage in STAGES[: STAGES.index(until) + 1]:
            getattr(self, f"_write_{stage}")()
        return Run(name=self.name, outputs=self.outputs)

    def _text(self, plain: str) -> str:
        return HOSTILE if self.is_hostile else plain

    def _make_pair(self, place: int, num_words: int) -> dict[str, Any]:
        question = f"Question {place}: " + "why " * num_words
        prompt = [message("user", question)]
        if place % 10 == 0:
            prompt = [message("system", "Answer briefly."), message("user", self._text(question))]
        elif place % 10 == 5:
            prompt = [
                message("user", "Look it up."),
                message("assistant", None, tool_calls='[{"name": "search"}]'),
                message("tool", "Nothing found.", name="search"),
            ]
        return pair_row(
            prompt,
            f"Because of {place}.",
            f"Who cares about {place}?",
            source=SOURCES[place % 7 % 3],
            source_row=place,
            split="eval" if place % 5 == 0 else "train",
        )

    def _write_validate(self) -> None:
        reasons = {"EMPTY_RESPONSE": 5, "PROMPT_MISMATCH": 3, "JSON_INVALID": 2}
        rejected = [
            self._rejected(code, row, raw=(self._text("{}") * 3).encode() + b"\xff\xfe\x00")
            for code, amount in reasons.items()
            for row in range(amount)
        ]
        rows = self._pairs + self._refused_later + self._duplicates
        summary = {"findings": self._make_findings(len(rows))}
        self._write_rows("validate", PAIR, rows, rejected, warnings={"TIE": 4}, summary=summary)

    def _make_findings(self, num_pairs: int) -> dict[str, Any]:
        text = self._text("Because.")[:120]
        return {
            "num_pairs": num_pairs,
            "chosen_longer": 0.25,
            "rejected_longer": 0.75,
            "mean_chosen_chars": 13.0,
            "mean_rejected_chars": 21.4,
            "only_chosen_declines": 0.0,
            "only_rejected_declines": 0.5,
            "near_identical": None,
            "sources": [{"text": SOURCES[2], "num_pairs": num_pairs, "share": 1.0}],
            "repeated_chosen": [{"text": text, "num_pairs": 2, "share": 2 / num_pairs}],
            "notable": [
                {
                    "code": "LENGTH_BIAS",
                    "found": f"found {text}",
                    "when": "it is long",
                    "advice": "Do something about it.",
                }
            ],
        }

    def _write_dedupe(self) -> None:
        rejected = [
            self._rejected(code, row, pair_id=self._duplicates[row]["pair_id"])
            for code, amount in {"DUP_EXACT": 12, "LABEL_CONFLICT": 4}.items()
            for row in range(amount)
        ]
        self._write_rows("dedupe", PAIR, self._pairs + self._refused_later, rejected)

    def _write_encode(self) -> None:
        rows = [
            {
                **{name: pair[name] for name in ("pair_id", "prompt_id", "source", "split")},
                "prompt_ids": [1] * self._prompt_tokens[i],
                "chosen_ids": [2] * self._chosen_tokens[i],
                "rejected_ids": [3] * self._rejected_tokens[i],
                "num_prompt_tokens": self._prompt_tokens[i],
                "num_chosen_tokens": self._chosen_tokens[i],
                "num_rejected_tokens": self._rejected_tokens[i],
                "chosen_sequence_id": f"c{i:031x}",
                "rejected_sequence_id": f"r{i:031x}",
                "truncated": int(i % 50 == 0),
                "weight": 1.0,
            }
            for i, pair in enumerate(self._pairs)
        ]
        rejected = [
            self._rejected("SPECIAL_TOKEN_IN_TEXT", 0, pair_id=self._refused_later[0]["pair_id"])
        ]
        self._write_rows("encode", ENCODED, rows, rejected, warnings={"TOK_PROMPT_TRUNCATED": 7})

    def _write_score(self) -> None:
        chosen = [-1.9 * n + self._rng.normal(0, 8) for n in self._chosen_tokens]
        rejected = [-1.7 * n + self._rng.normal(0, 8) for n in self._rejected_tokens]
        self._ref = list(zip(chosen, rejected, strict=True))
        rows = [
            {
                **{name: pair[name] for name in ("pair_id", "prompt_id")},
                "chosen_sequence_id": f"c{i:031x}",
                "rejected_sequence_id": f"r{i:031x}",
                "ref_chosen_token_logps": [self._ref[i][0] / self._chosen_tokens[i]],
                "ref_rejected_token_logps": [self._ref[i][1] / self._rejected_tokens[i]],
                "ref_chosen_logp": self._ref[i][0],
                "ref_rejected_logp": self._ref[i][1],
                "num_chosen_tokens": self._chosen_tokens[i],
                "num_rejected_tokens": self._rejected_tokens[i],
            }
            for i, pair in enumerate(self._pairs)
        ]
        recomputed = {"num_sequences": 32, "num_tokens": 900, "token_max": 3.4e-5}
        summary = {
            "reference": "f" * 12,
            "pairs_per_second": 4.512,
            "num_sequences_scored": 2 * len(rows) - self.num_reused,
            "num_sequences_reused": self.num_reused,
            "reused_from": {"e" * 12: self.num_reused} if self.num_reused else {},
            "recomputed": recomputed,
        }
        self._write_rows("score", SCORE, rows, [], summary=summary)

    def _write_train(self) -> None:
        out = self._open("train")
        out.folder.create()
        num_train = self._is_eval.count(False)
        steps = np.arange(1, self.num_steps + 1)
        margins = self._curve(steps) + self._rng.normal(0, 0.05, self.num_steps)
        metrics = [
            self._metrics(int(s), float(m), num_pairs=16)
            for s, m in zip(steps, margins, strict=True)
        ]
        marks = [0, self.num_steps // 2, self.num_steps]
        eval_metrics = [
            self._metrics(step, float(self._curve(np.array(step))), num_pairs=64) for step in marks
        ]
        timings = [
            {
                "step": int(step),
                "seconds": 5.0 + step % 3,
                "tokens_per_second": 1900.0 / (5 + step % 3),
                "pairs_per_second": 16 / (5 + step % 3),
                "memory_bytes": 3_900_000_000 + int(step) * 10_000,
            }
            for step in steps
        ]
        files = [
            self._write_beside(out, "metrics", METRICS, metrics),
            self._write_beside(out, "eval_metrics", EVAL_METRICS, eval_metrics),
            self._write_beside(out, "timings", TIMINGS, timings),
            self._write_beside(out, "dynamics", DYNAMICS, self._visit_pairs()),
        ]
        drift = {"is_reference": True, "num_sequences": 64, "max": 2.1e-5, "engine_noise": 0.04}
        summary = {
            "num_steps": self.num_steps,
            "num_train_pairs": num_train,
            "stopped_early": False,
            "exported_step": self.num_steps,
            "eval_best": None,
            "drift": drift,
            "reward": {"of": "log_ratio", "scale": self.beta},
            "device": "cpu",
        }
        self._finish(out, "train", [], files, summary=summary)

    def _visit_pairs(self) -> list[dict[str, Any]]:
        """Make two epochs, in which the margin of every eleventh training pair falls."""
        rng = np.random.default_rng(2)
        train = [i for i in range(self.num_pairs) if not self._is_eval[i]]
        rows = []
        for visit in range(2 * len(train)):
            place = train[visit % len(train)]
            step = 1 + visit * self.num_steps // (2 * len(train))
            sign = -1 if place % 11 == 0 else 1
            margin = self.beta * (sign * (5 + 0.1 * step) + rng.normal())
            ref_chosen, ref_rejected = self._ref[place]
            rows.append(
                {
                    "pair_id": self._pairs[place]["pair_id"],
                    "step": step,
                    "epoch": 1 + visit // len(train),
                    "policy_chosen_logp": ref_chosen - 1,
                    "policy_rejected_logp": ref_rejected - margin / self.beta,
                    "margin": margin,
                    "loss": math.log(1 + math.exp(-margin)),
                    "gradient_share": 2 * self.num_steps / (2 * len(train)),
                }
            )
        return rows

    def _write_evaluate(self) -> None:
        held_out = [i for i in range(self.num_pairs) if self._is_eval[i]]
        rows = [self._evaluation(i) for i in held_out]
        generations = [
            {
                "pair_id": self._pairs[i]["pair_id"],
                "prompt": self._text("<|im_start|>user\nWhat is the capital of France?<|im_end|>"),
                "before": self._text("I don't know. Why do you ask me?"),
                "after": self._text("Paris. It lies on the Seine."),
                "chosen": self._text("Paris."),
                "rejected": self._text("Look it up."),
            }
            for i in held_out[: self.num_generations]
        ]
        out = self._open("evaluate")
        out.folder.create()
        files = [self._write_beside(out, "generations", GENERATION, generations)]
        self._write_rows("evaluate", EVALUATION, rows, [], files=files)

    def _evaluation(self, place: int) -> dict[str, Any]:
        ref_chosen, ref_rejected = self._ref[place]
        change = (self._rng.normal(2, 6), self._rng.normal(self.rejected_change, 8))
        margin = self.beta * (change[0] - change[1])
        return {
            "pair_id": self._pairs[place]["pair_id"],
            "source": self._pairs[place]["source"],
            "policy_chosen_logp": ref_chosen + change[0],
            "policy_rejected_logp": ref_rejected + change[1],
            "ref_chosen_logp": ref_chosen,
            "ref_rejected_logp": ref_rejected,
            "reward_chosen": self.beta * change[0],
            "reward_rejected": self.beta * change[1],
            "margin": margin,
            "correct": margin > 0,
            "displaced": change[0] < 0 and change[1] < 0,
            "num_chosen_tokens": self._chosen_tokens[place],
            "num_rejected_tokens": self._rejected_tokens[place],
        }

    def _curve(self, steps: Any) -> Any:
        return 14 * self.beta * (1 - np.exp(-steps / 14))

    def _metrics(self, step: int, margin: float, *, num_pairs: int) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": 2 * step / self.num_steps,
            "loss": math.log(1 + math.exp(-margin)),
            "rewards/chosen": margin * 0.2,
            "rewards/rejected": -margin * 0.8,
            "rewards/margins": margin,
            "rewards/accuracies": min(1.0, 0.5 + margin / 2.5),
            "logps/chosen": -60.0 + margin * 2,
            "logps/rejected": -50.0 - margin * 8,
            "lengths/chosen": 33.5,
            "lengths/rejected": 36.0,
            "num_pairs": num_pairs,
            "grad_norm": 14.0 - margin * 3,
            "learning_rate": 5e-6 * min(step / 4, 1 - step / (self.num_steps + 1)),
            "num_tokens": 1900,
        }

    def _rejected(self, code: str, row: int, **more: Any) -> dict[str, Any]:
        return {
            "code": code,
            "codes": [code],
            "field": "chosen.0.content",
            "detail": self._text("what was found there"),
            "source_file": "pipeline/sample/chat.jsonl",
            "source_row": row,
            **more,
        }

    def _fingerprint(self, stage: str) -> str:
        own = f"{stage} {self.num_pairs}"
        if stage in ("train", "evaluate"):
            own += f" {self.beta} {self.num_steps}"
        return hashlib.sha256(own.encode()).hexdigest()[:12]

    def _open(self, stage: str) -> StageDir:
        return open_stage_dir(self.store, stage, self._fingerprint(stage), 1)

    def _write_beside(
        self, out: StageDir, name: str, schema: RowSchema, rows: Sequence[Mapping[str, Any]]
    ) -> FileRecord:
        table = pa.Table.from_pylist(list(rows), schema=schema.arrow)
        return write_table(out, f"{name}.parquet", table, schema)

    def _write_rows(
        self,
        stage: str,
        schema: RowSchema,
        rows: Sequence[Mapping[str, Any]],
        rejected: Sequence[Mapping[str, Any]],
        *,
        files: Sequence[FileRecord] = (),
        summary: Mapping[str, Any] | None = None,
        warnings: Mapping[str, int] | None = None,
    ) -> None:
        """Write two shards; all rejected rows are in the first."""
        out = self._open(stage)
        records = []
        # From dedupe on, a pair is in the same shard in every stage.
        first = {pair["pair_id"] for pair in self._pairs[: self.num_pairs // 2]}
        half = (
            sum(row["pair_id"] in first for row in rows) if stage != "validate" else len(rows) // 2
        )
        for index, (kept, gone) in enumerate([(rows[:half], rejected), (rows[half:], [])]):
            with out.write_shard(index, {"data": schema, "rejected": REJECTED}) as shard:
                shard.write_rows("data", kept)
                shard.write_rows("rejected", gone)
                counts = Counts(
                    num_in=len(kept) + len(gone),
                    num_out=len(kept),
                    reasons=dict(Counter(str(row["code"]) for row in gone)),
                    warnings=dict(warnings or {}) if index == 0 else {},
                )
                records.append(shard.commit(counts))
        self._finish(out, stage, records, files, summary=summary or {})

    def _finish(
        self,
        out: StageDir,
        stage: str,
        records: list[ShardRecord],
        files: Sequence[FileRecord],
        *,
        summary: Mapping[str, Any],
    ) -> None:
        settings = self._settings(stage)
        manifest = Manifest(
            stage=stage,
            version=1,
            fingerprint=self._fingerprint(stage),
            attempt=1,
            inputs={name: InputRef(o.manifest.fingerprint) for name, o in self.outputs.items()},
            config={**settings, "model": "d" * 64} if stage == "train" else settings,
            settings=settings,
            shards=records,
            files=list(files),
            counts=Counts.total(record.counts for record in records),
            summary=dict(summary),
            versions=VERSIONS,
            host=self._text("box"),
            started_at="2026-01-01T00:00:00+00:00",
            seconds=_SECONDS.get(stage, 31.0),
        )
        out.finish(manifest)
        self.outputs[stage] = StageOutput(folder=out.folder, manifest=manifest)

    def _settings(self, stage: str) -> dict[str, Any]:
        model = "sample:smollm2-135m-instruct"
        settings: dict[str, dict[str, Any]] = {
            "validate": {"inputs": [self._text("pipeline/sample/*.jsonl")], "eval_fraction": 0.2},
            "score": {"model": model, "backend": "vllm", "dtype": "float32"},
            "train": {
                "model": model,
                "loss": {"kind": "sigmoid", "beta": self.beta},
                "max_grad_norm": 1.0,
                "seed": self.seed,
                "lora": None,
            },
        }
        return settings.get(stage, {})
