"""Tests of the private details of Ray that pipeline/ray/compat.py relies on."""

import inspect
import json

import pytest

from pipeline.ray import compat


def test_ray_still_passes_a_jobs_config_in_this_variable() -> None:
    from ray._private import worker
    from ray._private.runtime_env import constants

    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == compat.JOB_CONFIG_VARIABLE
    assert compat.JOB_CONFIG_VARIABLE in inspect.getsource(worker.init)


def test_ray_still_writes_the_working_dir_under_this_key() -> None:
    from ray.job_config import JobConfig

    config = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}}
    assert JobConfig.from_json(json.loads(json.dumps(config))).runtime_env == config["runtime_env"]


def test_ray_refuses_a_driver_that_names_what_its_job_names() -> None:
    """Without that, a driver could always send the checkout."""
    from ray.runtime_env import RuntimeEnv
    from ray.runtime_env.runtime_env import _merge_runtime_env

    job = RuntimeEnv(working_dir="gcs://_ray_pkg_0.zip", py_modules=["gcs://_ray_pkg_1.zip"])
    driver = RuntimeEnv(py_modules=["gcs://_ray_pkg_2.zip"])
    assert _merge_runtime_env(job, driver) is None


def test_a_checkout_that_the_jobs_submitter_sent_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not compat.submitter_sent_checkout()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {}}}')
    assert not compat.submitter_sent_checkout()
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}}'
    )
    assert compat.submitter_sent_checkout()
