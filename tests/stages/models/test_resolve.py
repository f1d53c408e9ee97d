"""Does a pin follow a model's content, and nothing but its content?"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from schemas.errors import ConfigError
from stages.models.resolve import (
    AdapterPin,
    ModelPin,
    TokenizerPin,
    fetch_model,
    fetch_tokenizer,
    join_adapter,
    pin_adapter,
    pin_model,
    pin_tokenizer,
    read_config,
)
from tests.stages.models.fabricated_hub import COMMIT, Hub
from tests.tiny_adapters import make_tiny_adapter
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

REPO = "someone/tiny"

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
SHARDS = {FIRST: b"first \x00", SECOND: b"second \xff"}
FILES = {
    "config.json": json.dumps({"model_type": "llama", "rope_theta": 1e4}).encode(),
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": json.dumps({"eos_token": "</s>"}).encode(),
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a.weight": FIRST, "b.weight": SECOND}}
    ).encode(),
    **SHARDS,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_model(folder: Path, **changed: bytes) -> Path:
    """Write the little model; `changed` names a file by its stem."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(changed.get(name.split(".")[0].replace("-", "_"), content))
    return folder


class TestLocalFolder:
    def test_renaming_the_folder_keeps_the_pin(self, tmp_path: Path) -> None:
        before = pin_model(str(write_model(tmp_path / "one")))
        (tmp_path / "one").rename(tmp_path / "two")
        after = pin_model(str(tmp_path / "two"))
        assert after.identity() == before.identity()
        assert after.tokenizer == before.tokenizer

    def test_identity_names_no_place(self, tmp_path: Path) -> None:
        identity = pin_model(str(write_model(tmp_path / "one"))).identity()
        assert set(identity) == {"weights", "config"}
        assert str(tmp_path) not in json.dumps(identity)

    def test_one_changed_byte_of_one_shard_changes_weights_alone(self, tmp_path: Path) -> None:
        one = pin_model(str(write_model(tmp_path / "one")))
        two = pin_model(str(write_model(tmp_path / "two", model_00002_of_00002=b"c")))
        assert two.weights != one.weights
        assert (two.config, two.tokenizer) == (one.config, one.tokenizer)

    def test_renaming_shards_keeps_the_pin(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        before = pin_model(str(folder))
        for old, new in zip(SHARDS, ["z.safetensors", "a.safetensors"], strict=True):
            (folder / old).rename(folder / new)
        index = {"weight_map": {"a.weight": "z.safetensors", "b.weight": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert pin_model(str(folder)) == before

    def test_a_big_file_rewritten_at_equal_size_is_seen(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one", model_00001_of_00002=b"a" * 2_000_000)
        before = pin_model(str(folder))
        shard = folder / FIRST
        shard.write_bytes(b"a" * 1_999_999 + b"b")
        os.utime(shard, ns=(1, 1))
        assert pin_model(str(folder)).weights != before.weights

    def test_weights_are_a_digest_over_sorted_sha256s(self, tmp_path: Path) -> None:
        """Oracle: sha256 of the JSON list, written out by hand."""
        content = sorted(hashlib.sha256(shard).hexdigest() for shard in SHARDS.values())
        expected = hashlib.sha256(f'["{content[0]}","{content[1]}"]'.encode()).hexdigest()
        assert pin_model(str(write_model(tmp_path / "one"))).weights == expected

    @pytest.mark.parametrize("key", ["transformers_version", "_name_or_path"])
    def test_provenance_is_no_part_of_the_config(self, tmp_path: Path, key: str) -> None:
        config = {"model_type": "llama", "rope_theta": 1e4, key: "4.0"}
        nested = {**config, "text_config": {key: "4.0"}}
        plain = {"model_type": "llama", "rope_theta": 1e4, "text_config": {}}
        folders = [
            write_model(tmp_path / str(n), config=json.dumps(content).encode())
            for n, content in enumerate([nested, plain])
        ]
        assert pin_model(str(folders[0])).config == pin_model(str(folders[1])).config

    def test_a_changed_rope_changes_the_config_alone(self, tmp_path: Path) -> None:
        one = pin_model(str(write_model(tmp_path / "one")))
        config = json.dumps({"model_type": "llama", "rope_theta": 2e4}).encode()
        two = pin_model(str(write_model(tmp_path / "two", config=config)))
        assert two.config != one.config
        assert (two.weights, two.tokenizer) == (one.weights, one.tokenizer)

    def test_a_config_may_hold_infinity(self, tmp_path: Path) -> None:
        finite = write_model(tmp_path / "one", config=b'{"time_step_limit": [0.0, 1.0]}')
        infinite = write_model(tmp_path / "two", config=b'{"time_step_limit": [0.0, Infinity]}')
        assert pin_model(str(finite)).config != pin_model(str(infinite)).config

    @pytest.mark.parametrize(
        "changed",
        [
            {"chat_template": b"{{ messages[0] }}"},
            {"tokenizer": b'{"model": {"unk": 0}}'},
            {"tokenizer_config": b'{"eos_token": "<|im_end|>"}'},
            {"config": b'{"model_type": "gpt2"}'},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_what_decides_tokens_changes_the_tokenizer(
        self, tmp_path: Path, changed: dict[str, bytes]
    ) -> None:
        one = pin_tokenizer(str(write_model(tmp_path / "one")))
        two = pin_tokenizer(str(write_model(tmp_path / "two", **changed)))
        assert two.identity() != one.identity()

    def test_where_a_tokenizer_was_read_from_is_no_part_of_it(self, tmp_path: Path) -> None:
        content = {"eos_token": "</s>", "is_local": True, "name_or_path": "/somewhere"}
        changed = json.dumps(content).encode()
        one = pin_tokenizer(str(write_model(tmp_path / "one")))
        two = pin_tokenizer(str(write_model(tmp_path / "two", tokenizer_config=changed)))
        assert two.identity() == one.identity()

    def test_a_model_and_its_tokenizer_agree(self, tmp_path: Path) -> None:
        folder = str(write_model(tmp_path / "one"))
        assert pin_tokenizer(folder).tokenizer == pin_model(folder).tokenizer

    def test_a_pin_survives_the_way_to_a_worker(self, tmp_path: Path) -> None:
        pin = pin_model(str(write_model(tmp_path / "one")))
        assert msgspec.json.decode(msgspec.json.encode(pin), type=ModelPin) == pin
        assert fetch_model(pin) == str(tmp_path / "one")

    def test_a_relative_name_is_pinned_as_an_absolute_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_model(tmp_path / "one")
        monkeypatch.chdir(tmp_path)
        assert pin_model("./one").spec == str(tmp_path / "one")


class TestRefusals:
    def test_other_weights_than_the_pinned_are_refused_naming_both(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        pin = pin_model(str(folder))
        (folder / FIRST).write_bytes(b"other")
        found = pin_model(str(folder)).weights
        with pytest.raises(ConfigError, match=f"weights.*found {found}.*wanted {pin.weights}"):
            fetch_model(pin)

    def test_another_template_than_the_pinned_is_refused(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        pin = pin_tokenizer(str(folder))
        assert fetch_tokenizer(pin) == str(folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
        with pytest.raises(ConfigError, match=f"tokenizer.*wanted {pin.tokenizer}"):
            fetch_tokenizer(pin)

    def test_pickled_weights_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin, which is not read.*Convert"):
            pin_model(str(tmp_path))

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        (folder / SECOND).unlink()
        with pytest.raises(ConfigError, match=f"has no {SECOND}"):
            pin_model(str(folder))

    def test_two_sets_of_weights_are_refused(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        (folder / "model.safetensors").write_bytes(b"older")
        with pytest.raises(ConfigError, match="holds both"):
            pin_model(str(folder))

    def test_weights_that_only_vllm_would_load_are_refused(self, tmp_path: Path) -> None:
        """Without an index it loads every safetensors file of the folder."""
        folder = write_model(tmp_path / "one")
        (folder / "model.safetensors.index.json").unlink()
        (folder / FIRST).rename(folder / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"holds {SECOND} and no model\.safetensors\.index"):
            pin_model(str(folder))

    def test_an_adapter_is_refused(self, tmp_path: Path) -> None:
        """transformers would put it on the model, and no digest covers it."""
        folder = write_model(tmp_path / "one")
        pin = pin_model(str(folder))
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
        with pytest.raises(
            ConfigError, match=r"is an adapter.*belongs to \(some/base\) and stages\.score\.adapter"
        ):
            pin_model(str(folder))
        with pytest.raises(ConfigError, match="is an adapter"):
            fetch_model(pin)

    def test_a_quantisation_file_is_part_of_the_config(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        before = pin_model(str(folder))
        configs = {before.config}
        for kind in ("FP8", "NVFP4"):
            content = json.dumps({"quantization": {"kv_cache_quant_algo": kind}})
            (folder / "hf_quant_config.json").write_text(content)
            after = pin_model(str(folder))
            assert msgspec.structs.replace(after, config=before.config) == before
            configs.add(after.config)
        assert len(configs) == 3

    def test_a_config_is_read_only_as_pinned(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        pin = pin_model(str(folder))
        assert read_config(pin) == {"model_type": "llama", "rope_theta": 1e4}
        (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 2e4}')
        with pytest.raises(ConfigError, match=f"config.*wanted {pin.config}"):
            read_config(pin)

    def test_a_folder_without_a_tokenizer_has_none(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        assert pin_model(str(tmp_path)).tokenizer is None
        with pytest.raises(ConfigError, match="has no tokenizer"):
            pin_tokenizer(str(tmp_path))

    @pytest.mark.parametrize("spec", ["./nowhere", "/no/where", "a b", "three/part/name"])
    def test_a_name_that_is_nothing_is_refused(self, spec: str) -> None:
        with pytest.raises(ConfigError, match="not a folder on this machine"):
            pin_model(spec)

    def test_an_unknown_sample_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="There are: sample:smollm2-135m-instruct"):
            pin_model("sample:gpt5")


ADAPTER_CONFIG = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "some/base"}
ADAPTER_FILES = {
    "adapter_config.json": json.dumps(ADAPTER_CONFIG).encode(),
    "adapter_model.safetensors": b"A and B",
    "README.md": b"about",
}


def write_adapter(folder: Path, **changed: object) -> Path:
    """Write a little adapter; `changed` are keys of its config."""
    folder.mkdir(parents=True)
    for name, content in ADAPTER_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER_CONFIG, **changed}))
    return folder


class TestAdapter:
    def test_a_pin_follows_content_and_not_names(self, tmp_path: Path) -> None:
        one = pin_adapter(str(write_adapter(tmp_path / "one")))
        two = pin_adapter(str(write_adapter(tmp_path / "two", base_model_name_or_path="/else")))
        assert one.identity() == two.identity()
        assert str(tmp_path) not in json.dumps(one.identity())

    def test_one_changed_byte_or_key_is_another_adapter(self, tmp_path: Path) -> None:
        one = pin_adapter(str(write_adapter(tmp_path / "one")))
        two = pin_adapter(str(write_adapter(tmp_path / "two", lora_alpha=3)))
        (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"A and C")
        three = pin_adapter(str(tmp_path / "two"))
        assert two.weights == one.weights != three.weights
        assert two.config == three.config != one.config

    def test_a_template_alone_is_no_tokenizer(self, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "one")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tokenizer_config.json").write_text("{}")
        assert pin_adapter(str(folder)).tokenizer is None
        (folder / "tokenizer.json").write_text("{}")
        assert pin_adapter(str(folder)).tokenizer == pin_tokenizer(str(folder)).tokenizer

    def test_the_model_with_it_is_another_model(self, tmp_path: Path) -> None:
        model = pin_model(str(write_model(tmp_path / "model")))
        adapter = pin_adapter(str(write_adapter(tmp_path / "adapter")))
        joined = join_adapter(model, adapter)
        assert joined.identity() == {**model.identity(), "adapter": adapter.identity()}
        assert joined.label == "model with adapter merged"
        assert msgspec.json.decode(msgspec.json.encode(joined), type=ModelPin) == joined

    def test_other_kinds_are_refused(self, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "one", peft_type="PROMPT_TUNING")
        with pytest.raises(ConfigError, match="of kind PROMPT_TUNING; LoRA is what"):
            pin_adapter(str(folder))

    def test_a_whole_model_is_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"has no adapter_config\.json.*stages\.score\.model"):
            pin_adapter(str(write_model(tmp_path / "one")))

    def test_pickled_adapters_are_refused(self, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "one")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ConfigError, match=r"adapter_model\.bin, which is not read"):
            pin_adapter(str(folder))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("config.json", {"model_type": "llama", "quantization_config": {"bits": 4}}),
            ("hf_quant_config.json", {"quantization": {}}),
        ],
    )
    def test_a_quantised_base_is_refused(
        self, tmp_path: Path, name: str, content: dict[str, object]
    ) -> None:
        folder = write_model(tmp_path / "model")
        (folder / name).write_text(json.dumps(content))
        adapter = pin_adapter(str(write_adapter(tmp_path / "adapter")))
        with pytest.raises(ConfigError, match="is quantised"):
            join_adapter(pin_model(str(folder)), adapter)

    def test_it_is_merged_once_and_then_needs_neither_folder(
        self, tmp_path: Path, cache: Path
    ) -> None:
        pin = join_adapter(
            pin_model(str(make_tiny_model(tmp_path / "model"))),
            pin_adapter(str(make_tiny_adapter(tmp_path / "adapter", tmp_path / "model"))),
        )
        folder = Path(fetch_model(pin))
        assert folder.is_relative_to(cache)
        assert (folder / "model.safetensors").is_file()
        for name in ("model", "adapter"):
            shutil.rmtree(tmp_path / name)
        assert fetch_model(pin) == str(folder)

        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
        with pytest.raises(ConfigError, match=r"is not what was written.*merged anew"):
            fetch_model(pin)

    def test_equal_content_elsewhere_is_merged_once(self, tmp_path: Path, cache: Path) -> None:
        base, adapter = tmp_path / "one" / "model", tmp_path / "one" / "adapter"
        make_tiny_adapter(adapter, make_tiny_model(base))
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        folders = set()
        for place in ("one", "two"):
            model = pin_model(str(tmp_path / place / "model"))
            pin = join_adapter(model, pin_adapter(str(tmp_path / place / "adapter")))
            folders.add(fetch_model(pin))
        assert len(folders) == 1
        make_tiny_tokenizer().save_pretrained(adapter)
        with_tokenizer = join_adapter(pin_model(str(base)), pin_adapter(str(adapter)))
        assert fetch_model(with_tokenizer) not in folders

    def test_another_adapter_than_the_pinned_is_refused(self, tmp_path: Path) -> None:
        base, adapter = tmp_path / "model", tmp_path / "adapter"
        make_tiny_adapter(adapter, make_tiny_model(base))
        pin = join_adapter(pin_model(str(base)), pin_adapter(str(adapter)))
        make_tiny_adapter(adapter, base, seed=1)
        with pytest.raises(ConfigError, match=f"The weights in {adapter}.*planned"):
            fetch_model(pin)

    def test_one_that_does_not_fit_is_one_clear_message(self, tmp_path: Path) -> None:
        adapter = make_tiny_adapter(tmp_path / "adapter", make_tiny_model(tmp_path / "a", "gpt2"))
        model = pin_model(str(make_tiny_model(tmp_path / "b")))
        with pytest.raises(ConfigError, match="does not fit its base model"):
            fetch_model(join_adapter(model, pin_adapter(str(adapter))))


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(kind="models", repo=REPO, files=dict(FILES), lfs=SHARDS)
    with hub.serve():
        yield hub


Ask = Callable[..., str]


@pytest.fixture
def ask(tmp_path: Path, hub: Hub) -> Ask:
    """Evaluate an expression in another process: the hub's client reads its settings at import."""

    def evaluate(expression: str, **environment: str) -> str:
        code = (
            "import sys, msgspec\nfrom schemas.errors import ConfigError\n"
            "from stages.models.resolve import *\ntry:\n    result = "
            + expression
            + "\nexcept ConfigError as error:\n"
            "    sys.exit(f'ConfigError: {error}')\nsys.stdout.write(msgspec.json.encode(result)"
            ".decode())"
        )
        return hub.run(code, tmp_path / "hf", **environment)

    return evaluate


class TestHub:
    def test_pinning_reads_no_weights_and_equals_the_local_folders_pin(
        self, tmp_path: Path, hub: Hub, ask: Ask
    ) -> None:
        pin = msgspec.json.decode(ask(f"pin_model('{REPO}')"), type=ModelPin)
        assert (pin.spec, pin.commit) == (REPO, COMMIT)
        assert not set(hub.downloads) & set(SHARDS)
        local = pin_model(str(write_model(tmp_path / "local")))
        assert (pin.identity(), pin.tokenizer) == (local.identity(), local.tokenizer)

    def test_weights_that_are_plain_git_files_are_pinned_alike(
        self, tmp_path: Path, hub: Hub, ask: Ask
    ) -> None:
        for name in ("model.safetensors.index.json", *SHARDS):
            del hub.files[name]
        hub.files["model.safetensors"] = b"tiny"
        (folder := tmp_path / "local").mkdir()
        for name, content in hub.files.items():
            (folder / name).write_bytes(content)
        pin = msgspec.json.decode(ask(f"pin_model('{REPO}')"), type=ModelPin)
        assert pin.weights == pin_model(str(folder)).weights

    def test_reading_a_config_downloads_no_weights(self, hub: Hub, ask: Ask) -> None:
        pin = ask(f"pin_model('{REPO}')")
        answer = ask(f"read_config(msgspec.json.decode({pin!r}, type=ModelPin))")
        assert json.loads(answer) == json.loads(FILES["config.json"])
        assert not set(hub.downloads) & set(SHARDS)

    def test_pinning_an_adapter_reads_no_weights_and_equals_the_local_folders_pin(
        self, tmp_path: Path, hub: Hub, ask: Ask
    ) -> None:
        weights = {"adapter_model.safetensors": ADAPTER_FILES["adapter_model.safetensors"]}
        hub.files, hub.lfs = dict(ADAPTER_FILES), weights
        pin = msgspec.json.decode(ask(f"pin_adapter('{REPO}')"), type=AdapterPin)
        assert (pin.spec, pin.commit, pin.label) == (REPO, COMMIT, f"{REPO}@{COMMIT}")
        assert not set(hub.downloads) & set(weights)
        assert pin.identity() == pin_adapter(str(write_adapter(tmp_path / "local"))).identity()

        encoded = msgspec.json.encode(pin).decode()
        fetch = "__import__('stages.models.resolve').models._fetch_adapter"
        folder = json.loads(ask(f"{fetch}(msgspec.json.decode({encoded!r}, type=AdapterPin))"))
        assert (Path(folder) / "adapter_model.safetensors").read_bytes() == b"A and B"

    def test_a_branch_is_pinned_to_the_commit_it_stands_at(self, hub: Hub, ask: Ask) -> None:
        before = msgspec.json.decode(ask(f"pin_model('{REPO}')"), type=ModelPin)
        hub.commit = COMMIT[::-1]
        hub.files[FIRST] = b"new"
        after = msgspec.json.decode(ask(f"pin_model('{REPO}')"), type=ModelPin)
        assert (before.commit, after.commit) == (COMMIT, COMMIT[::-1])
        assert after.weights != before.weights

    def test_a_worker_downloads_and_then_needs_no_hub(
        self, tmp_path: Path, hub: Hub, ask: Ask
    ) -> None:
        pin = ask(f"pin_model('{REPO}')")
        fetch = f"fetch_model(msgspec.json.decode({pin!r}, type=ModelPin))"
        folder = Path(json.loads(ask(fetch)))
        assert {path.name for path in folder.iterdir()} == set(FILES)
        assert (folder / FIRST).read_bytes() == SHARDS[FIRST]
        num_downloads = len(hub.downloads)
        assert json.loads(ask(fetch, HF_HUB_OFFLINE="1")) == str(folder)
        assert ask(f"pin_model('{REPO}')", HF_HUB_OFFLINE="1") == pin
        assert ask(f"pin_model('{REPO}')", HF_ENDPOINT="http://127.0.0.1:9") == pin
        assert len(hub.downloads) == num_downloads

    def test_a_worker_that_reaches_no_hub_refuses_a_model_without_weights(
        self, tmp_path: Path, ask: Ask
    ) -> None:
        pin = ask(f"pin_model('{REPO}')")
        fetch = f"fetch_model(msgspec.json.decode({pin!r}, type=ModelPin))"
        assert ask(fetch, HF_HUB_OFFLINE="1").startswith("ConfigError: ")
        # As older clients leave the cache: without a listing of what a snapshot should hold.
        shutil.rmtree(tmp_path / "hf" / "hub" / "models--someone--tiny" / "trees")
        assert ask(fetch, HF_HUB_OFFLINE="1").startswith("ConfigError: ")

    def test_a_tokenizer_is_fetched_without_the_model(self, hub: Hub, ask: Ask) -> None:
        pin = ask(f"pin_tokenizer('{REPO}')")
        assert msgspec.json.decode(pin, type=TokenizerPin).commit == COMMIT
        folder = json.loads(
            ask(f"fetch_tokenizer(msgspec.json.decode({pin!r}, type=TokenizerPin))")
        )
        present = {path.name for path in Path(folder).iterdir()}
        assert present == {
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }

    def test_the_caches_blobs_are_their_own_digest(self, tmp_path: Path, ask: Ask) -> None:
        """A blob is named by its sha256, so its content isn't read: here it holds other bytes."""
        store = tmp_path / "hf" / "hub" / "models--someone--tiny"
        snapshot = store / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (store / "blobs").mkdir()
        (store / "refs").mkdir()
        (store / "refs" / "main").write_text(COMMIT)
        for name, content in FILES.items():
            hasher = hashlib.sha256 if name in SHARDS else hashlib.sha1
            blob = store / "blobs" / hasher(content).hexdigest()
            blob.write_bytes(b"never read" if name in SHARDS else content)
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
        pin = msgspec.json.decode(ask(f"pin_model('{REPO}')", HF_HUB_OFFLINE="1"), type=ModelPin)
        assert pin.commit == COMMIT
        assert pin.weights == pin_model(str(write_model(tmp_path / "local"))).weights

    @pytest.mark.parametrize(
        ("spec", "environment"),
        [
            (REPO, {"HF_HUB_OFFLINE": "1"}),
            (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}),
            ("someone/absent", {}),
            (f"{REPO}@no-such-branch", {}),
        ],
        ids=["offline", "unreachable", "no such model", "no such revision"],
    )
    def test_what_cannot_be_read_is_one_clear_message(
        self, ask: Ask, spec: str, environment: dict[str, str]
    ) -> None:
        answer = ask(f"pin_model('{spec}')", **environment)
        assert answer.startswith("ConfigError: ")
        assert f"{spec} is no folder here, and could not be read from the Hugging Face" in answer

    def test_pickled_weights_on_the_hub_are_refused(self, hub: Hub, ask: Ask) -> None:
        hub.files = {"config.json": b"{}", "pytorch_model.bin": b""}
        answer = ask(f"pin_model('{REPO}')")
        assert answer.startswith("ConfigError: ")
        assert "pytorch_model.bin, which is not read" in answer

    def test_a_changed_snapshot_is_refused(self, ask: Ask) -> None:
        pin = ask(f"pin_model('{REPO}')")
        fetch = f"fetch_model(msgspec.json.decode({pin!r}, type=ModelPin))"
        folder = Path(json.loads(ask(fetch)))
        (folder / "config.json").unlink()
        (folder / "config.json").write_text('{"model_type": "other"}')
        assert "The config in" in ask(fetch, HF_HUB_OFFLINE="1")
