"""Log-probabilities of completion tokens from transformers, by the code that also trains."""

import gc
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from transformers import GenerationConfig

from stages.policy.batches import RowLayout, lay_out, plan_microbatches
from stages.policy.cpu.layers import replace_linear_layers
from stages.policy.groups import Group, IntArray
from stages.policy.logps import completion_token_logps, forget_lengths
from stages.policy.memory import return_freed_memory
from stages.policy.model import load_model
from stages.policy.sharing import choose_rows
from stages.scorers.devices import choose_device, count_weights
from stages.scorers.protocol import (
    FloatArray,
    ScorerSettings,
    ScoreStatistics,
    read_stop_token_ids,
)


class TransformersScorer:
    """A frozen model in torch, on the first GPU if that can hold it, else on the CPU."""

    def __init__(self, model_path: str, settings: ScorerSettings) -> None:
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._stop_token_ids = read_stop_token_ids(model_path)
        self._statistics = ScoreStatistics()
        self.shares_prompts = True
        dtype: torch.dtype = getattr(torch, settings.dtype)
        self._device = choose_device(count_weights(model_path) * dtype.itemsize)
        self._model = load_model(model_path, dtype=dtype, device=self._device)
        replace_linear_layers(self._model)

    @property
    def statistics(self) -> ScoreStatistics:
        return self._statistics

    @torch.inference_mode()
    def score(
        self, groups: Sequence[Group], *, in_one_batch: bool = False
    ) -> list[tuple[FloatArray, ...]]:
        max_tokens = self._settings.execution.max_tokens_per_batch
        if max_tokens == "auto":
            max_tokens = 512 if self._device.type == "cpu" else 16384
        if in_one_batch:
            longest = max(single.num_tokens for group in groups for single in group.split())
            max_tokens = longest * sum(len(group.completions) for group in groups)
        rows = [row for group in groups for row in self._cut_rows(group, max_tokens)]
        num_tokens = np.array([row.num_read for row in rows], dtype=np.int32)
        logps_by_row: dict[int, list[FloatArray]] = {}
        is_packed = self._rows == "packed"
        for row_numbers in plan_microbatches(
            num_tokens, max_tokens=max_tokens, is_packed=is_packed
        ):
            scored = self._score_microbatch([rows[number] for number in row_numbers])
            logps_by_row.update(zip(row_numbers.tolist(), scored, strict=True))
        in_order = (logps for number in range(len(rows)) for logps in logps_by_row[number])
        return [tuple(next(in_order) for _ in group.completions) for group in groups]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[IntArray], *, max_new_tokens: int) -> list[IntArray]:
        answers = []
        for prompt_ids in prompts:
            forget_lengths(self._model)
            input_ids = torch.from_numpy(prompt_ids.astype(np.int64))[None].to(self._device)
            num_new = min(max_new_tokens, self._settings.max_length + 1 - len(prompt_ids))
            # A complete config, so that no penalty from the model's own one applies.
            greedy = GenerationConfig(
                do_sample=False,
                use_cache=True,
                max_new_tokens=num_new,
                eos_token_id=self._stop_token_ids or None,
                pad_token_id=0,
            )
            output_ids = self._model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), generation_config=greedy
            )
            answers.append(output_ids[0, len(prompt_ids) :].cpu().numpy().astype(np.int32))
        return answers

    def close(self) -> None:
        del self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return_freed_memory()

    @property
    def _rows(self) -> RowLayout:
        if self.shares_prompts or self._best_rows == "alone":
            return self._best_rows
        return "separate"

    @cached_property
    def _best_rows(self) -> RowLayout:
        return choose_rows(self._model, max_length=self._settings.max_length)

    def _cut_rows(self, group: Group, max_tokens: int) -> Iterator[Group]:
        """Cut a group into rows: as many completions after one prompt as the budget allows."""
        if len(group.completions) == 1 or self._rows in ("separate", "alone"):
            yield from group.split()
            return
        waiting: list[IntArray] = []
        num_tokens = len(group.prompt_ids)
        for completion_ids in group.completions:
            num_read = len(completion_ids) - 1
            if waiting and num_tokens + num_read > max_tokens:
                yield Group(prompt_ids=group.prompt_ids, completions=tuple(waiting))
                waiting, num_tokens = [], len(group.prompt_ids)
            waiting.append(completion_ids)
            num_tokens += num_read
        yield Group(prompt_ids=group.prompt_ids, completions=tuple(waiting))

    def _score_microbatch(self, rows: Sequence[Group]) -> list[list[FloatArray]]:
        batch = lay_out(rows, device=self._device, rows=self._rows)
        logps_N = completion_token_logps(self._model, batch).cpu().numpy()
        self._count(rows, batch.input_ids_RL.numel())
        ends = batch.completion_lengths_C.cumsum(0).cpu().numpy()[:-1]
        by_completion = iter(np.split(logps_N, ends))
        return [[next(by_completion) for _ in row.completions] for row in rows]

    def _count(self, rows: Sequence[Group], num_computed: int) -> None:
        num_submitted = sum(single.num_tokens for row in rows for single in row.split())
        done = self._statistics
        self._statistics = ScoreStatistics(
            num_tokens_submitted=done.num_tokens_submitted + num_submitted,
            num_tokens_computed=done.num_tokens_computed + num_computed,
        )
