"""A job as a JobSet of Kubernetes, for TPUs on GKE: one child Job a slice, one pod a host.

Names follow the JobSet API (jobset.sigs.k8s.io, v1alpha2), GKE's "Deploy TPU Multislices" and Kueue's "Run a
JobSet". GKE sets TPU_WORKER_* and, for several slices, MEGASCALE_* in the pods; llm_jax.hosts reads them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from llm_jax.errors import UserError
from llm_jax.planning.launch_job import BAD_INPUT, BUCKET, GRACE_SECONDS, TIME_IS_UP, Job, attempt

Manifest = dict[str, Any]
SPOT = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}


def emit(job: Job) -> str:
    """The YAML of a JobSet; of a sweep, a JobSet a point, so that the queue admits them one by one."""
    check(job)
    names = [(f"{job.name}-{i}", str(i)) for i in range(job.points)] or [(job.name, "")]
    manifests = [jobset(job, name, index) for name, index in names]
    return f"# {job}; written by scripts/launch.py\n" + yaml.dump_all(
        manifests, Dumper=Blocks, sort_keys=False, width=200
    )


def check(job: Job) -> None:
    if job.topology.tpu is None:
        raise UserError(f"--emit=jobset is for TPUs on GKE, not {job.topology}; --emit=slurm is for GPUs")
    if not job.image:
        raise UserError("--emit=jobset needs --image=IMAGE, with llm_jax and libtpu in its working directory")
    if not job.workdir.startswith(BUCKET):
        raise UserError(f"--workdir={job.workdir} is lost with its pod; use gs://BUCKET/...")


def jobset(job: Job, name: str, index: str = "") -> Manifest:
    """All slices start together, and again together when one fails: backoffLimit 0 hands each failure up to
    the JobSet. BlockingRecreate waits for the old pods, which may still be saving."""
    final = {"name": "noRetry", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    slices = {"name": "slice", "replicas": job.slices, "template": {"spec": child(job, index)}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata(job, name),
        "spec": {
            **({"suspend": True} if job.queue else {}),  # until Kueue admits it, with all its slices at once
            "failurePolicy": {
                "maxRestarts": job.max_retries,
                "restartStrategy": "BlockingRecreate",
                "rules": [final],
            },
            "replicatedJobs": [slices],
        },
    }


def metadata(job: Job, name: str) -> Manifest:
    """exclusive-topology: a child Job has a node pool, which is a slice, to itself."""
    queue = {"labels": {"kueue.x-k8s.io/queue-name": job.queue}} if job.queue else {}
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {"name": name, **queue, "annotations": exclusive}


def child(job: Job, index: str) -> Manifest:
    """A slice: a pod a host. An exit code that no retry would change ends the whole JobSet."""
    codes = {"containerName": "train", "operator": "In", "values": [BAD_INPUT, TIME_IS_UP]}
    return {
        "parallelism": job.topology.hosts,
        "completions": job.topology.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"spec": pod(job, index)},
    }


def pod(job: Job, index: str) -> Manifest:
    """Slices talk over the network of their hosts, not over that of the pods, which is slower."""
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.topology.tpu.gke,
        "cloud.google.com/gke-tpu-topology": job.topology.grid,
        **({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
        **({"cloud.google.com/reservation-name": job.reservation} if job.reservation else {}),
    }
    network = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if job.slices > 1 else {}
    container = {
        "name": "train",
        "image": job.image,
        "command": ["bash", "-c", literal(attempt(job, index))],
        "resources": {"limits": {"google.com/tpu": job.topology.chips_per_host}},
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        **({"tolerations": [SPOT]} if job.spot else {}),
        **network,
        "containers": [container],
    }


def literal(script: str) -> str:
    """What Kubernetes leaves as ``script``: in a command, $(NAME) is a variable and $$ a dollar."""
    return re.sub(r"\$(?=[$(])", "$$", script)


class Blocks(yaml.SafeDumper):
    """Writes a text of several lines as it would be typed, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


Blocks.add_representer(str, text)
