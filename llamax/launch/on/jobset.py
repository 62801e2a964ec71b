"""Kubernetes JobSet (jobset.x-k8s.io/v1alpha2): one JobSet a worker, a pod a host, on TPU slices or GPU nodes.

One JobSet a worker and not one for all: what restarts a worker whose node was taken restarts that JobSet's pods, and
the other workers go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import Field, NonNegativeInt, model_validator

from llamax.accounting.topology import Topology, find_topology
from llamax.config.base import Frozen
from llamax.errors import UserError
from llamax.launch.clients import call, need
from llamax.launch.protocol import Env, Job, Shape
from llamax.launch.protocol import Settings as Common
from llamax.sweep.crew import AGAIN, ASKED

PORT = 8476  # of process 0, where the others meet
LONGEST = 40  # of a JobSet's name: pods add "-workers-0-<host>-<5 letters>" and labels end at 63
GRACE_SECONDS = 120  # to save in; spot nodes give less
DAYS_KEPT = 7
LABELS = {  # what GKE calls the nodes of a kind
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
}
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]


class Claim(Frozen):
    """A persistent volume claim that many nodes may write (Filestore, NFS), mounted at `path` in every pod."""

    name: Name
    path: Annotated[str, Field(pattern=r"^/[^\n]+$")]


class Settings(Common):
    """Where and as what one worker runs.

    `image` has llamax in it (tools/Dockerfile). `topology` is one TPU slice (v5e:4x4) or a number of GPUs a node and of
    nodes (h100:8x2) as llamax/accounting/topology.py names them; `node_label` is GKE's word for such nodes, where it is
    not that of LABELS (nvidia-h100-mega-80gb). `queue` is a Kueue LocalQueue of the namespace (None: not queued).
    `spot` asks for spot nodes and tolerates their taint. `restarts` bounds restarts after crashes; those after a lost
    or reclaimed node are not counted. `claim` mounts the storage that holds the study, if that is no bucket;
    `service_account` gives a pod its right to a bucket. `context` is kubectl's (None: the current one).
    """

    image: Annotated[str, Field(pattern=r"^[^\s]+$")]
    topology: str
    node_label: Name | None = None
    namespace: Name = "default"
    context: str | None = None
    queue: Name | None = None
    spot: bool = False
    restarts: NonNegativeInt = 6
    claim: Claim | None = None
    service_account: Name | None = None
    env: Env = Field(default_factory=dict)
    python: str = "python"

    @model_validator(mode="after")
    def _exists(self) -> Settings:
        try:
            kind = find_topology(self.topology).name.partition(":")[0]
        except UserError as error:
            raise ValueError(str(error)) from None
        if kind not in LABELS:
            raise ValueError(f"topology {self.topology!r}: GKE has no such nodes; choose one of {', '.join(LABELS)}")
        return self


def shape(settings: Settings) -> Shape:
    """A process a host; all of the slice's chips or the nodes' GPUs."""
    found = find_topology(settings.topology)
    return Shape(found.hosts, found.devices, found.chips, found.name.partition(":")[0])


def script(study: str, settings: Settings, launch: int) -> str:
    """The manifests, as one YAML stream."""
    mounted = settings.claim is not None and PurePosixPath(study).is_relative_to(settings.claim.path)
    if "://" not in study and not mounted:
        raise UserError(
            f"pods cannot see the study {study}; put it in a bucket (--dir gs://BUCKET/runs/NAME), or under a volume "
            "that is mounted at the same path here and there (--set 'claim={name: CLAIM, path: /runs}')"
        )
    found = [manifest(study, settings, name) for name in _names(study, settings, launch)]
    return yaml.safe_dump_all(found, sort_keys=False, width=100)


def check(settings: Settings) -> None:
    """kubectl is here and may create JobSets in the namespace."""
    need("kubectl", "install it (`gcloud components install kubectl`), or print the manifests with --dry-run")
    question = ["auth", "can-i", "create", "jobsets.jobset.x-k8s.io"]
    try:
        answer = call([*_kubectl(settings), *question])
    except UserError as error:
        raise UserError(
            f"no right to create JobSets in namespace {settings.namespace}: {error}; get credentials "
            "(`gcloud container clusters get-credentials CLUSTER`), and see that JobSet is installed"
        ) from None
    if answer.strip() != "yes":
        raise UserError(f"kubectl {' '.join(question)} in namespace {settings.namespace}: {answer.strip()}")


def submit(study: str, settings: Settings, launch: int) -> list[str]:
    """`kubectl create`, which unlike apply refuses a name that someone else's JobSet has; all workers or none."""
    names = _names(study, settings, launch)
    try:
        call([*_kubectl(settings), "create", "-f", "-"], text=script(study, settings, launch))
    except UserError as error:
        taken = "AlreadyExists" in str(error)
        if not taken:
            cancel(settings, names)
        raise UserError(f"{error}{'; rename the study, or delete those JobSets' if taken else ''}") from None
    return names


def jobs(settings: Settings, ids: Sequence[str]) -> list[Job]:
    """A row a JobSet; one that is gone was deleted, or cleaned up days after its end."""
    answer = call([*_kubectl(settings), "get", "jobset", "--ignore-not-found", "-o", "json", *ids])
    data = json.loads(answer) if answer.strip() else {"items": []}
    found = {item["metadata"]["name"]: item for item in data.get("items", [data] if "metadata" in data else [])}
    return [_job(id, found[id]) if id in found else Job(id, "Deleted", False) for id in ids]


