"""Find values that earlier score stages stored for the sequences of a shard.

A stored value is identified by (reference fingerprint, sequence_id): the model that computed it,
and its tokens. Each file under `<store>/reference/<reference fingerprint>/` names a score stage,
complete or not, that has such values; the stage's manifest, or else its commit records, name the
data files. A missing entry only costs time. Before a value is taken, its file is compared with the
committed sha256 and its array with the number of tokens; files that do not agree are skipped with a
warning, and their sequences are scored.

Lookup scales to 10^8 rows: score's rows carry the prompt_id, shards are ranges of prompt_id sorted
by it, and each commit record holds the range. A worker reads only the files whose range overlaps
its own, in those only the row groups that overlap, and in those the values only where a sequence_id
is wanted: a merge of sorted files with one row group in memory. An index by sequence_id would also
find equal tokens under different prompt_ids (prompts that differ only where they are truncated, or
in parts that the template leaves out), but shards do not share an order of sequence_ids, so that
every worker would have to read all of it. Such twins are scored once for each prompt_id.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import DataError
from schemas.fingerprint import ReferenceIdentity
from schemas.manifest import FileRecord, ShardRecord
from schemas.rows import SCORE
from stages.score.rows import PromptRange, find_range, overlap, range_of_group
from stages.scorers.pairs import SIDES, Fault, count_tokens, find_fault, list_values
from stages.scorers.protocol import FloatArray
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_manifest

logger = logging.getLogger(__name__)

REFERENCES = "reference"
"""Directory of a store with the entries of score stages, by reference fingerprint."""

Versions = Mapping[str, str]
"""Versions of the computing packages, by name."""


class ScoreEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Entry of a score stage that holds values of a reference; written when the stage starts."""

    reference: ReferenceIdentity
    versions: list[dict[str, str]]
    """Package versions that computed in this stage; several if it was resumed with others."""
    inherited: list[dict[str, str]]
    """Package versions that computed the values this stage may have reused."""
    started_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, kw_only=True)
class ScoredFile:
    """A file of values. Every worker receives all of these records, so they are kept small."""

    file: FileRecord
    prompts: PromptRange
    """The lowest and the highest prompt_id."""


@dataclass(frozen=True, kw_only=True)
class EarlierScore:
    """An earlier score stage, complete or not, whose values can be reused."""

    name: str
    """Name of its directory, such as 0123456789ab; its whole URI if it is in another store."""
    folder: Folder
    started_at: str
    versions: list[dict[str, str]]
    """Package versions that computed its values, including those that it reused."""
    files: list[ScoredFile]


@dataclass(kw_only=True)
class Found:
    """Values found for the sequences of one shard."""

    logps: dict[str, FloatArray] = field(default_factory=dict)
    """By sequence_id: float32, nats, one value a completion token."""
    num_by_score: Counter[str] = field(default_factory=Counter)
    """Number of sequences by the score stage they came from."""
    num_refused: Counter[str] = field(default_factory=Counter)
    """Number of unusable files by score stage."""


def write_entry(
    store: Folder, out: StageDir, reference: ReferenceIdentity, entry: ScoreEntry
) -> ScoreEntry:
    """Write or update the entry of a stage that will hold values of a reference, and return it.

    A resumed stage keeps its starting time and the versions of all attempts.
    """
    folder = store.child(REFERENCES).child(reference.fingerprint)
    name = f"{_last_part(out.folder)}.json"
    before = _read_entry(folder, name) if folder.exists(name) else None
    if before is not None and before.reference == reference:
        entry = ScoreEntry(
            reference=reference,
            versions=merge_versions(before.versions, entry.versions),
            inherited=merge_versions(before.inherited, entry.inherited),
            started_at=before.started_at,
        )
    if entry != before:
        folder.create()
        folder.write_bytes(name, msgspec.json.format(msgspec.json.encode(entry), indent=1))
    return entry


