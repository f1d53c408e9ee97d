"""Merge a LoRA adapter into its base model and write the result as one Hugging Face folder.

Run as ``python -m stages.models.merge_adapter BASE ADAPTER OUT_FOLDER``. It runs in a process of
its own because it needs torch and the whole model in float32, and frees that memory when it ends.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from schemas.errors import ConfigError, PipelineError
from stages.models.digest import ADAPTER_WEIGHTS, CHECKSUMS, list_companions, list_tokenizer_files
from stages.policy.model import load_model, vocabulary_size

logger = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 64
_TOLERANCE = 1e-4
"""Relative to the largest logit. Float32 rounding stays well below it; a merge that loses or
doubles a tensor is far above."""


def merge_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Write a base model with its adapter merged, in float32.

    The folder appears at once and whole, and only if the merged model computes the same logits as
    base and adapter together.

    Args:
        base: the base model's folder.
        adapter: a folder as peft's save_pretrained writes it. The merged model gets its tokenizer
            if it has one.
        folder: where to write the merged model.
    Raises:
        ConfigError: the adapter does not fit the base, or cannot be merged into it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        wanted = _write_merged(base, adapter, staging)
        found = _probe(load_model(str(staging), dtype=torch.float32, device=torch.device("cpu")))
        difference = (found - wanted).abs().max().item()
        if not difference <= _TOLERANCE * wanted.abs().max().item():
            raise ConfigError(
                f"{adapter} cannot be merged into {base}: the merged model gives other logits than "
                f"base and adapter together (by up to {difference:.3g}). It may train layers that "
                "share their weights with other layers, such as tied embeddings."
            )
        staging.chmod(0o755)  # mkdtemp makes it unreadable for other users.
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_merged(base: Path, adapter: Path, folder: Path) -> Tensor:
    """Write the merged model, and return the logits of base and adapter before merging."""
    model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu"))
    adapted = _load_adapter(model, adapter)
    wanted = _probe(adapted)
    merged = merge_layers(adapted)
    save_model(merged, folder, start=base)
    for file in list_tokenizer_files(adapter):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(adapter / file, folder / file)
    sums = [(_sha256(file), file.name) for file in sorted(folder.glob("*.safetensors"))]
    lines = [f"{sha256}  {name}\n" for sha256, name in sums]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    return wanted


def merge_layers(adapted: PeftModel) -> PreTrainedModel:
    """Merge an adapter into the weights of its base, and return the base.

    An adapter on one of two tied embeddings changes only that one, but merging writes into the
    matrix that both share. So each of them gets a matrix of its own first.
    """
    base = adapted.get_base_model()
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    if shares_embeddings(base) and any(isinstance(layer, LoraLayer) for layer in layers):
        output = layers[1].get_base_layer() if isinstance(layers[1], LoraLayer) else layers[1]
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    with without_tie_warnings():
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


@contextlib.contextmanager
def without_tie_warnings() -> Iterator[None]:
    """Hide peft's advice on tied embeddings, which merge_layers follows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*tie_word_embeddings", UserWarning)
        yield


def shares_embeddings(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one matrix in memory."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return layers[0].weight.data_ptr() == layers[1].weight.data_ptr()


def save_model(model: PreTrainedModel, folder: Path, *, start: Path) -> None:
    """Write float32 weights, with the config, tokenizer and licence of the model they come from.

    Args:
        model: in float32, from load_model, which has changed its config in memory.
        folder: where to write.
        start: folder from which the model was loaded.
    """
    is_tied = shares_embeddings(model)
    model.config.tie_word_embeddings = is_tied
    # save_pretrained refuses the generation settings of some releases; the file is copied below.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in list_companions(start):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((start / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # The key's former name.
    config.pop("auto_map", None)  # It names code, which is neither run nor copied.
    config["dtype"] = "float32"
    was_tied = AutoConfig.from_pretrained(start, local_files_only=True).tie_word_embeddings
    if was_tied and not is_tied:
        # vLLM reads two matrices only if the config says that there are two.
        config["tie_word_embeddings"] = False
        if "text_config" in config:
            config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Apply an adapter to its base. peft itself only warns about tensors that do not fit.

    Raises:
        ConfigError: a tensor of the adapter has no place in the model, has the wrong shape, or is
            missing.
    """
    given = load_file(adapter / ADAPTER_WEIGHTS)
    own = {name: tensor.clone() for name, tensor in _named_as_in(given, model)}
    try:
        with without_tie_warnings():
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{adapter} does not fit its base model: {error} An adapter that was trained with "
            "added tokens needs a base that has them: merge it by hand, and name the result."
        ) from error
    loaded = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # peft saves the embeddings with an adapter that trains them, even if they are the base's own.
    left_over = {
        name
        for name in set(given) - loaded
        if name not in own or not torch.equal(own[name], given[name].float())
    }
    missing = loaded - set(given)
    if left_over or missing:
        [example, *_] = sorted(left_over | missing)
        raise ConfigError(
            f"{adapter} does not fit its base model: {len(left_over)} of its tensors have no place "
            f"there, and {len(missing)} that it should hold are missing, such as {example}. Name "
            "the base that it was trained on, or merge it by hand and name the result."
        )
    assert isinstance(adapted, PeftModel)
    return adapted.eval()


def _named_as_in(
    given: Mapping[str, Tensor], model: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own weights that the adapter's file also holds, under the file's names."""
    weights = model.state_dict()
    for name in given:
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in weights:
            yield name, weights[plain]


@torch.no_grad()
def _probe(model: PreTrainedModel | PeftModel) -> Tensor:
    """Compute the logits of fixed random tokens: float32 [1, T, V]."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(0)
    size = (1, _NUM_PROBE_TOKENS)
    input_ids = torch.randint(vocabulary_size(plain), size, generator=generator)
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Merge the folders named on the command line; exit code 2 means a mistake of the user."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    os.environ["TQDM_DISABLE"] = "1"
    if len(sys.argv) != 4:
        logger.error("usage: python -m stages.models.merge_adapter BASE ADAPTER OUT_FOLDER")
        return 2
    base, adapter, folder = map(Path, sys.argv[1:])
    try:
        merge_adapter(base, adapter, folder)
    except PipelineError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
