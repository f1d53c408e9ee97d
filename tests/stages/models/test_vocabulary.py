"""A model must read the ids that encode writes as the same tokens."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from schemas.errors import ConfigError
from stages.models.resolve import pin_adapter, pin_model, pin_tokenizer
from stages.models.vocabulary import (
    describe_difference,
    read_vocabulary,
    require_same_vocabulary,
)
from tests.tiny_adapters import make_tiny_adapter
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

KEY = "stages.train.model"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "base")


def copy(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def require(model: Path, encoding: Path) -> None:
    require_same_vocabulary(pin_model(str(model)), pin_tokenizer(str(encoding)), key=KEY)


def swap_two_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab["?"] = vocab["?"], vocab["!"]
    path.write_text(json.dumps(content))


def test_ids_of_another_meaning_are_refused_with_examples(base: Path, tmp_path: Path) -> None:
    start = copy(base, tmp_path / "start")
    swap_two_tokens(start)
    ids = AutoTokenizer.from_pretrained(base).get_vocab()
    with pytest.raises(ConfigError) as raised:
        require(start, base)
    said = str(raised.value)
    assert said.startswith(f"{KEY}: {start} has another vocabulary than")
    assert "2 of its 320 ids differ" in said
    assert f"{ids['!']} is '!' there and '?' here" in said
    assert "stages.encode.tokenizer" in said


def test_a_token_that_the_model_does_not_know_is_refused(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"1 of its 321 ids differ \(320 is '<|tool|>' there and"):
        require(base, other)


def test_tokens_that_only_the_model_knows_do_no_harm(base: Path, tmp_path: Path) -> None:
    start = copy(base, tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(start)
    require(start, base)


def test_another_template_or_end_is_the_same_vocabulary(base: Path, tmp_path: Path) -> None:
    start = copy(base, tmp_path / "start")
    (start / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(start)
    assert pin_model(str(start)).tokenizer != pin_tokenizer(str(base)).tokenizer
    require(start, base)


def test_a_model_without_a_tokenizer_cannot_be_compared(base: Path, tmp_path: Path) -> None:
    start = copy(base, tmp_path / "start")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (start / name).unlink()
    require(start, base)


def test_an_adapters_own_tokenizer_is_that_of_the_merged_model(base: Path, tmp_path: Path) -> None:
    adapter = make_tiny_adapter(tmp_path / "adapter", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(adapter)
    encoding = pin_tokenizer(str(adapter))
    alone = pin_model(str(base))
    with pytest.raises(ConfigError, match="1 of its 321 ids differ"):
        require_same_vocabulary(alone, encoding, key=KEY)
    merged = type(alone)(
        spec=alone.spec,
        weights=alone.weights,
        config=alone.config,
        tokenizer=alone.tokenizer,
        commit=None,
        adapter=pin_adapter(str(adapter)),
    )
    require_same_vocabulary(merged, encoding, key=KEY)


def test_a_vocabulary_is_that_of_the_loaded_tokenizer(base: Path, tmp_path: Path) -> None:
    """Unigram lists its tokens; tokens may be added in tokenizer_config.json alone."""
    assert read_vocabulary(base) == AutoTokenizer.from_pretrained(base).get_vocab()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    (tmp_path / "unigram").mkdir()
    unigram.save(str(tmp_path / "unigram" / "tokenizer.json"))
    assert read_vocabulary(tmp_path / "unigram") == {"<unk>": 0, "a": 1, "b": 2}
    config = {"added_tokens_decoder": {"3": {"content": "<end>", "special": True}}}
    (tmp_path / "unigram" / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_vocabulary(tmp_path / "unigram")["<end>"] == 3


@pytest.mark.slow
def test_a_tokenizer_without_tokenizer_json_is_read_by_transformers(
    base: Path, tmp_path: Path
) -> None:
    content = json.loads((base / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    found = read_vocabulary(folder)
    assert {token: found[token] for token in content["vocab"]} == content["vocab"]


def test_examples_are_few() -> None:
    encoding = {token: number for number, token in enumerate("abcdefg")}
    own = {token: number for number, token in enumerate("gfedcba")}
    said = describe_difference(encoding, own)
    assert said.startswith("6 of its 7 ids differ (0 is 'a' there and 'g' here;")
    assert said.count(" here") == 3
    assert describe_difference(encoding, {**encoding, "more": 7}) == ""
