"""What is different for a driver in a cluster that KubeRay has made for its run.

KubeRay starts a job that failed again, on a new cluster, whatever its exit code; one that was stopped it leaves alone.
It counts by itself, so what our table of exit codes has decided must look like a stop to it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping

from orchestrator.cluster.ray.api import Dashboard, Token

VARIABLE = "ORCHESTRATOR_KUBERAY"
"""Set in the head of such a cluster."""
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In which Ray tells a driver of its job."""
TOKEN = "RAY_AUTH_TOKEN"
STOPPING_S = 20.0
"""In which Ray should have ended a driver that has asked for it."""


def starts_again(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a job that fails here is started again by somebody who does not know why it failed."""
    return VARIABLE in env


def stop_own_job(address: str, env: Mapping[str, str] = os.environ) -> None:
    """Let Ray stop the job of this process, and wait for the signal. `address`: the dashboard's, HOST:PORT."""
    submission_id = json.loads(env[JOB])["metadata"]["job_submission_id"]
    token = Token(env[TOKEN], TOKEN) if env.get(TOKEN) else None
    Dashboard(f"http://{address}", token).stop(submission_id)
    time.sleep(STOPPING_S)
