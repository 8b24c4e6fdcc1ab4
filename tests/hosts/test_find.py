"""Which cluster an environment means."""

import pytest

from llm_jax.errors import UserError
from llm_jax.hosts.find import Cluster, find

WORKERS = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
SLICES = {
    **WORKERS,
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "job-0:8080",
}
CASES = {
    "a laptop": ({}, None),
    "one TPU machine": ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    "Cloud TPU": (WORKERS, Cluster("t0:8482", 4, 2, "Cloud TPU")),
    "GKE, two slices": (SLICES, Cluster("job-0:8482", 8, 6, "GKE")),
    "SLURM": (SLURM, Cluster(f"gpu007:{32768 + 70001 % 16384}", 8, 5, "SLURM", (1,))),
    "SLURM, a task a node": (
        {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"},
        Cluster(f"gpu007:{32768 + 70001 % 16384}", 2, 1, "SLURM"),
    ),
    "a SLURM batch script": ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
}


def nothing(name):
    raise AssertionError(f"no metadata server here was to be asked for {name}")


@pytest.mark.parametrize("case", CASES)
def test_environments(case):
    environ, cluster = CASES[case]
    assert find(environ=environ, ask=nothing, tpu=lambda: False) == cluster


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a1", "a1"), ("a1,b2", "a1"), ("a[001-004,009],b2", "a001"), ("a[3,5]", "a3"), ("a1,b[2-3]", "a1")],
)
def test_the_first_host_of_slurm(nodes, host):
    assert find(environ={**SLURM, "SLURM_STEP_NODELIST": nodes}).address.split(":")[0] == host


def test_a_tpu_machine_asks_its_metadata_server():
    answers = {"attributes/worker-network-endpoints": "a:b:10.0.0.7,a:b:10.0.0.8"}
    answers |= {"attributes/agent-worker-number": "1", "attributes/tpu-env": "ZONE: 'x'\n"}
    found = find(environ={}, ask=answers.__getitem__, tpu=lambda: True)
    assert found == Cluster("10.0.0.7:8482", 2, 1, "Cloud TPU")
    answers["attributes/worker-network-endpoints"] = "host-a,host-b"
    slices = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: 'lead:80'\n"
    answers["attributes/tpu-env"] = slices
    found = find(environ={}, ask=answers.__getitem__, tpu=lambda: True)
    assert found == Cluster("lead:8482", 4, 3, "Cloud TPU")
    assert find(environ={}, ask=lambda name: "", tpu=lambda: True) is None


def test_flags_win():
    assert find("h:1", 2, 1, environ=SLURM) == Cluster("h:1", 2, 1, "flags")


@pytest.mark.parametrize("flags", [("", 2, 0), ("h:1", 0, 0), ("h:1", 2, 2), ("h", 2, 0), ("h:1", 2, -1)])
def test_flags_that_do_not_fit(flags):
    with pytest.raises(UserError, match="give all three"):
        find(*flags, environ={})
