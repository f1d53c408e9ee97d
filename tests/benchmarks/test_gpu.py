"""The GPU benchmark runs without a GPU, and its rivals take the same step as ours."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import SHORT, TINY, cut_step, make_model, make_pairs, ours, padded, padding_free
from stages.policy.attention import unpack_rows
from stages.train.config import TrainConfig, TrainExecution
from stages.train.microbatch import Layout
from stages.train.policy import Policy, make_policy

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = TrainConfig(dtype="float32")


class GradientsKept(torch.optim.SGD):
    """An optimizer that keeps the gradients of its last step and changes nothing."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.kept: list[Tensor] = [parameter.grad.clone() for parameter in parameters]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy(make_model(TINY, CONFIG, CPU), CONFIG, TrainExecution(), max_length=256)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_rivals_compute_the_gradient_of_ours(policy: Policy, micro_batch_size: int) -> None:
    pairs = make_pairs(SHORT, num_pairs=3, num_token_ids=TINY["vocab_size"], seed=0)
    layout = Layout(max_tokens=64, rows="packed")
    alone = deepcopy(policy.model)
    unpack_rows(alone)
    gradients = []
    for rival in ("ours", "padding-free", "padded"):
        optimizer = GradientsKept(policy.trained_parameters.values(), lr=1.0)
        if rival == "padded":
            unpack_rows(policy.model)
            padded(policy, optimizer, pairs, CONFIG, micro_batch_size=micro_batch_size)()
            policy.model.set_attn_implementation("packed")
        else:
            cut = cut_step if rival == "ours" else padding_free
            ours(policy, optimizer, cut(pairs, layout, CPU), CONFIG)()
        gradients.append(optimizer.kept)
    for found in gradients[1:]:
        for one, wanted in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_one_command_measures_and_writes_each_line(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(results)
    assert results["tiny, beside plain float32"]["gradient, relative"] < 1e-5
    output_layer = results["tiny, output layer, ours"]
    assert max(output_layer["relative errors"].values()) < 1e-5
    ratio = results["tiny short, ratio"]
    rivals = [name for name in results if ", padded " in name or ", padding-free" in name]
    fastest = max(results[name]["pairs_per_second"] for name in rivals)
    mine = results["tiny short, ours"]["pairs_per_second"]
    assert ratio["times as fast"] == pytest.approx(mine / fastest)
