"""Workers of a sharded training read their own rows of the start, and no worker holds all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.policy.skeleton import open_skeleton
from tests.tiny_architectures import make_tiny_architecture

ROOT = Path(__file__).parents[3]
NUM_WORKERS = 4
CONSTANT_BYTES = 48 << 20
"""For process groups, messages and the allocator."""

WORKER = r"""
import json, os, re, sys
import torch
import torch.distributed as dist
from stages.models.resolve import pin_model
from stages.train.config import TrainConfig, TrainExecution
from stages.train.sharding import open_sharded
from stages.train.world import World

def peak():
    "Peak of this program; ru_maxrss also counts what its parent held when it forked."
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

start, meeting, rank, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
world = World(rank=rank, size=size, device=torch.device("cpu"))
config, execution = TrainConfig(dtype="float32"), TrainExecution(parallelism="fsdp2")
pin = pin_model(start)
world.gather(None)
before = peak()
policy = open_sharded(config, execution, pin, world=world, max_length=40)
after = peak()
sums = {
    name: one.full_tensor().double().sum().item()
    for name, one in policy.trained_parameters.items()
}
print(json.dumps({"bytes": after - before, "sums": sums, "rows": policy.rows}))
sys.stdout.flush()
world.gather(None)
os._exit(0)
"""


@pytest.mark.slow
def test_a_worker_holds_its_rows_and_the_first_one_the_first_layers(tmp_path: Path) -> None:
    """The model takes 335 MB in float32, and the rows of each worker 84 MB.

    The first worker also tries row layouts on the embeddings and two layers, which are 168 MB.
    """
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=65_536,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "start", max_shard_size="60MB")
    num_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    num_first = 4 * sum(
        weight.numel()
        for part in (model.model.embed_tokens, *model.model.layers[:2])
        for weight in part.parameters()
    )
    command = [sys.executable, "-c", WORKER, str(tmp_path / "start"), str(tmp_path / "meeting")]
    workers = [
        subprocess.Popen([*command, str(rank), str(NUM_WORKERS)], cwd=ROOT, stdout=subprocess.PIPE)
        for rank in range(NUM_WORKERS)
    ]
    found = [json.loads(worker.communicate(timeout=400)[0]) for worker in workers]
    share = num_bytes / NUM_WORKERS
    for one in found[1:]:
        assert 0.9 * share < one["bytes"] < share + CONSTANT_BYTES
    assert found[0]["bytes"] < share + num_first + CONSTANT_BYTES < num_bytes
    assert found[0]["rows"] == "packed"
    for name, weight in model.named_parameters():
        assert found[1]["sums"][name] == pytest.approx(weight.double().sum().item(), rel=1e-12)


def test_a_skeleton_has_no_weights_and_reads_rows_of_any_shard(tmp_path: Path) -> None:
    """Its buffers are those of a loaded model."""
    folder = make_tiny_architecture(tmp_path / "whole", "llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    for path in (folder, tmp_path / "cut"):
        skeleton = open_skeleton(str(path))
        assert skeleton is not None
        assert all(one.is_meta for one in skeleton.model.parameters())
        buffers = dict(plain.named_buffers())
        assert buffers
        for name, buffer in skeleton.model.named_buffers():
            assert buffer.equal(buffers[name])
        for name, weight in plain.named_parameters():
            assert skeleton.read(name, range(1, 3)).equal(weight[1:3])
        first_layers = skeleton.first_layers()
        assert first_layers is not None
        assert first_layers.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("architecture", "change", "reason"),
    [
        ("mixtral", None, "experts.down_proj is stored by another name"),
        ("gpt2", "prefix", "is stored by another name"),
        ("llama", "shape", "embed_tokens.weight is stored in another shape"),
    ],
)
def test_what_cannot_be_read_by_rows_is_left_to_transformers(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    architecture: str,
    change: str | None,
    reason: str,
) -> None:
    """transformers joins experts; GPT-2's files on the hub lack the prefix of its parameters."""
    caplog.set_level("INFO")
    folder = make_tiny_architecture(tmp_path / "start", architecture)
    weights = load_file(folder / "model.safetensors")
    if change == "prefix":
        weights = {name.removeprefix("transformer."): one for name, one in weights.items()}
    elif change == "shape":
        weights["model.embed_tokens.weight"] = torch.zeros(5, 7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_skeleton(str(folder)) is None
    assert "every worker opens the whole model: " in caplog.text
    assert reason in caplog.text
