"""Compare the vocabularies of two tokenizers: ids of one must mean the same in the other.

Run as ``python -m stages.models.vocabulary FOLDER FILE``, it writes a tokenizer's vocabulary. Only
a tokenizer without tokenizer.json needs that: transformers, which the pipeline's driver never
imports, reads it in a process of its own.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from schemas.errors import ConfigError
from stages.models.digest import CONFIG, TOKENIZER_CONFIG, TOKENIZER_PATTERNS, read_json
from stages.models.resolve import ModelPin, TokenizerPin
from stages.models.sources import find_source, run_module

_NUM_EXAMPLES = 3


def require_same_vocabulary(model: ModelPin, encoding: TokenizerPin, *, key: str) -> None:
    """Refuse a model that reads other token ids than those that the pairs are encoded as.

    Tokenizers may differ in all but the vocabulary: in the chat template, in the end of a turn, in
    how they cut text. Tokens that only the model knows do no harm. A model without a tokenizer
    cannot be compared.

    Args:
        model: the model that reads the ids.
        encoding: the tokenizer that encodes the pairs.
        key: the recipe's key that names the model.
    Raises:
        ConfigError: an id of the encoding tokenizer means something else to the model, or nothing.
    """
    # An adapter that was saved with a tokenizer brings it into the merged model.
    has_own = model.adapter is not None and model.adapter.tokenizer is not None
    owner = model.adapter if has_own else model
    assert owner is not None
    if owner.tokenizer in (None, encoding.tokenizer):
        return
    spec, patterns = owner.revised_spec, [CONFIG, *TOKENIZER_PATTERNS]
    known, read = (
        read_vocabulary(find_source(name, patterns).folder)
        for name in (encoding.revised_spec, spec)
    )
    if difference := describe_difference(known, read):
        raise ConfigError(
            f"{key}: {spec} has another vocabulary than the tokenizer that encodes the pairs, "
            f"{encoding.spec}: {difference} Name a model of the same vocabulary, or set "
            f"stages.encode.tokenizer to {spec} if all models of the recipe read its ids. If the "
            "ids do mean the same, put the encoding tokenizer's files into the model's folder."
        )


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Read the ids of a tokenizer's tokens, added ones included."""
    fast, config = folder / "tokenizer.json", folder / TOKENIZER_CONFIG
    content = read_json(fast) if fast.is_file() else {}
    listed = content.get("model", {}).get("vocab")
    if listed is None:
        return _convert_vocabulary(folder)
    if isinstance(listed, list):  # Unigram: token and score, in the order of the ids.
        listed = {token: id_ for id_, (token, _) in enumerate(listed)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    more = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    return {**listed, **{token["content"]: int(id_) for id_, token in more.items()}, **added}


def _convert_vocabulary(folder: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        run_module("stages.models.vocabulary", str(folder), file.name)
        return read_json(Path(file.name))


def describe_difference(encoding: Mapping[str, int], own: Mapping[str, int]) -> str:
    """Describe which ids of one vocabulary mean something else in another; empty if none do.

    Args:
        encoding: ids of the tokenizer that encodes, by token.
        own: ids of the tokenizer that the model was trained with.
    """
    meanings = {id_: token for token, id_ in own.items()}
    changed = sorted(id_ for token, id_ in encoding.items() if own.get(token) != id_)
    if not changed:
        return ""
    tokens = {id_: token for token, id_ in encoding.items()}
    examples = [
        f"{id_} is {tokens[id_]!r} there and {meanings.get(id_, 'no token')!r} here"
        for id_ in changed[:_NUM_EXAMPLES]
    ]
    return f"{len(changed):,} of its {len(encoding):,} ids differ ({'; '.join(examples)})."


def main() -> int:
    """Write the vocabulary of the tokenizer in a folder to a file, as JSON."""
    from transformers import AutoTokenizer

    _, folder, path = sys.argv
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    Path(path).write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