def find_earlier_scores(
    store: Folder, reference: ReferenceIdentity, *, others: Sequence[str] = (), besides: Folder
) -> list[EarlierScore]:
    """List the score stages that hold values of a reference.

    Args:
        store: the run's own store.
        reference: compared as a whole, not only by its fingerprint.
        others: URIs of other stores to search.
        besides: directory of the current stage, which is left out.
    Returns:
        Score stages of the own store first, and in each store the newest first, so that the latest
        value of a sequence is taken.
    """
    found = _list_scores(store, reference, besides=besides, prefix="")
    for uri in others:
        other = Folder(uri)
        if other.path == store.path and other.filesystem == store.filesystem:
            continue
        try:
            there = _list_scores(
                other, reference, besides=besides, prefix=f"{uri.rstrip('/')}/score/"
            )
        except OSError as error:
            logger.warning("%s cannot be read (%s): nothing is reused from it", uri, error)
            continue
        if not there:
            logger.warning(
                "%s holds no values of reference %s: nothing is reused from it",
                uri,
                reference.fingerprint,
            )
        found += there
    return found


def merge_versions(*lists: Sequence[Versions]) -> list[dict[str, str]]:
    """Merge lists of versions without duplicates, in a stable order."""
    distinct = {
        tuple(sorted(versions.items())) for versions_list in lists for versions in versions_list
    }
    return [dict(items) for items in sorted(distinct)]


@dataclass(kw_only=True)
class ScoreReader:
    """Finds values in earlier scores, and remembers which files passed their checks."""

    scores: Sequence[EarlierScore]
    reference: str
    """Fingerprint of the reference."""
    _sound: dict[str, bool] = field(default_factory=dict)
    """Whether a file passed its checks, by URI."""

    def find(self, encoded: pa.Table) -> Found:
        """Look up the sequences of encoded rows."""
        found = Found()
        prompts = find_range(encoded)
        if prompts is None or not self.scores:
            return found
        wanted = count_tokens(encoded)
        for score in self.scores:
            for scored in score.files:
                if not wanted:
                    return found
                if not overlap(prompts, scored.prompts):
                    continue
                taken = self._take(score, scored.file, prompts, wanted, found)
                if taken:
                    found.logps.update(taken)
                    found.num_by_score[score.name] += len(taken)
                for name in taken:
                    del wanted[name]
        return found

    def _take(
        self,
        score: EarlierScore,
        file: FileRecord,
        prompts: PromptRange,
        wanted: Mapping[str, int],
        found: Found,
    ) -> dict[str, FloatArray]:
        """Take the wanted values from a file; none if any check of it fails."""
        uri = f"{score.folder.uri}/{file.name}"
        if not self._sound.get(uri, True):
            return {}
        taken: dict[str, FloatArray] = {}
        try:
            for name, values in self._read(score.folder, file, prompts, wanted):
                fault = find_fault(values, wanted[name])
                if isinstance(fault, Fault):
                    raise DataError(f"sequence {name} has {fault.detail}")
                taken[name] = values
        except (OSError, pa.ArrowException, DataError) as error:
            logger.warning("%s is not reused, its sequences are scored: %s", uri, error)
            self._sound[uri] = False
            found.num_refused[score.name] += 1
            return {}
        return taken

    def _read(
        self,
        folder: Folder,
        file: FileRecord,
        prompts: PromptRange,
        wanted: Mapping[str, int],
    ) -> Iterator[tuple[str, FloatArray]]:
        """Yield wanted sequences and their values, one row group after the other.

        Raises:
            DataError: the file is not the committed one, or holds values of another reference.
            OSError: the file cannot be read.
        """
        value_set = pa.array(wanted, pa.string())
        with pq.ParquetFile(folder.file(file.name), filesystem=folder.filesystem) as table:
            self._check_footer(table.metadata, file)
            for group in range(table.num_row_groups):
                if not overlap(prompts, range_of_group(table.metadata, group)):
                    continue
                names = table.read_row_group(group, [f"{side}_sequence_id" for side in SIDES])
                for side in SIDES:
                    is_wanted = pc.is_in(names[f"{side}_sequence_id"], value_set=value_set)
                    if not pc.any(is_wanted).as_py():
                        continue
                    self._check_content(folder, file)
                    column = f"ref_{side}_token_logps"
                    values = table.read_row_group(group, [column]).filter(is_wanted)
                    ids = names[f"{side}_sequence_id"].filter(is_wanted).to_pylist()
                    for name, array in zip(ids, list_values(values, column), strict=True):
                        # Copy: a view would keep the whole row group in memory.
                        yield name, np.array(array, dtype=np.float32)

    def _check_footer(self, metadata: pq.FileMetaData, file: FileRecord) -> None:
        footer = metadata.metadata or {}
        schema = footer.get(b"dpo.schema", b"").decode()
        if schema != SCORE.label:
            raise DataError(f"its columns are those of {schema or 'nothing known'}")
        reference = footer.get(b"dpo.reference", b"").decode()
        if reference != self.reference:
            raise DataError(f"it holds values of reference {reference or 'unknown'}")
        if metadata.num_rows != file.num_rows:
            raise DataError(f"it holds {metadata.num_rows} rows, its record says {file.num_rows}")

    def _check_content(self, folder: Folder, file: FileRecord) -> None:
        """Compare the sha256 of a file with its record, once, and only if a value in it is
        wanted."""
        uri = f"{folder.uri}/{file.name}"
        if uri not in self._sound:
            sha256 = folder.sha256(file.name)
            if sha256 != file.sha256:
                raise DataError(f"its sha256 is {sha256}, its record says {file.sha256}")
            self._sound[uri] = True


