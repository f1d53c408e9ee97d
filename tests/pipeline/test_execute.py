"""A stage that keeps no row ends the run."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.execute import execute_plan
from pipeline.plan import Plan, Selection, make_plan
from pipeline.ray.session import Capacity
from pipeline.recipe import load_recipe
from schemas.errors import DataError
from tests.end_to_end.conftest import tiny_recipe

HERE = Capacity(num_cpus=2, num_gpus=0, num_cpus_per_node=2)


def plan(folder: Path, model: Path, answer: str) -> Plan:
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = [
        {
            "prompt": [message("user", f"What is {n}?")],
            "chosen": [message("assistant", answer)],
            "rejected": [message("assistant", f"Who cares about {n}?")],
        }
        for n in range(3)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(folder, model)
    recipe["stages"]["validate"] |= {"max_reject_fraction": 1.0}
    recipe["stages"]["encode"] |= {"max_reject_fraction": 1.0}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return make_plan(load_recipe(str(path)), Selection(last="score"), has_gpus=False)


@pytest.mark.parametrize(
    ("answer", "stage", "code"),
    [
        ("", "validate", "CHOSEN_EMPTY: 3"),
        ("<|im_end|>", "encode", "SPECIAL_TOKEN_IN_TEXT: 3"),
    ],
)
def test_no_stage_goes_on_with_no_rows(
    tmp_path: Path, tiny_model: Path, answer: str, stage: str, code: str
) -> None:
    planned = plan(tmp_path, tiny_model, answer)
    with pytest.raises(DataError) as caught:
        execute_plan(planned, capacity=HERE, is_local=True)
    assert f"{stage} kept none of 3 rows" in str(caught.value)
    assert code in str(caught.value)
    assert not planned.stage(stage).out.is_complete()
    assert not planned.stage("score").out.is_begun()
