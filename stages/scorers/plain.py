"""Log-probabilities from plain transformers: what the values of every scorer are compared with.

Each sequence is computed alone, in float32, by the model as AutoModelForCausalLM loads it. Nothing
of stages/policy is imported, so no fault of the code that scores and trains can be here as well: no
loader, no config change, no layout of rows, no attention of our own.
"""

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from stages.scorers.devices import choose_device, count_free_bytes, count_weights

logger = logging.getLogger(__name__)

BYTES_PER_WEIGHT = 4
MAX_TOKENS = 4096
"""Tokens of the longest sequence: the model computes logits for each of them."""
SOFT_CAP_KEY = "attn_logit_softcapping"
"""Config key of a soft cap on attention scores."""
OPERATIONS_PER_MINUTE = {"cpu": 1e13, "cuda": 1e15}
"""Floating-point operations that two cores, or a GPU, do in float32 in less than a minute."""


@dataclass(frozen=True, kw_only=True)
class PlainSequence:
    """A prompt with one completion, as token ids."""

    prompt_ids: NDArray[np.int32]
    completion_ids: NDArray[np.int32]


@dataclass(kw_only=True)
class PlainModel:
    """A model as transformers ships it, on the device that has room for it in float32."""

    path: str
    """A Hugging Face folder with safetensors; code in it is not run."""
    num_threads: int
    """Number of compute threads on a CPU."""
    _model: PreTrainedModel | None = None

    def count_affordable_tokens(self) -> int:
        """Count the tokens that can be computed within a minute.

        A forward pass multiplies and adds once per weight and token (Kaplan et al. 2020,
        arXiv:2001.08361, section 2.1). 0 means that this machine has no room for the weights.
        """
        num_weights = count_weights(self.path)
        num_bytes = num_weights * BYTES_PER_WEIGHT
        device = choose_device(num_bytes)
        num_free_bytes = count_free_bytes()
        if device.type == "cpu" and num_free_bytes is not None and num_bytes > num_free_bytes:
            logger.warning(
                "scores are not compared with plain transformers: a float32 model of %.0f GB does "
                "not fit into the %.0f GB of free memory",
                num_bytes / 1e9,
                num_free_bytes / 1e9,
            )
            return 0
        return int(OPERATIONS_PER_MINUTE[device.type] / (2 * num_weights))

    def compute(self, sequences: Mapping[str, PlainSequence]) -> dict[str, NDArray[np.float32]]:
        """Compute log p(completion token | prompt and the completion tokens before it).

        Returns:
            By the names of the sequences: float32, nats, one value a completion token.
        """
        torch.set_num_threads(self.num_threads)
        if self._model is None:
            device = choose_device(count_weights(self.path) * BYTES_PER_WEIGHT)
            self._model = load_plain_model(self.path, device=device)
        return {name: compute_sequence(self._model, one) for name, one in sequences.items()}

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_plain_model(path: str, *, device: torch.device) -> PreTrainedModel:
    """Load a Hugging Face folder with safetensors as any user would; code in it is not run."""
    # Other code in this process may have chosen TF32, which torch allows for convolutions anyway.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    disable_progress_bar()  # It would interrupt the run's own progress lines.
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    has_soft_cap = config.get_text_config().to_dict().get(SOFT_CAP_KEY)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        # transformers' default, SDPA, silently leaves out soft caps.
        attn_implementation="eager" if has_soft_cap else None,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    return model.eval().to(device)


@torch.no_grad()
def compute_sequence(model: PreTrainedModel, sequence: PlainSequence) -> NDArray[np.float32]:
    """Compute log p(completion token | prompt and the completion tokens before it).

    Returns:
        float32, nats, one value a completion token.
    """
    # One token makes dynamic rope forget the lengths of earlier sequences.
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    token_ids = np.concatenate([sequence.prompt_ids, sequence.completion_ids])
    input_ids = torch.from_numpy(token_ids.astype(np.int64)).to(model.device)
    first = len(sequence.prompt_ids)
    logits_TV = model(input_ids=input_ids[None]).logits[0, first - 1 : -1]
    logps_T1 = logits_TV.float().log_softmax(-1).gather(1, input_ids[first:, None])
    logps: NDArray[np.float32] = logps_T1[:, 0].cpu().numpy()
    return logps
