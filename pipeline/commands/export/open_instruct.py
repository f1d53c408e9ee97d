"""Writes the log-probs as open-instruct's TensorCache, with the data set that it indexes.

open-instruct (allenai/open-instruct, dpo_utils.build_reference_logprobs_cache) keeps two float32
tensors, `chosen_logps` and `rejected_logps`; entry i belongs to row i of the data set, which it
tokenises itself. So the rows are written beside the tensors, in the same order, without the rows
that it would tokenise differently. The tokens that were scored are written for comparison.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

_SIDES = ("chosen", "rejected")
_UNKNOWN_FIELDS = ("reasoning", "tool_calls", "tool_call_id", "name")
"""Fields of a message that open-instruct does not tokenise."""


class OpenInstructWriter:
    """Writes rows as they come, and the tensors at the end; holds 16 bytes a pair in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sums: dict[str, list[NDArray[np.float64]]] = {side: [] for side in _SIDES}
        self._num_tokens: dict[str, list[NDArray[np.int64]]] = {side: [] for side in _SIDES}
        (folder / "tokens").mkdir()

    def write(self, index: int, rows: pl.DataFrame) -> Mapping[str, int]:
        kept = keep_known(rows)
        with (self._folder / "train.jsonl").open("ab") as stream:
            for prompt, *sides in kept.select("prompt", *_SIDES).iter_rows():
                conversations = {
                    side: _list_plain([*prompt, *answer])
                    for side, answer in zip(_SIDES, sides, strict=True)
                }
                stream.write(msgspec.json.encode(conversations) + b"\n")
        kept.select(
            "pair_id",
            "num_prompt_tokens",
            *(
                pl.concat_list("prompt_ids", f"{side}_ids").alias(f"{side}_input_ids")
                for side in _SIDES
            ),
        ).write_parquet(self._folder / "tokens" / f"part-{index:05d}.parquet")
        for side in _SIDES:
            self._sums[side].append(kept[f"ref_{side}_logp"].to_numpy())
            lengths = kept[f"{side}_ids"].list.len().cast(pl.Int64)
            self._num_tokens[side].append(lengths.to_numpy())
        return {"train": kept.height}

    def finish(self, facts: Mapping[str, str]) -> None:
        sums = {side: np.concatenate(self._sums[side]) for side in _SIDES}
        means = {side: sums[side] / np.concatenate(self._num_tokens[side]) for side in _SIDES}
        _write_cache(self._folder / "sum.pt", sums)
        _write_cache(self._folder / "mean.pt", means)
        text = _README.format(**facts)
        (self._folder / "README.md").write_text(text, encoding="utf-8")


def keep_known(rows: pl.DataFrame) -> pl.DataFrame:
    """Keep the training pairs that open-instruct would tokenise and score in the same way.

    It scores every message of the assistant, also in the prompt; it cuts only at the end; and it
    passes templates no tools, and of a message only role and content.
    """

    def has(name: str, condition: pl.Expr) -> pl.Expr:
        return pl.col(name).list.eval(condition).list.any()

    element = pl.element().struct
    is_unknown = pl.any_horizontal(element.field(name).is_not_null() for name in _UNKNOWN_FIELDS)
    return rows.filter(
        pl.col("split") == "train",
        pl.col("truncated") == 0,
        pl.col("tools").is_null(),
        ~has("prompt", element.field("role") == "assistant"),
        *(~has(name, is_unknown) for name in ("prompt", *_SIDES)),
    )


def _list_plain(messages: list[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def _write_cache(path: Path, values: Mapping[str, NDArray[np.float64]]) -> None:
    """Write a file that open-instruct's TensorCache.from_disk reads."""
    import torch

    tensors = {
        f"{side}_logps": torch.from_numpy(array).to(torch.float32) for side, array in values.items()
    }
    torch.save(tensors, path)


_README = """# Reference log-probs for open-instruct

Computed by offline-dpo: {model} (weights {weights}), {engine}, {dtype}; reference {reference}.

- `train.jsonl`: conversations, `chosen` and `rejected`, one pair a line.
- `sum.pt`: for the losses `dpo` and `wpo`; `mean.pt`: for `dpo_norm`. Two float32 tensors each,
  `chosen_logps` and `rejected_logps`; entry i belongs to line i, counted from 0.
- `tokens/`: the tokens that were scored, in the same order.

Held-out pairs are left out, and so are pairs that open-instruct would tokenise differently: pairs
that were cut, prompts that contain an answer, tools, and messages with more than role and content.

## Use

open-instruct finds a cache by a name made from its settings, without checking its content. So first
compare its tokens with those that were scored, using the tokenizer and template of your run:

```python
import json
import polars as pl
from open_instruct import dataset_transformation as transformation

tokenizer = transformation.TokenizerConfig(tokenizer_name_or_path="MODEL").tokenizer
tokens = pl.read_parquet("tokens/*.parquet")
for line, row in zip(open("train.jsonl"), tokens.iter_rows(named=True), strict=True):
    found = transformation.preference_tulu_tokenize_and_truncate_v1(
        json.loads(line), tokenizer, max_seq_length={max_length}
    )
    for side in ("chosen", "rejected"):
        ids = [int(token) for token in found[f"{{side}}_input_ids"]]
        labels = [int(token) for token in found[f"{{side}}_labels"]]
        start = row["num_prompt_tokens"]
        assert ids == row[f"{{side}}_input_ids"], f"other tokens: {{row['pair_id']}}"
        assert labels == [-100] * start + ids[start:], f"other loss: {{row['pair_id']}}"
```

The comparison fails if the template puts something after EOS, as ChatML does with its line break:
here an answer ends with EOS, there with what follows it, and these values do not fit its sequences.

If it succeeds, ask for the name, put the file there, and train with the same settings:

    export REFERENCE_LOGPROBS_CACHE_PATH=$PWD/cache
    python open_instruct/dpo.py … --mixer_list $PWD/train.jsonl 1.0 --max_seq_length {max_length} \\
        --cache_dataset_only      # logs "Reference logprobs cache path: …/cache/HASH.pt"
    mkdir -p cache && cp sum.pt cache/HASH.pt

Training must use every line: no `--max_train_samples`, and no other data set in the mix.
"""
