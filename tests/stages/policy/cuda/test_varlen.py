"""Attention by sequences equals attention in blocks, and the kernel gets the right sequences."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ConfigError
from stages.policy.batches import Spans, lay_out
from stages.policy.cpu.blocks import attend_in_blocks
from stages.policy.cuda import varlen
from stages.policy.cuda.varlen import attend_by_kernel, attend_by_sequence, check_alignment
from stages.policy.groups import Group
from tests.stages.policy.plain_forward import random_groups

CPU = torch.device("cpu")
WIDTH = 8


def spans_of(groups: Sequence[Group], num_common: Sequence[int] = ()) -> Spans:
    batch = lay_out(groups, device=CPU, rows="packed", num_common=num_common)
    assert batch.spans_C6 is not None
    return tuple(map(tuple, batch.spans_C6.tolist()))


def random_spans(seed: int) -> Spans:
    """Prompts with one to four completions, some of a single token; half share their beginning."""
    groups = random_groups(seed, num_groups=1 + seed % 7, longest=40)
    if seed % 2:
        return spans_of(groups)
    shortest = min(len(group.prompt_ids) for group in groups)
    for group in groups:
        group.prompt_ids[:shortest] = groups[0].prompt_ids[:shortest]
    return spans_of(groups, [shortest] * len(groups))


def random_heads(seed: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, with as many or fewer heads of keys."""
    generator = torch.Generator().manual_seed(seed)
    num_key_heads = (4, 2, 1)[seed % 3]
    query, key, value = (
        torch.randn(num_heads, num_tokens, WIDTH, generator=generator).requires_grad_()
        for num_heads in (4, num_key_heads, num_key_heads)
    )
    return query, key, value


def explicit_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    aligns_last: bool = True,
) -> Tensor:
    """What torch documents for varlen_attn, with the last query aligned with the last key, or the
    first with the first."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    repeats = query.shape[1] // key.shape[1]
    output = torch.full_like(query, torch.nan)
    lengths = []
    for (first, last), (start, end) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        lengths.append((last - first, end - start))
        for at in range(first, last):
            seen_to = end - (last - 1 - at) if aligns_last else start + 1 + at - first
            seen_from = start if window_size[0] < 0 else max(start, seen_to - 1 - window_size[0])
            for head in range(query.shape[1]):
                scores = scale * key[seen_from:seen_to, head // repeats] @ query[at, head]
                shares = scores.exp() / scores.exp().sum()
                output[at, head] = shares @ value[seen_from:seen_to, head // repeats]
    assert max_q == max(queries for queries, _ in lengths)
    assert max_k == max(keys for _, keys in lengths)
    return output


@pytest.mark.parametrize("seed", range(24))
def test_sequences_give_the_values_and_gradients_of_blocks(seed: int) -> None:
    spans = random_spans(seed)
    heads = random_heads(seed, num_tokens=spans[-1][-1])
    window = (None, None, 1, 5, 1000)[seed % 5]
    results = []
    for attend in (attend_by_sequence, attend_in_blocks):
        output_HLD = attend(*heads, spans=spans, scaling=0.3, window=window)
        gradients = torch.autograd.grad(output_HLD.sin().sum(), heads)
        results.append((output_HLD, *gradients))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_kernel_is_given_the_same_sequences(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", explicit_varlen_attn)
    spans = random_spans(seed)
    heads = [tensor.detach() for tensor in random_heads(seed, num_tokens=spans[-1][-1])]
    window = (None, 3)[seed // 2 % 2]
    wanted = attend_in_blocks(*heads, spans=spans, scaling=0.3, window=window)
    monkeypatch.setattr(varlen, "attend_one_by_one", attend_by_kernel)
    found = attend_by_sequence(*heads, spans=spans, scaling=0.3, window=window)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-6)


def test_keys_are_gathered_only_where_a_prompt_is_seen_twice() -> None:
    rng = np.random.default_rng(0)

    def random_ids(length: int) -> np.ndarray:
        return rng.integers(100, size=length, dtype=np.int32)

    one = Group(prompt_ids=random_ids(9), completions=(random_ids(4),))
    two = Group(prompt_ids=random_ids(5), completions=(random_ids(3), random_ids(6)))
    assert varlen.list_sequences(spans_of([one, one]), CPU).key_places_S is None
    sequences = varlen.list_sequences(spans_of([one, two]), CPU)
    assert sequences.key_places_S is not None
    # Nine and three read tokens; five and two; the prompt of five again, and five.
    assert sequences.key_places_S.tolist() == [*range(19), *range(12, 17), *range(19, 24)]
    assert sequences.query_starts == (0, 12, 19, 24)
    assert sequences.key_starts == (0, 12, 19, 29)


def test_another_alignment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention before 2.1 let the first query see the first key only."""
    monkeypatch.setattr(varlen, "varlen_attn", explicit_varlen_attn)
    check_alignment(CPU)

    first_aligned = partial(explicit_varlen_attn, aligns_last=False)
    monkeypatch.setattr(varlen, "varlen_attn", first_aligned)
    with pytest.raises(ConfigError, match="does not align queries with the last keys"):
        check_alignment(CPU)


def test_a_gpu_without_the_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(varlen, "varlen_attn", fail)
    assert not varlen.has_kernel.__wrapped__(CPU)
    assert "only supports Ampere" in caplog.text
