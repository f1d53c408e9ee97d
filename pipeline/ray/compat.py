"""Private details of Ray 2.60 that the session relies on; test_compat.py checks each of them."""

import json
import os

JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray's job manager passes the job's runtime environment to the entry point. Ray
has no public way to read it before `ray.init`, where it decides what that call may ask for: a field
that both name is an error (`ray._private.worker.init`, `_merge_runtime_env`)."""


def submitter_sent_checkout() -> bool:
    """Return whether `ray job submit --working-dir` started this process: workers then have it."""
    job = json.loads(os.environ.get(JOB_CONFIG_VARIABLE, "{}"))
    return bool(job.get("runtime_env", {}).get("working_dir"))
