"""Manifests against JobSet's own schema, where unknown fields are errors, and kubectl by a stand-in."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llamax.config.load import validate
from llamax.errors import UserError
from llamax.launch.on import jobset
from llamax.launch.on.jobset import Settings
from llamax.launch.protocol import load_settings
from tests.launch.conftest import Kubectl

FIXTURE = Path(__file__).with_name("fixtures") / "jobset-v1alpha2.json"
STUDY = "gs://bucket/runs/my_Study"
KINDS = {
    "one TPU host": {"topology": "v5e:2x2"},
    "TPU hosts": {"topology": "v5p:2x2x4", "spot": True, "queue": "tpus", "service_account": "trainer"},
    "one GPU node": {"topology": "h100:8"},
    "GPU nodes": {"topology": "h200:8x4", "claim": {"name": "runs", "path": "/runs"}, "env": {"A": "1"}},
}


def settings(**more: Any) -> Settings:
    return validate(Settings, {"image": "registry/llamax:1", "topology": "v5e:4x4"} | more, "test")


def manifests(study: str = STUDY, **more: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(jobset.script(study, settings(**more), 0)))


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """JobSet's schema with every object closed, as the API server's strict field validation reads it."""
    found = json.loads(FIXTURE.read_text())["openAPIV3Schema"]
    found["properties"]["metadata"]["properties"] = {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        **{key: {"type": "object", "additionalProperties": {"type": "string"}} for key in ("labels", "annotations")},
    }
    return closed(found)


def closed(node: Any) -> Any:
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: closed(value) for key, value in node.items()}
    open_ = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
    return node if open_ or not isinstance(node.get("properties"), dict) else {**node, "additionalProperties": False}


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a manifest that is one of fields, not of free keys."""
    if isinstance(node, list):
        for item in node:
            yield from objects(item)
    elif isinstance(node, dict):
        yield node
        for key, value in node.items():
            if key not in ("labels", "annotations", "nodeSelector", "requests", "limits"):
                yield from objects(value)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_fit_the_schema_and_a_field_more_anywhere_does_not(kind: str, schema: dict[str, Any]) -> None:
    study = "/runs/my_Study" if "claim" in KINDS[kind] else STUDY
    check = jsonschema.Draft202012Validator(schema)
    found = manifests(study, **KINDS[kind], workers=2)
    assert len(found) == 2
    for manifest in found:
        assert [error.message for error in check.iter_errors(manifest)] == []
    for i in range(len(list(objects(found[0])))):
        wrong = copy.deepcopy(found[0])
        list(objects(wrong))[i]["notAField"] = "x"
        assert not check.is_valid(wrong), list(objects(found[0]))[i]


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "label"),
    [  # Google's tables of TPU slices: chips and hosts of each
        ("v5e:2x2", 1, 4, "tpu-v5-lite-podslice"),
        ("v5e:16x16", 64, 256, "tpu-v5-lite-podslice"),
        ("v5p:4x4x8", 32, 128, "tpu-v5p-slice"),
        ("v6e:4x8", 8, 32, "tpu-v6e-slice"),
        ("tpu7x:2x2x2", 2, 8, "tpu7x"),
    ],
)
def test_tpu_slices(topology: str, hosts: int, chips: int, label: str) -> None:
    (manifest,) = manifests(topology=topology)
    job, pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"], pod_of(manifest)
    shape = topology.partition(":")[2]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    limits = pod["containers"][0]["resources"]["limits"]
    assert list(limits) == ["google.com/tpu"]
    assert limits["google.com/tpu"] * hosts == chips == math.prod(map(int, shape.split("x")))
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert manifest["metadata"]["annotations"][exclusive] == "cloud.google.com/gke-nodepool"


