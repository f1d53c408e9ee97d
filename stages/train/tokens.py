"""Tokenizer, chat template and end tokens of the export: those that training used."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from stages.models.digest import TOKENIZER_CONFIG, list_tokenizer_files
from stages.policy.groups import IntArray
from stages.store.shards import StageOutput
from stages.train.pairs import BoolArray, Lists

logger = logging.getLogger(__name__)

MAX_SAMPLED_SHARDS = 4
"""Shards searched for tokens that end answers. A shard is a range of hashes: a random sample."""

_SIDES = {"chosen": 2, "rejected": 4}
"""Sides, with the bit of `truncated` that says that a side lost its end."""
_TEMPLATE = "chat_template.jinja"


def write_tokenizer(folder: Path, tokenizer: Path, template: str | None) -> None:
    """Replace a folder's tokenizer by the one of training.

    Args:
        folder: of the exported model.
        tokenizer: folder of the tokenizer that encoded the pairs.
        template: text of the chat template that encoded them; None means that it was the
            tokenizer's own, or that there was none.
    """
    for file in list_tokenizer_files(folder):
        (folder / file).unlink()
    for file in list_tokenizer_files(tokenizer):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(tokenizer / file, folder / file)
    if template is not None:
        _replace_template(folder, template)


def _replace_template(folder: Path, template: str) -> None:
    """Make a text the tokenizer's only chat template; there are four places for one."""
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / _TEMPLATE).write_text(template, encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            _write_json(path, config)


def find_end_tokens(encoded: StageOutput, tokenizer: Path) -> dict[int, str]:
    """Find the tokens that end what training scores, the most frequent first.

    Only tokens that were added to the vocabulary count, such as <|im_end|>: text that a template
    ends with words or a line feed has no token at which to stop.

    Returns:
        Texts by id.
    """
    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    added = {id_: str(token) for id_, token in loaded.added_tokens_decoder.items()}
    counts: Counter[int] = Counter()
    columns = [f"{side}_{part}" for side in _SIDES for part in ("ids", "loss_mask")]
    for record in encoded.manifest.shards[:MAX_SAMPLED_SHARDS]:
        rows = encoded.read(record, columns=[*columns, "truncated"])
        truncated = rows["truncated"].to_pylist()
        for side, bit in _SIDES.items():
            ids, masks = Lists(rows[f"{side}_ids"]), Lists(rows[f"{side}_loss_mask"])
            for row, bits in enumerate(truncated):
                counts.update(_list_ends(ids[row], masks[row], is_cut=bool(bits & bit)))
    return {id_: added[id_] for id_, _ in counts.most_common() if added.get(id_, "").strip()}


def _list_ends(ids: IntArray, mask: BoolArray | None, *, is_cut: bool) -> Iterator[int]:
    """Yield the last token of each run of scored tokens, except of one that was cut off."""
    if mask is None:
        mask = np.ones(len(ids), np.bool_)
    ends = np.flatnonzero(mask & ~np.append(mask[1:], False))
    for end in ends.tolist():
        if not (is_cut and end == len(ids) - 1):
            yield int(ids[end])


def align_end_tokens(folder: Path, end_tokens: dict[int, str]) -> list[int]:
    """Make generation with an exported model stop where training ended the answers.

    The model's own end tokens stay, after those of training. Nothing is written where they hold all
    of training's already.

    Returns:
        The tokens at which generation with the model stops.
    """
    path = folder / "generation_config.json"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None
    }
    own = _list_ids(config.get("eos_token_id"))
    if path.is_file():
        generation = json.loads(path.read_text(encoding="utf-8"))
        own = _list_ids(generation.get("eos_token_id"))
    if set(end_tokens) <= set(own):
        return own
    aligned = [*end_tokens, *(id_ for id_ in own if id_ not in end_tokens)]
    stops: int | list[int] = aligned if len(aligned) > 1 else aligned[0]
    _write_json(path, {**generation, "eos_token_id": stops})
    _write_json(folder / "config.json", {**config, "eos_token_id": stops})
    logger.warning(
        "the start's generation config ends at %s, but training ended answers with %s: the "
        "exported generation_config.json and config.json end at %s",
        own or "no token",
        ", ".join(f"{text} ({id_})" for id_, text in end_tokens.items()),
        aligned,
    )
    return aligned


def _list_ids(eos: int | Sequence[int] | None) -> list[int]:
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