def cancel(settings: Settings, ids: Sequence[str]) -> None:
    """`kubectl delete`: pods get SIGTERM, save, and give their leases back."""
    call([*_kubectl(settings), "delete", "jobset", "--ignore-not-found", "--wait=false", *ids])


def manifest(study: str, settings: Settings, name: str) -> dict[str, Any]:
    """One worker."""
    found = find_topology(settings.topology)
    queue = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    # A TPU node pool is one slice, which one worker has to itself; GPU nodes of several workers may share a pool.
    pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": settings.namespace,
            "labels": {"app.kubernetes.io/name": "llamax", **queue},
            "annotations": {"llamax/study": study, **(pool if found.kind.platform == "tpu" else {})},
        },
        "spec": {
            "ttlSecondsAfterFinished": DAYS_KEPT * 86400,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": settings.restarts, "rules": _RESTARTS},
            "replicatedJobs": [
                {"name": "workers", "replicas": 1, "template": {"spec": _job_spec(study, settings, name, found)}}
            ],
        },
    }


# A worker needs all of its processes, so one pod lost is its job failed, and started again whole. A pod whose node is
# taken (DisruptionTarget), or whose worker says that it is to be started again (llamax/sweep/crew.py), fails it for a
# reason of its own: PodFailurePolicy. Those restarts are not counted; all others, of crashes, are.
_RESTARTS = [
    {
        "name": "disrupted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
]
_DISRUPTIONS = [
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [AGAIN, ASKED]}},
]


def _job_spec(study: str, settings: Settings, name: str, topology: Topology) -> dict[str, Any]:
    """A pod a host."""
    return {
        "parallelism": topology.hosts,
        "completions": topology.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _DISRUPTIONS},
        "template": {"spec": _pod(study, settings, name, topology)},
    }


def _pod(study: str, settings: Settings, name: str, topology: Topology) -> dict[str, Any]:
    resource, labels = _nodes(settings, topology)
    spot = {"cloud.google.com/gke-spot": "true"} if settings.spot else {}
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    tolerations += [{"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"} for key in spot]
    volumes: list[dict[str, Any]] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}]  # NCCL needs more than the 64 MiB of a container
    if settings.claim is not None:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": settings.claim.name}})
        mounts.append({"name": "storage", "mountPath": settings.claim.path})
    account = {"serviceAccountName": settings.service_account} if settings.service_account else {}
    devices = {resource: topology.chips // topology.hosts}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        **account,
        "nodeSelector": {**labels, **spot},
        "tolerations": tolerations,
        "containers": [
            {
                "name": "worker",
                "image": settings.image,
                "command": [settings.python, "-m", "llamax.sweep.worker", study],
                "env": _env(settings, name, topology.hosts),
                "ports": [{"containerPort": PORT}],
                "resources": {"requests": dict(devices), "limits": dict(devices)},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _nodes(settings: Settings, topology: Topology) -> tuple[str, dict[str, str]]:
    """(what Kubernetes counts devices as, labels of the nodes)."""
    kind, _, shape = topology.name.partition(":")
    label = settings.node_label or LABELS[kind]
    if topology.kind.platform == "tpu":
        wanted = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": shape}
        return "google.com/tpu", wanted
    return "nvidia.com/gpu", {"cloud.google.com/gke-accelerator": label}


def _env(settings: Settings, name: str, hosts: int) -> list[dict[str, Any]]:
    """How the processes of a worker find each other (llamax/mesh/processes.py): process 0 is the first pod by name.

    Which process a pod is, Kubernetes says itself (JOB_COMPLETION_INDEX).
    """
    together: list[dict[str, Any]] = [
        {"name": "LLAMAX_COORDINATOR", "value": f"{name}-workers-0-0.{name}:{PORT}"},
        {"name": "LLAMAX_PROCESSES", "value": str(hosts)},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "LLAMAX_BIND", "value": "$(POD_IP)"},
    ]
    given = [{"name": key, "value": value} for key, value in settings.env.items()]
    return [*(together if hosts > 1 else []), {"name": "PYTHONUNBUFFERED", "value": "1"}, *given]


def _names(study: str, settings: Settings, launch: int) -> list[str]:
    """<study>-<launch>-<worker>: the same study launched again has other names."""
    safe = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(study).name.lower()).strip("-")
    safe = safe if safe[:1].isalpha() else f"x{safe}"
    ends = [f"-{launch}-{worker}" for worker in range(settings.workers)]
    return [safe[: LONGEST - len(end)].rstrip("-") + end for end in ends]


def _job(id: str, item: Mapping[str, Any]) -> Job:
    status = item.get("status", {})
    restarts = status.get("restarts", 0)
    note = f"{restarts} restarts" if restarts else ""
    if state := status.get("terminalState"):
        return Job(id, state, False, note)
    if item.get("spec", {}).get("suspend"):
        return Job(id, "Queued", True, note)
    active = any(row.get("ready") for row in status.get("replicatedJobsStatus", []))
    return Job(id, "Running" if active else "Pending", True, note)


def _kubectl(settings: Settings) -> list[str]:
    context = ["--context", settings.context] if settings.context else []
    return ["kubectl", *context, "--namespace", settings.namespace]