def test_gpu_nodes_spot_queue_and_the_way_processes_meet() -> None:
    first, second = manifests(topology="h100:8x4", spot=True, queue="gpus", workers=2)
    name, pod = first["metadata"]["name"], pod_of(first)
    assert [name, second["metadata"]["name"]] == ["my-study-0-0", "my-study-0-1"]
    assert first["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    assert {item["key"] for item in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["command"] == ["python", "-m", "llamax.sweep.worker", STUDY]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["LLAMAX_COORDINATOR"] == f"{name}-workers-0-0.{name}:8476"
    assert env["LLAMAX_PROCESSES"] == "4"
    assert len(f"{'x' * jobset.LONGEST}-workers-0-9999-abcde") <= 63


def test_a_lost_node_is_not_counted_as_a_crash() -> None:
    (manifest,) = manifests(restarts=5)
    policy, job = manifest["spec"]["failurePolicy"], manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] == 5
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    assert pod_of(manifest)["restartPolicy"] == "Never"  # Kubernetes allows no pod failure policy with another
    disrupted, asked = job["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert 143 in asked["onExitCodes"]["values"]


def test_long_and_odd_names_stay_within_the_limits() -> None:
    for study in ("gs://b/" + "Long_study." * 9, "gs://b/2024_run", "gs://b/x"):
        names = [m["metadata"]["name"] for m in manifests(study, workers=12)]
        assert len(set(names)) == 12
        assert all(len(name) <= jobset.LONGEST and name[0].isalpha() for name in names)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["topology=v5e:3x3"], "v5e:3x3"),
        (["topology=v9:2x2"], "v9:2x2"),
        (["topology=cpu:8"], "GKE has no such nodes"),
        (["image=null"], "image"),
        (["devices=8"], "unknown field devices"),
        (["queue=Not A Name"], "queue"),
    ],
)
def test_bad_settings_are_one_message(changes: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_settings("jobset", ["image=registry/llamax:1", *changes])


def test_storage_that_pods_cannot_see_is_refused() -> None:
    with pytest.raises(UserError, match="pods cannot see the study /elsewhere/runs/s"):
        manifests("/elsewhere/runs/s")
    with pytest.raises(UserError, match="pods cannot see"):
        manifests("/elsewhere/runs/s", claim={"name": "runs", "path": "/runs"})
    assert manifests("/runs/s", claim={"name": "runs", "path": "/runs"})


# ---------------------------------------------------------------- kubectl
def test_kubectl_is_given_the_manifests_and_the_namespace(kubectl: Kubectl) -> None:
    kubectl.answers(can_i=(0, "yes\n", ""))
    chosen = settings(workers=2, namespace="team", context="gke_x")
    jobset.check(chosen)
    assert jobset.submit(STUDY, chosen, 3) == ["my-study-3-0", "my-study-3-1"]
    assert (kubectl.folder / "created.yaml").read_text() == jobset.script(STUDY, chosen, 3)
    assert all(call[:4] == ["--context", "gke_x", "--namespace", "team"] for call in kubectl.calls)
    jobset.cancel(chosen, ["my-study-3-0"])
    assert kubectl.calls[-1][4:6] == ["delete", "jobset"]


def test_states_of_jobsets(kubectl: Kubectl) -> None:
    def item(name: str, status: dict[str, Any], spec: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"metadata": {"name": name}, "spec": spec or {}, "status": status}

    items = [
        item("a", {"terminalState": "Completed"}),
        item("b", {"restarts": 2, "replicatedJobsStatus": [{"name": "workers", "ready": 1}]}),
        item("c", {}, {"suspend": True}),
        item("d", {"terminalState": "Failed"}),
    ]
    kubectl.answers(get=(0, json.dumps({"items": items}), ""))
    found = {job.id: (job.state, job.live, job.note) for job in jobset.jobs(settings(), ["a", "b", "c", "d", "e"])}
    assert found == {
        "a": ("Completed", False, ""),
        "b": ("Running", True, "2 restarts"),
        "c": ("Queued", True, ""),
        "d": ("Failed", False, ""),
        "e": ("Deleted", False, ""),
    }
    kubectl.answers(get=(0, json.dumps(items[0]), ""))  # of one name, kubectl prints the object itself
    assert [job.state for job in jobset.jobs(settings(), ["a"])] == ["Completed"]


def test_missing_rights_and_taken_names_are_one_message(kubectl: Kubectl) -> None:
    kubectl.answers(can_i=(1, "", "error: You must be logged in to the server (Unauthorized)\n"))
    with pytest.raises(UserError, match=r"(?s)namespace default.*Unauthorized.*get-credentials"):
        jobset.check(settings())
    kubectl.answers(create=(1, "", 'Error from server (AlreadyExists): jobsets "my-study-0-0" already exists\n'))
    with pytest.raises(UserError, match="already exists; rename the study"):
        jobset.submit(STUDY, settings(), 0)
    assert not any("delete" in call for call in kubectl.calls), "what has the name is someone else's"


def test_no_kubectl_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="kubectl is not on this machine"):
        jobset.check(settings())