def _list_scores(
    store: Folder, reference: ReferenceIdentity, *, besides: Folder, prefix: str
) -> list[EarlierScore]:
    """List a store's score stages of a reference, the newest first."""
    entries = store.child(REFERENCES).child(reference.fingerprint)
    found = []
    for file in entries.list_files():
        entry = _read_entry(entries, file) if file.endswith(".json") else None
        folder = store.child("score").child(file.removesuffix(".json"))
        if entry is None or entry.reference != reference or folder.uri == besides.uri:
            continue
        try:
            score = _open_score(folder, entry, prefix=prefix)
        except (OSError, DataError, msgspec.DecodeError) as error:
            logger.warning("%s is not reused: %s", folder.uri, error)
            continue
        if score.files:
            found.append(score)
    return sorted(found, key=lambda score: (score.started_at, score.name), reverse=True)


def _open_score(folder: Folder, entry: ScoreEntry, *, prefix: str) -> EarlierScore:
    """Read the shards of a score stage, and the versions that computed their values."""
    manifest = read_manifest(folder)
    if manifest is not None:
        shards: Iterable[ShardRecord] = manifest.shards
        inherited = manifest.summary["reused_versions"]
    else:
        shards = StageDir(folder=folder, footer={}).committed().values()
        inherited = entry.inherited
    return EarlierScore(
        name=prefix + _last_part(folder),
        folder=folder,
        started_at=entry.started_at,
        versions=merge_versions(entry.versions, inherited),
        files=[
            ScoredFile(file=shard.files["data"], prompts=shard.prompt_range)
            for shard in sorted(shards, key=lambda shard: shard.index)
            if shard.prompt_range is not None
        ],
    )


def _read_entry(folder: Folder, name: str) -> ScoreEntry | None:
    """Read an entry; None, with a warning, if it is damaged or gone."""
    try:
        return msgspec.json.decode(folder.read_bytes(name), type=ScoreEntry)
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("%s/%s is not used: %s", folder.uri, name, error)
        return None


def _last_part(folder: Folder) -> str:
    return folder.uri.rstrip("/").rsplit("/", 1)[-1]
