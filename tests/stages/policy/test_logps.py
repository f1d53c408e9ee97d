"""Log-probabilities, losses and gradients equal those of a plain forward pass."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from stages.policy import attention
from stages.policy.batches import Batch, RowLayout, lay_out, plan_microbatches
from stages.policy.cpu import blocks
from stages.policy.cpu.layers import replace_layers
from stages.policy.cuda.varlen import attend_by_sequence
from stages.policy.decoder_layers import checkpoint_layers
from stages.policy.groups import Group, IntArray
from stages.policy.logps import (
    completion_token_logps,
    completion_tokens,
)
from tests.stages.policy.plain_forward import (
    curved_loss,
    gradients,
    largest_gradient_error,
    plain_token_logps,
    random_groups,
)
from tests.tiny_models import CONFIGS, HIDDEN_SIZE, VOCAB_SIZE

OpenTinyModel = Callable[[str], PreTrainedModel]

CPU = torch.device("cpu")
PACKING = sorted(CONFIGS.keys() - {"gemma2", "mamba"})
"""All but gemma2, whose soft cap packed attention lacks, and mamba, which has no attention."""
SHARING = sorted(CONFIGS.keys() - {"gemma2", "gemma3", "mistral", "mamba"})


@pytest.fixture(params=["blocks", "sequences"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in blocks, as on a CPU, and by sequences, as on a GPU without its kernel."""
    if request.param == "sequences":
        monkeypatch.setattr(attention, "attend_in_blocks", attend_by_sequence)


def compare_with_plain_forward(
    model: PreTrainedModel,
    groups: Sequence[Group],
    *,
    rows: RowLayout = "packed",
    max_tokens: int = 10**9,
    max_logits: int = 2**25,
) -> None:
    """Assert equal token log-probs, losses and gradients over all micro-batches."""
    lengths = np.array([group.num_read for group in groups])
    microbatches = [
        [groups[number] for number in numbers]
        for numbers in plan_microbatches(lengths, max_tokens=max_tokens, is_packed=rows == "packed")
    ]
    compare_batches(
        model,
        [(one, lay_out(one, device=CPU, rows=rows)) for one in microbatches],
        max_logits=max_logits,
    )


