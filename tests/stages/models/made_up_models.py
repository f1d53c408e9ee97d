"""Made-up models and adapters of a few bytes, for tests that never load them."""

import json
from pathlib import Path

REPO = "someone/tiny"
"""Name of the model on the hub of a test."""

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

ADAPTER_CONFIG = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "some/base"}
ADAPTER_FILES = {
    "adapter_config.json": json.dumps(ADAPTER_CONFIG).encode(),
    "adapter_model.safetensors": b"A and B",
    "README.md": b"about",
}


def write_model(folder: Path, **changed: bytes) -> Path:
    """Write the model; keywords replace contents by file stem, with underscores for dashes."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(changed.get(name.split(".")[0].replace("-", "_"), content))
    return folder


def write_adapter(folder: Path, **changed: object) -> Path:
    """Write the adapter; keywords replace values of its config."""
    folder.mkdir(parents=True)
    for name, content in ADAPTER_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER_CONFIG, **changed}))
    return folder
