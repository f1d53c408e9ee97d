"""Opens runs by name: manifests, tables and pairs of their stages, as polars LazyFrames."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import polars as pl

from pipeline.dynamics import scan_dynamics
from pipeline.pairs import scan_pairs
from schemas.errors import ConfigError, DataError
from schemas.manifest import Manifest, RunRecord, decode_record
from stages.store.filesystems import Folder
from stages.store.shards import StageOutput, read_manifest

_SHARDED = ("data", "rejected")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A named run, complete or not.

    Example:
        >>> run = open_run("./store", "quickstart-1f0c2a9be01d")
        >>> run.scan("validate", "rejected").group_by("code").len().collect()
    """

    name: str
    outputs: Mapping[str, StageOutput]
    """Complete stages by name, in pipeline order."""

    def manifest(self, stage: str) -> Manifest:
        """Return the manifest of a complete stage."""
        return self._output(stage).manifest

    def scan(self, stage: str, table: str = "data") -> pl.LazyFrame:
        """Scan a table of a stage lazily.

        Args:
            stage: such as score.
            table: data or rejected; for train: metrics, eval_metrics, dynamics, eval_dynamics or
                timings; for evaluate also generations.
        Raises:
            ConfigError: the stage is not complete or has no such table.
        """
        output = self._output(stage)
        if table in _SHARDED:
            names = [s.files[table].name for s in output.manifest.shards if table in s.files]
        else:
            wanted = f"{table}.parquet"
            names = [file.name for file in output.manifest.files if file.name == wanted]
        if not names:
            raise ConfigError(f"{stage} has no table {table!r}.")
        return pl.scan_parquet([f"{output.folder.uri}/{name}" for name in names])

    def pairs(self) -> pl.LazyFrame:
        """Scan the pairs of the run, with the columns of all complete stages side by side.

        One row per pair that dedupe kept, in dedupe's order. Values are null if a stage has no row
        for the pair: encode rejected it, or evaluate skipped it because it is not held out.
        Columns of incomplete stages are absent, as are score's in a reference-free run.

        - validate or dedupe: `pair_id`, `prompt_id`, `split`, `source`; `prompt`, `chosen` and
          `rejected` as lists of messages; `tools`, `score_chosen`, `score_rejected`,
          `score_margin` (the data's own scores), `weight`, `source_file`, `source_row`,
          `source_id`, `warnings`, `extra`.
        - encode: `num_prompt_tokens`, `num_chosen_tokens`, `num_rejected_tokens`, `truncated`,
          `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_loss_mask`, `rejected_loss_mask`,
          `chosen_sequence_id`, `rejected_sequence_id`.
        - score, in nats: `ref_chosen_logp`, `ref_rejected_logp`, `ref_margin` (their difference),
          `ref_chosen_token_logps`, `ref_rejected_token_logps`.
        - evaluate, for held-out pairs: `policy_chosen_logp`, `policy_rejected_logp`,
          `policy_margin` (their difference, nats), `reward_chosen`, `reward_rejected`,
          `reward_margin` (their difference, as the loss defines rewards), `correct`, `displaced`.

        Collecting reads one shard at a time, and only the columns that the query needs.

        Example:
            Held-out pairs that the reference ranks correctly and the policy does not:

            >>> pairs = open_run("./store", "quickstart-1f0c2a9be01d").pairs()
            >>> wrong = pairs.filter(~pl.col("correct"), pl.col("ref_margin") > 0)
            >>> wrong.select("prompt", "chosen", "rejected", "reward_margin").collect()

        Raises:
            ConfigError: neither validate, dedupe nor encode is complete.
        """
        return scan_pairs(self.outputs)

    def dynamics(self, *, held_out: bool = False) -> pl.LazyFrame:
        """Scan what training made of each pair, one row a pair that was trained on.

        A visit is a step that trained on the pair, with the values before its update; with
        `held_out=True`, an evaluation of a held-out pair. `pipeline.dynamics` defines the columns,
        and `scan("train", "dynamics")` has the single visits.

        - `pair_id`, `prompt_id`, `source`, as in `pairs`.
        - `num_visits`: one an epoch, or one an evaluation.
        - `first_margin`, `last_margin`, `mean_margin`: reward of chosen minus rejected, as the
          loss defines it, at the first and the last visit and on average.
        - `relative_margin`: the mean distance of its margins from the trend of its source, in
          standard deviations; the lowest are the most suspicious.
        - `never_learnt`: its margin was above zero at no visit. `num_forgotten`: visits at which it
          was not above zero, but had been at the one before.
        - `displaced`: at the last visit both answers were less likely than under the reference;
          null without a reference.
        - `suspicious`: its relative margin is far below the trend, as that of a pair whose answers
          are swapped. A pair to look at: rare and hard pairs are like it.
        - `gradient_share`: its share of the gradient over all steps; not for held-out pairs.

        Text is one join away. Collecting holds one row a pair in memory.

        Example:
            >>> run = open_run("./store", "quickstart-1f0c2a9be01d")
            >>> suspects = run.dynamics().sort("relative_margin").head(20)
            >>> text = run.pairs().select("pair_id", "prompt", "chosen", "rejected")
            >>> suspects.join(text, on="pair_id", maintain_order="left").collect()

        Raises:
            ConfigError: train is not complete, or was before it recorded pairs.
        """
        return scan_dynamics(self.outputs, self.pairs(), held_out=held_out, run_name=self.name)

    def _output(self, stage: str) -> StageOutput:
        if stage not in self.outputs:
            raise ConfigError(
                f"{self.name} has no complete stage {stage!r}. It has: {', '.join(self.outputs)}."
            )
        return self.outputs[stage]


def open_run(store: str, name: str) -> Run:
    """Open a run by the name that `run.py run` printed, or by a unique prefix of it.

    Args:
        store: path or URI of the store.
        name: a run's name.
    Raises:
        ConfigError: no run, or more than one, matches the name.
    """
    folder = Folder(store)
    known = list_runs(folder)
    meant = [name] if name in known else [run for run in known if run.startswith(name)]
    if len(meant) != 1:
        found = (
            f"{len(meant)} runs start with it: {', '.join(meant)}"
            if meant
            else "no run has this name"
        )
        raise ConfigError(f"{name}: {found}. Runs in {store}: {', '.join(known) or 'none'}.")
    return open_record(folder, read_record(folder, meant[0]))


def open_record(store: Folder, record: RunRecord) -> Run:
    """Open the stage outputs that a run's record names, except deleted ones."""
    outputs = {}
    for stage, ref in record.stages.items():
        folder = store.child(stage).child(ref.folder)
        manifest = read_manifest(folder)
        if manifest is not None:
            outputs[stage] = StageOutput(folder=folder, manifest=manifest)
    return Run(name=record.name, outputs=outputs)


def list_runs(store: Folder) -> list[str]:
    """List the names of all runs in a store."""
    names = store.list_files("runs")
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def read_record(store: Folder, name: str) -> RunRecord:
    """Read a run's record: the stage outputs that it uses.

    Raises:
        DataError: the record is damaged.
    """
    try:
        return decode_record(store.read_bytes(f"runs/{name}.json"), RunRecord)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{store.uri}/runs/{name}.json cannot be read ({error}). Run its recipe again."
        ) from error
