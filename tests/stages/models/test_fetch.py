"""Workers get exactly the pinned files, or one clear message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from schemas.errors import ConfigError
from stages.models.fetch import fetch_model, fetch_tokenizer, read_config
from stages.models.resolve import (
    ModelPin,
    TokenizerPin,
    join_adapter,
    pin_adapter,
    pin_model,
    pin_tokenizer,
)
from tests.stages.models.fabricated_hub import COMMIT, Hub
from tests.stages.models.made_up_models import (
    FILES,
    FIRST,
    REPO,
    SHARDS,
    write_model,
)
from tests.tiny_adapters import make_tiny_adapter
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")
Ask = Callable[..., str]


class TestLocalFolder:
    def test_a_pin_survives_the_way_to_a_worker(self, tmp_path: Path) -> None:
        pin = pin_model(str(write_model(tmp_path / "one")))
        assert msgspec.json.decode(msgspec.json.encode(pin), type=ModelPin) == pin
        assert fetch_model(pin) == str(tmp_path / "one")


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

    def test_a_config_is_read_only_as_pinned(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "one")
        pin = pin_model(str(folder))
        assert read_config(pin) == {"model_type": "llama", "rope_theta": 1e4}
        (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 2e4}')
        with pytest.raises(ConfigError, match=f"config.*wanted {pin.config}"):
            read_config(pin)


class TestAdapter:
    @pytest.mark.slow
    def test_an_adapter_is_merged_once_and_then_needs_neither_folder(
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

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_an_adapter_that_does_not_fit_is_one_clear_message(self, tmp_path: Path) -> None:
        adapter = make_tiny_adapter(tmp_path / "adapter", make_tiny_model(tmp_path / "a", "gpt2"))
        model = pin_model(str(make_tiny_model(tmp_path / "b")))
        with pytest.raises(ConfigError, match="does not fit its base model"):
            fetch_model(join_adapter(model, pin_adapter(str(adapter))))


class TestHub:
    def test_reading_a_config_downloads_no_weights(self, hub: Hub, ask: Ask) -> None:
        pin = ask(f"resolve.pin_model('{REPO}')")
        answer = ask(f"fetch.read_config(msgspec.json.decode({pin!r}, type=ModelPin))")
        assert json.loads(answer) == json.loads(FILES["config.json"])
        assert not set(hub.downloads) & set(SHARDS)

    def test_a_worker_downloads_and_then_needs_no_hub(
        self, tmp_path: Path, hub: Hub, ask: Ask
    ) -> None:
        pin = ask(f"resolve.pin_model('{REPO}')")
        fetch = f"fetch.fetch_model(msgspec.json.decode({pin!r}, type=ModelPin))"
        folder = Path(json.loads(ask(fetch)))
        assert {path.name for path in folder.iterdir()} == set(FILES)
        assert (folder / FIRST).read_bytes() == SHARDS[FIRST]
        num_downloads = len(hub.downloads)
        assert json.loads(ask(fetch, HF_HUB_OFFLINE="1")) == str(folder)
        assert ask(f"resolve.pin_model('{REPO}')", HF_HUB_OFFLINE="1") == pin
        assert ask(f"resolve.pin_model('{REPO}')", HF_ENDPOINT="http://127.0.0.1:9") == pin
        assert len(hub.downloads) == num_downloads

    def test_a_worker_that_reaches_no_hub_refuses_a_model_without_weights(
        self, tmp_path: Path, ask: Ask
    ) -> None:
        pin = ask(f"resolve.pin_model('{REPO}')")
        fetch = f"fetch.fetch_model(msgspec.json.decode({pin!r}, type=ModelPin))"
        assert ask(fetch, HF_HUB_OFFLINE="1").startswith("ConfigError: ")
        # Older clients leave no listing of the snapshot in the cache.
        shutil.rmtree(tmp_path / "hf" / "hub" / "models--someone--tiny" / "trees")
        assert ask(fetch, HF_HUB_OFFLINE="1").startswith("ConfigError: ")

    def test_a_tokenizer_is_fetched_without_the_model(self, hub: Hub, ask: Ask) -> None:
        pin = ask(f"resolve.pin_tokenizer('{REPO}')")
        assert msgspec.json.decode(pin, type=TokenizerPin).commit == COMMIT
        folder = json.loads(
            ask(f"fetch.fetch_tokenizer(msgspec.json.decode({pin!r}, type=TokenizerPin))")
        )
        present = {path.name for path in Path(folder).iterdir()}
        assert present == {
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }

    def test_a_changed_snapshot_is_refused(self, ask: Ask) -> None:
        pin = ask(f"resolve.pin_model('{REPO}')")
        fetch = f"fetch.fetch_model(msgspec.json.decode({pin!r}, type=ModelPin))"
        folder = Path(json.loads(ask(fetch)))
        (folder / "config.json").unlink()
        (folder / "config.json").write_text('{"model_type": "other"}')
        assert "The config in" in ask(fetch, HF_HUB_OFFLINE="1")
