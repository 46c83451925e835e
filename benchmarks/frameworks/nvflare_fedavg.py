"""NVIDIA FLARE: its proof of concept, with mutual TLS; in plain text its simulator. Its Python runs this.

The job starts from a placeholder, and the sites bring the tensors: FLARE would write an initial model into the job's
JSON.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

from measuring import Memory, Settings, kill, seconds_of_rounds, started_with, tree_of, wait_until_finished
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.recipe.poc_env import PocEnv
from nvflare.recipe.sim_env import SimEnv

HERE = Path(__file__).parent


def job_of(settings: Settings) -> FedJob:
    """Federated averaging; one round more, since the placeholder is no model."""
    job = FedJob("exchange", min_clients=settings.sites)
    job.to_server(
        FedAvg(
            num_clients=settings.sites, num_rounds=settings.receipts + 1, model={"placeholder": [0.0]},
            save_filename=None,
        )
    )  # fmt: skip
    runner = ScriptRunner(
        script=str(HERE / "nvflare_site.py"), framework=FrameworkType.NUMPY, server_expected_format=ExchangeFormat.NUMPY
    )
    job.to_clients(runner)
    return job


def main() -> None:
    """Run the job, and print what was measured as JSON."""
    settings = Settings.read()
    os.environ["PYTHONPATH"] = str(HERE)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = job_of(settings)
    simulated = settings.certificates is None
    poc = Path(settings.folder) / "poc"
    server = str(poc / "example_project" / "prod_00" / "server")
    # the simulator's sites cannot be told from its server
    memory = Memory(lambda: tree_of(os.getpid()) if simulated else started_with(server))
    memory.start()
    with redirect_stdout(sys.stderr):
        if simulated:
            SimEnv(num_clients=settings.sites, workspace_root=settings.folder).deploy(job)
        else:
            os.environ["NVFLARE_POC_WORKSPACE"] = str(poc)
            deployed = PocEnv(num_clients=settings.sites)
            try:
                deployed.deploy(job)
                wait_until_finished(settings, lambda: True)
            finally:
                deployed.stop()
                kill(started_with(str(poc)))
    found = memory.stop()
    mode = "simulator (memory of server and sites)" if simulated else "proof of concept"
    framework = f"NVIDIA FLARE {version('nvflare')}, {mode}"
    print(json.dumps({"framework": framework, "seconds": seconds_of_rounds(settings), **found}))


if __name__ == "__main__":
    main()
