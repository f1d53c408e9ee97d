"""Worker of encode: reads shards of pairs, writes shards of token ids and of rejected rows."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from schemas.errors import ConfigError
from schemas.manifest import Counts, ShardRecord
from schemas.rows import ENCODED, REJECTED
from stages.encode.config import EncodeConfig
from stages.encode.encoder import Encoder
from stages.encode.template import Row, RowRejected
from stages.models.fetch import fetch_tokenizer
from stages.models.resolve import TokenizerPin
from stages.stage import AlignedShards, ShardWorker
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_file

DATED = "num_pairs_with_date"
"""Count of the pairs in which the template printed the date."""
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class EncodeShards:
    """Makes the worker that encodes shards; loads the tokenizer once."""

    source: Folder
    out: StageDir
    tokenizer: TokenizerPin
    template: str
    config: EncodeConfig

    def __call__(self) -> ShardWorker[AlignedShards]:
        from transformers import AutoTokenizer

        path = fetch_tokenizer(self.tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if self.template == "auto" and not tokenizer.chat_template:
            raise ConfigError(
                f"The tokenizer {self.tokenizer.spec} has no chat template. Set "
                "stages.encode.template to a Jinja file, to none for raw text, or to prerendered "
                "for texts that a template has rendered."
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"The tokenizer {self.tokenizer.spec} has no end-of-text token.")
        encoder = Encoder(tokenizer, self.template, self.config)

        def encode_shard(task: AlignedShards) -> ShardRecord:
            return self._encode(task, encoder)

        return encode_shard

    def _encode(self, task: AlignedShards, encoder: Encoder) -> ShardRecord:
        rows = read_file(self.source, task.records["dedupe"].files["data"])
        reasons: Counter[str] = Counter()
        warnings: Counter[str] = Counter()
        more: Counter[str] = Counter(num_tokens=0)
        with self.out.write_shard(task.index, {"data": ENCODED, "rejected": REJECTED}) as shard:
            for batch in rows.to_batches(max_chunksize=_ROWS_AT_ONCE):
                kept, refused = [], []
                for row in batch.to_pylist():
                    num_dates = encoder.num_dates
                    try:
                        encoded, codes = encoder.encode_pair(row)
                    except RowRejected as error:
                        refused.append(_rejected_row(row, *error.args))
                        continue
                    warnings.update(codes)
                    more.update(
                        num_tokens=encoded["num_prompt_tokens"]
                        + encoded["num_chosen_tokens"]
                        + encoded["num_rejected_tokens"]
                    )
                    if encoder.num_dates > num_dates:
                        more[DATED] += 1
                    kept.append(encoded)
                shard.write_rows("data", kept)
                shard.write_rows("rejected", refused)
                reasons.update(row["code"] for row in refused)
            counts = Counts(
                num_in=rows.num_rows,
                num_out=shard.num_rows("data"),
                reasons=dict(reasons),
                warnings=dict(warnings),
                more=dict(more),
            )
            assert counts.num_in == counts.num_out + counts.num_rejected
            return shard.commit(counts)


def _rejected_row(row: Row, code: str, field: str, detail: str) -> dict[str, Any]:
    return {
        "code": code,
        "codes": [code],
        "field": field,
        "detail": detail[:500],
        **{name: row[name] for name in ("source_file", "source_row", "pair_id")},
    }
