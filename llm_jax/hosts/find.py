"""Which processes make up this run, from flags or from what the cluster puts into the environment."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_jax.errors import UserError

PORT = 8482  # jax's own choice; 8470 to 8476 belong to the TPU's runtime
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
METADATA_SECONDS, METADATA_TRIES = 5.0, 3


@dataclass(frozen=True)
class Cluster:
    """address: HOST:PORT of process 0; count: processes of the run; index: which of them this is; found: by
    what; local_devices: the accelerators of this process where several share a machine, None = all."""

    address: str
    count: int
    index: int
    found: str
    local_devices: tuple[int, ...] | None = None


def metadata(name: str) -> str:
    """An entry of a Google Cloud machine's metadata server; "" where there is none."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    for number in range(METADATA_TRIES):
        time.sleep(number)
        try:
            with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
                return answer.read().decode()
        except (OSError, http.client.HTTPException):  # the server is sometimes busy
            continue
    return ""


def on_tpu_vm() -> bool:
    """Whether this machine has TPU chips: as accel devices, or behind vfio on newer ones."""
    return any(Path("/dev").glob("accel[0-9]*")) or (
        any(Path("/dev/vfio").glob("[0-9]*")) and not Path("/dev/nvidiactl").exists()
    )


def find(
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    environ: Mapping[str, str] = os.environ,
    ask: Callable[[str], str] = metadata,
    tpu: Callable[[], bool] = on_tpu_vm,
) -> Cluster | None:
    """The cluster this process belongs to, or None when it is alone.

    The flags (HOST:PORT of process 0, how many there are, which this is) win; then GKE's and Cloud TPU's
    TPU_WORKER_* and MEGASCALE_* variables, SLURM's of a step started by srun, and the metadata server of
    a Cloud TPU machine. Raises UserError for flags that do not fit together.
    """
    if coordinator or processes or process >= 0:
        return _from_flags(coordinator, processes, process)
    if "TPU_WORKER_HOSTNAMES" in environ and "TPU_WORKER_ID" in environ:
        workers = environ["TPU_WORKER_HOSTNAMES"].split(",")
        found = "GKE" if "KUBERNETES_SERVICE_HOST" in environ else "Cloud TPU"
        return _from_tpu(workers, int(environ["TPU_WORKER_ID"]), environ, found)
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _from_slurm(environ)
    if tpu() and (endpoints := ask("attributes/worker-network-endpoints")):
        workers = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]  # names, or A:B:ADDRESS
        slices = dict(re.findall(r"(MEGASCALE_\w+): '?([^'\n]*)", ask("attributes/tpu-env")))
        worker = int(ask("attributes/agent-worker-number"))
        return _from_tpu(workers, worker, {**slices, **environ}, "Cloud TPU")
    return None


def _from_flags(coordinator: str, processes: int, process: int) -> Cluster:
    if not re.fullmatch(r".+:\d+", coordinator) or processes < 1 or not 0 <= process < processes:
        raise UserError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: give all three, as "
            "HOST:PORT of process 0, their number, and which of them this is, from 0"
        )
    return Cluster(coordinator, processes, process, "flags")


def _from_tpu(workers: list[str], worker: int, environ: Mapping[str, str], found: str) -> Cluster | None:
    slices, own = int(environ.get("MEGASCALE_NUM_SLICES", 1)), int(environ.get("MEGASCALE_SLICE_ID", 0))
    host = environ.get("MEGASCALE_COORDINATOR_ADDRESS", workers[0]).rsplit(":", 1)[0]
    count, index = slices * len(workers), own * len(workers) + worker
    return Cluster(f"{host}:{PORT}", count, index, found) if count > 1 else None


def _from_slurm(environ: Mapping[str, str]) -> Cluster:
    # The first host of "node[007-015,020],other3": its prefix and the first number of the brackets.
    name, bracket, rest = environ["SLURM_STEP_NODELIST"].partition("[")
    host = name + re.split(r"[-,\]]", rest)[0] if bracket and "," not in name else name.split(",")[0]
    port = 2**15 + int(environ["SLURM_JOB_ID"]) % 2**14  # several jobs may share a node
    per_node = int(re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")).group())
    devices = (int(environ["SLURM_LOCALID"]),) if per_node > 1 else None  # one task: all that the node has
    count, index = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_PROCID"])
    return Cluster(f"{host}:{port}", count, index, "SLURM", devices)
