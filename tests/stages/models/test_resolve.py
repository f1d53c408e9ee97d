"""Pins follow the content of files, and nothing but their content."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from schemas.errors import ConfigError
from stages.models.fetch import fetch_model
from stages.models.resolve import (
    AdapterPin,
    ModelPin,
    join_adapter,
    pin_adapter,
    pin_model,
    pin_tokenizer,
)
from tests.stages.models.fabricated_hub import COMMIT, Hub
from tests.stages.models.made_up_models import (
    ADAPTER_FILES,
    FILES,
    FIRST,
    REPO,
    SECOND,
    SHARDS,
    write_adapter,
    write_model,
)

pytestmark = pytest.mark.usefixtures("cache")
Ask = Callable[..., str]


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
        """The oracle is the sha256 of the JSON list, written out by hand."""
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
    def test_whatever_decides_tokens_changes_the_tokenizer(
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

    def test_a_relative_name_is_pinned_as_an_absolute_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_model(tmp_path / "one")
        monkeypatch.chdir(tmp_path)
        assert pin_model("./one").spec == str(tmp_path / "one")


class TestRefusals:
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
        """Without an index, vLLM loads every safetensors file of the folder."""
        folder = write_model(tmp_path / "one")
        (folder / "model.safetensors.index.json").unlink()
        (folder / FIRST).rename(folder / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"holds {SECOND} and no model\.safetensors\.index"):
            pin_model(str(folder))

    def test_an_adapter_is_refused(self, tmp_path: Path) -> None:
        """transformers would apply it to the model, and no digest covers it."""
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

    def test_a_folder_without_a_tokenizer_has_none(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        assert pin_model(str(tmp_path)).tokenizer is None
        with pytest.raises(ConfigError, match="has no tokenizer"):
            pin_tokenizer(str(tmp_path))

    @pytest.mark.parametrize("spec", ["./nowhere", "/no/where", "a b", "three/part/name"])
    def test_a_name_that_names_nothing_is_refused(self, spec: str) -> None:
        with pytest.raises(ConfigError, match="not a folder on this machine"):
            pin_model(spec)

    def test_an_unknown_sample_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="There are: sample:smollm2-135m-instruct"):
            pin_model("sample:gpt5")


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
        with pytest.raises(ConfigError, match="of kind PROMPT_TUNING; only LoRA"):
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


class TestHub:
    def test_pinning_reads_no_weights_and_equals_the_local_folders_pin(
        self, tmp_path: Path, hub: Hub, ask: Ask
    ) -> None:
        pin = msgspec.json.decode(ask(f"resolve.pin_model('{REPO}')"), type=ModelPin)
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
        pin = msgspec.json.decode(ask(f"resolve.pin_model('{REPO}')"), type=ModelPin)
        assert pin.weights == pin_model(str(folder)).weights

    def test_pinning_an_adapter_reads_no_weights_and_equals_the_local_folders_pin(
        self, tmp_path: Path, hub: Hub, ask: Ask
    ) -> None:
        weights = {"adapter_model.safetensors": ADAPTER_FILES["adapter_model.safetensors"]}
        hub.files, hub.lfs = dict(ADAPTER_FILES), weights
        pin = msgspec.json.decode(ask(f"resolve.pin_adapter('{REPO}')"), type=AdapterPin)
        assert (pin.spec, pin.commit, pin.label) == (REPO, COMMIT, f"{REPO}@{COMMIT}")
        assert not set(hub.downloads) & set(weights)
        assert pin.identity() == pin_adapter(str(write_adapter(tmp_path / "local"))).identity()

        encoded = msgspec.json.encode(pin).decode()
        folder = json.loads(
            ask(f"fetch._fetch_adapter(msgspec.json.decode({encoded!r}, type=AdapterPin))")
        )
        assert (Path(folder) / "adapter_model.safetensors").read_bytes() == b"A and B"

    def test_a_branch_is_pinned_to_its_commit(self, hub: Hub, ask: Ask) -> None:
        before = msgspec.json.decode(ask(f"resolve.pin_model('{REPO}')"), type=ModelPin)
        hub.commit = COMMIT[::-1]
        hub.files[FIRST] = b"new"
        after = msgspec.json.decode(ask(f"resolve.pin_model('{REPO}')"), type=ModelPin)
        assert (before.commit, after.commit) == (COMMIT, COMMIT[::-1])
        assert after.weights != before.weights

    def test_the_caches_blobs_are_their_own_digest(self, tmp_path: Path, ask: Ask) -> None:
        """A blob is named by its sha256 and therefore not read: here it holds other bytes."""
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
        pin = msgspec.json.decode(
            ask(f"resolve.pin_model('{REPO}')", HF_HUB_OFFLINE="1"), type=ModelPin
        )
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
    def test_an_unreadable_model_is_one_clear_message(
        self, ask: Ask, spec: str, environment: dict[str, str]
    ) -> None:
        answer = ask(f"resolve.pin_model('{spec}')", **environment)
        assert answer.startswith("ConfigError: ")
        assert f"{spec} is no folder here, and could not be read from the Hugging Face" in answer

    def test_pickled_weights_on_the_hub_are_refused(self, hub: Hub, ask: Ask) -> None:
        hub.files = {"config.json": b"{}", "pytorch_model.bin": b""}
        answer = ask(f"resolve.pin_model('{REPO}')")
        assert answer.startswith("ConfigError: ")
        assert "pytorch_model.bin, which is not read" in answer