def compare_batches(
    model: PreTrainedModel,
    microbatches: Sequence[tuple[Sequence[Group], Batch]],
    *,
    max_logits: int = 2**25,
) -> None:
    found_loss = wanted_loss = 0.0
    for microbatch, batch in microbatches:
        found_N = completion_token_logps(model, batch, max_logits=max_logits)
        wanted = plain_token_logps(model, microbatch)
        torch.testing.assert_close(found_N, torch.cat(wanted), rtol=0, atol=5e-6)
        completions = found_N.split(batch.completion_lengths_C.tolist())
        loss = curved_loss(torch.stack([logps.sum() for logps in completions]))
        loss.backward()
        found_loss += loss.item()
    found_gradients = gradients(model)
    for microbatch, _ in microbatches:
        loss = curved_loss(
            torch.stack([logps.sum() for logps in plain_token_logps(model, microbatch)])
        )
        loss.backward()
        wanted_loss += loss.item()
    assert found_loss == pytest.approx(wanted_loss, rel=1e-6)
    assert largest_gradient_error(found_gradients, gradients(model)) < 1e-5


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("architecture", PACKING)
def test_shared_prompt_tokens_can_be_in_a_row_once(
    tiny_model: OpenTinyModel, architecture: str
) -> None:
    """The second group holds the shared tokens. They are the whole prompt of the third group, whose
    completion of one token is predicted by another group's tokens; the last group shares fewer."""
    model = tiny_model(architecture)
    rng = np.random.default_rng(3)

    def random_ids(length: int) -> IntArray:
        return rng.integers(VOCAB_SIZE, size=length, dtype=np.int32)

    begin = random_ids(9)
    prompts = [
        np.concatenate([begin, random_ids(4)]),
        np.concatenate([begin, random_ids(30)]),
        begin,
        np.concatenate([begin[:5], random_ids(6)]),
    ]
    lengths = [(6, 3), (2, 40), (1, 7), (5, 1)]
    groups = [
        Group(prompt_ids=prompt_ids, completions=tuple(map(random_ids, both)))
        for prompt_ids, both in zip(prompts, lengths, strict=True)
    ]
    for num_common in ([8, 9, 9, 5], [0, 9, 9, 4]):
        batch = lay_out(groups, device=CPU, rows="packed", num_common=num_common)
        left_out = sum(num_common) - max(num_common)
        assert batch.input_ids_RL.numel() == sum(g.num_read for g in groups) - left_out
        compare_batches(model, [(groups, batch)])


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("architecture", PACKING)
def test_packed_rows_equal_plain_forward(tiny_model: OpenTinyModel, architecture: str) -> None:
    compare_with_plain_forward(tiny_model(architecture), random_groups(0, num_groups=6))


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("seed", range(20, 30))
def test_packed_rows_of_any_shape_equal_plain_forward(
    tiny_model: OpenTinyModel, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Blocks of one query, several, and more than exist; gemma3 has a window in half its layers."""
    monkeypatch.setattr(blocks, "BLOCK_QUERIES", [1, 7, 16, 96][seed % 4])
    architecture = ["llama", "qwen3", "gemma3"][seed % 3]
    groups = random_groups(seed, num_groups=8, longest=60)
    compare_with_plain_forward(tiny_model(architecture), groups, max_tokens=300)


@pytest.mark.parametrize("architecture", SHARING)
def test_shared_rows_equal_plain_forward(tiny_model: OpenTinyModel, architecture: str) -> None:
    groups = random_groups(0, num_groups=6)
    compare_with_plain_forward(tiny_model(architecture), groups, rows="shared")


@pytest.mark.parametrize(
    "architecture", ["llama", "llama-untied", "gemma", "gemma3", "gpt2", "mixtral", "qwen2"]
)
def test_replaced_layers_equal_plain_ones(tiny_model: OpenTinyModel, architecture: str) -> None:
    """Gradients of several micro-batches add up in place, also for tied weights and biases."""
    model = deepcopy(tiny_model(architecture))
    groups = random_groups(13, num_groups=6)
    batches = [lay_out(groups[start::2], device=CPU, rows="packed") for start in (0, 1)]
    for batch in batches:
        completion_token_logps(model, batch).square().sum().backward()
    wanted = gradients(model)
    replace_layers(model)
    for batch in batches:
        completion_token_logps(model, batch).square().sum().backward()
    assert largest_gradient_error(gradients(model), wanted) < 1e-6
    with torch.no_grad():
        plain_N, replaced_N = (
            completion_token_logps(one, batches[0]) for one in (tiny_model(architecture), model)
        )
    torch.testing.assert_close(replaced_N, plain_N, rtol=0, atol=2e-6)


def test_the_padding_token_gets_no_gradient(tiny_model: OpenTinyModel) -> None:
    """As in nn.Embedding. The untied output layer has a separate row for it, with a gradient."""
    model = deepcopy(tiny_model("llama-untied"))
    replace_layers(model)
    pad_token_id = model.config.pad_token_id
    ids = np.array([5, pad_token_id, 7], np.int32)
    batch = lay_out([Group(prompt_ids=ids, completions=(ids,))], device=CPU, rows="packed")
    completion_token_logps(model, batch).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[pad_token_id].count_nonzero() == 0
    assert gradient[5].count_nonzero() > 0


def test_neighbours_change_only_rounding(tiny_model: OpenTinyModel) -> None:
    model = tiny_model("llama")
    groups = random_groups(14, num_groups=9)
    with torch.no_grad():
        together_N = completion_token_logps(model, lay_out(groups, device=CPU, rows="packed"))
        alone = [
            completion_token_logps(model, lay_out([group], device=CPU, rows="packed"))
            for group in groups
        ]
    torch.testing.assert_close(together_N, torch.cat(alone), rtol=0, atol=2e-6)


def test_the_same_batch_gives_the_same_bits(tiny_model: OpenTinyModel) -> None:
    model = deepcopy(tiny_model("llama"))
    replace_layers(model)
    batch = lay_out(random_groups(15, num_groups=9), device=CPU, rows="packed")
    found = []
    for _ in range(2):
        completion_token_logps(model, batch).sum().backward()
        found.append(gradients(model))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_separate_rows_equal_plain_forward(tiny_model: OpenTinyModel, architecture: str) -> None:
    compare_with_plain_forward(
        tiny_model(architecture), random_groups(1, num_groups=4), rows="separate"
    )


@pytest.mark.parametrize("max_tokens", [1, 60, 200])
@pytest.mark.parametrize("seed", range(2, 6))
def test_microbatch_size_changes_nothing(
    tiny_model: OpenTinyModel, seed: int, max_tokens: int
) -> None:
    groups = random_groups(seed, num_groups=7)
    compare_with_plain_forward(tiny_model("llama"), groups, max_tokens=max_tokens)


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "granite", "gpt2"])
@pytest.mark.parametrize("max_logits", [1, 3 * VOCAB_SIZE, 17 * VOCAB_SIZE + 5])
def test_chunks_change_nothing(
    tiny_model: OpenTinyModel, architecture: str, max_logits: int
) -> None:
    compare_with_plain_forward(
        tiny_model(architecture), random_groups(7, num_groups=3), max_logits=max_logits
    )


@pytest.mark.parametrize("max_logits", [2**25, 7 * VOCAB_SIZE])
def test_log_collision_is_that_of_the_whole_distribution(
    tiny_model: OpenTinyModel, max_logits: int
) -> None:
    """Log of the sum of p squared; gradients of the log-probs are the same as without it."""
    model = tiny_model("granite")
    groups = random_groups(12, num_groups=3)
    batch = lay_out(groups, device=CPU)
    tokens = completion_tokens(model, batch, max_logits=max_logits, with_log_collision=True)
    wanted = []
    for group in groups:
        for completion_ids in group.completions:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion_ids])).long()
            probabilities = model(input_ids=ids[None]).logits[0].double().softmax(-1)
            places = range(len(group.prompt_ids) - 1, len(ids) - 1)
            wanted += [probabilities[place].square().sum().log() for place in places]
    assert tokens.log_collision_N is not None
    assert not tokens.log_collision_N.requires_grad
    torch.testing.assert_close(
        tokens.log_collision_N.double(), torch.stack(wanted).detach(), rtol=0, atol=2e-6
    )
    tokens.logps_N.sum().backward()
    found_gradients = gradients(model)
    completion_token_logps(model, batch).sum().backward()
    assert largest_gradient_error(found_gradients, gradients(model)) < 1e-6


class LogitsWatch(TorchDispatchMode):
    """Record the most positions with logits in one tensor made by an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.most_positions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and VOCAB_SIZE in tensor.shape:
                positions = tensor.numel() // VOCAB_SIZE
                if positions != HIDDEN_SIZE:
                    self.most_positions = max(self.most_positions, positions)
        return result


@pytest.mark.parametrize("architecture", ["llama-untied", "granite"])
def test_no_tensor_holds_more_logits_than_allowed(
    tiny_model: OpenTinyModel, architecture: str
) -> None:
    """Forward and backward; only weights are as wide as the vocabulary besides logits."""
    model = tiny_model(architecture)
    batch = lay_out(random_groups(8, num_groups=6), device=CPU)
    assert len(batch.target_ids_N) > HIDDEN_SIZE
    for num_positions in (5, 11):
        with LogitsWatch() as watch:
            max_logits = num_positions * VOCAB_SIZE + 1
            completion_token_logps(model, batch, max_logits=max_logits).sum().backward()
        assert watch.most_positions == num_positions


def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_model: OpenTinyModel,
) -> None:
    model = deepcopy(tiny_model("llama"))
    batch = lay_out(random_groups(10, num_groups=3), device=CPU)
    completion_token_logps(model, batch).sum().backward()
    wanted = gradients(model)
    checkpoint_layers(model)
    completion_token_logps(model, batch).sum().backward()
    assert largest_gradient_error(gradients(model), wanted) < 1e-6


def test_bfloat16_weights_give_float32_logps_near_the_exact_ones(
    tiny_model: OpenTinyModel,
) -> None:
    """bfloat16 keeps 8 bits, so logits of about 1 have errors of a few hundredths."""
    model = tiny_model("llama")
    batch = lay_out(random_groups(11, num_groups=3), device=CPU)
    with torch.no_grad():
        exact_N = completion_token_logps(model, batch)
        rounded_N = completion_token_logps(model.bfloat16(), batch)
        model.float()
    assert rounded_N.dtype == torch.float32
    assert 0 < (rounded_N - exact_N).abs().max() < 0.1
