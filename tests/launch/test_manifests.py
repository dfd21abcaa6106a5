from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.launch.conftest import LAUNCH, check_golden

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="the schemas of Kubernetes come with kubernetes-validate"
)
yaml = pytest.importorskip("yaml")

RENDER = LAUNCH / "render.sh"
JOBSET = LAUNCH / "gke_jobset.yaml"
GPU = LAUNCH / "kubernetes_gpu.yaml"
MANIFESTS = pytest.mark.parametrize("manifest", [JOBSET, GPU], ids=lambda path: path.stem)
IMAGE = "IMAGE=europe-docker.pkg.dev/lab/images/mae_jax:1"
NEEDED = {JOBSET: (IMAGE, "DATA_BUCKET=lab-data"), GPU: (IMAGE, "CLAIM=lab-disk")}
FLAGS = ("--config=vit_l", "--workdir=gs://bucket/run")
ODD = '--config.data.path=/it\'s "here" $(HOME) $HOME C:\\new & @FLAGS@ é'
# What jobset.x-k8s.io/v1alpha2 has on its outer levels and we use.
# Source: kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go
JOBSET_KEYS = {"failurePolicy", "replicatedJobs"}
FAILURE_POLICY_KEYS = {"maxRestarts", "rules"}
RULE_KEYS = {"name", "action", "onJobFailureReasons"}
REPLICATED_JOB_KEYS = {"name", "replicas", "template"}


def rendered(stage, manifest, *arguments: str) -> list[dict[str, Any]]:
    ended = stage.run(RENDER, manifest, *NEEDED[manifest], *FLAGS, *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    return list(yaml.safe_load_all(ended.stdout))


def job_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the Job; of a JobSet what it makes its Job of, as a Job."""
    last = documents[-1]
    if last["kind"] == "Job":
        return last
    (replicated,) = last["spec"]["replicatedJobs"]
    job = copy.deepcopy(replicated["template"])
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **job}


def container_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = job_of(documents)["spec"]["template"]["spec"]["containers"]
    return container


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, "1.31", strict=True)


@MANIFESTS
def test_jobs_and_services_are_valid(stage, manifest):
    documents = rendered(stage, manifest)
    for document in documents:
        if document["kind"] != "JobSet":
            validate(document)
    job = job_of(documents)
    validate(job)
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []  # the validator can tell
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(job)


def test_the_outer_levels_of_the_jobset_are_valid(stage):
    (jobset,) = rendered(stage, JOBSET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(jobset["spec"]) == JOBSET_KEYS
    policy = jobset["spec"]["failurePolicy"]
    assert set(policy) == FAILURE_POLICY_KEYS
    assert policy["maxRestarts"] == 100
    (rule,) = policy["rules"]
    assert set(rule) == RULE_KEYS
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert set(replicated) == REPLICATED_JOB_KEYS
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def action(job: dict[str, Any], status: int | None) -> str:
    """Return what Kubernetes does when a container ends with a status; None: its node went away.

    Source: kubernetes.io/docs/concepts/workloads/controllers/job, "Pod failure policy".
    """
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is None:
            conditions = [(c["type"], c["status"]) for c in rule["onPodConditions"]]
            assert conditions == [("DisruptionTarget", "True")]
            if status is None:
                return rule["action"]
        elif status is not None and (status in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
    return "Count"


@pytest.mark.parametrize(
    ("status", "on_jobset", "on_gpu"),
    [
        (2, "FailJob", "FailJob"),  # the user's mistake
        (1, "FailJob", "FailJob"),  # given up by restart.sh
        (134, "Count", "Count"),  # another pod has not come; it may yet
        (75, "Count", "Ignore"),  # stopped and saved
        (None, "Count", "Ignore"),
        (137, "Count", "Count"),  # killed
    ],
)
def test_statuses_have_the_meaning_of_the_restart_contract(stage, status, on_jobset, on_gpu):
    """`Count` with a backoffLimit of 0 makes the JobSet start all pods anew."""
    jobset, gpu = job_of(rendered(stage, JOBSET)), job_of(rendered(stage, GPU))
    assert jobset["spec"]["backoffLimit"] == 0
    assert action(jobset, status) == on_jobset
    assert action(gpu, status) == on_gpu


@MANIFESTS
def test_a_pod_runs_the_restart_loop_and_has_time_to_save(stage, manifest):
    documents = rendered(stage, manifest, "HOSTS=16", "GRACE_SECONDS=300", ODD)
    container, spec = container_of(documents), job_of(documents)["spec"]
    assert container["command"] == ["launch/restart.sh", "python", "-m", "mae_jax.main"]
    # Kubernetes makes $(HOME) of $$(HOME).
    assert container["args"] == [*FLAGS, ODD.replace("$(", "$$(")]
    assert (spec["parallelism"], spec["completions"]) == (16, 16)
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 300
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_a_slice_of_tpus_is_asked_for(stage):
    documents = rendered(
        stage, JOBSET, "ACCELERATOR=tpu-v5p-slice", "TOPOLOGY=4x4x4", "CHIPS=4", "HOSTS=16"
    )
    assert container_of(documents)["resources"] == {"limits": {"google.com/tpu": 4}}
    assert job_of(documents)["spec"]["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }


@MANIFESTS
def test_each_volume_that_is_mounted_is_there(stage, manifest):
    documents = rendered(stage, manifest)
    mounted = {mount["name"] for mount in container_of(documents)["volumeMounts"]}
    volumes = job_of(documents)["spec"]["template"]["spec"]["volumes"]
    assert mounted == {volume["name"] for volume in volumes}


def test_gpu_pods_find_their_coordinator(stage):
    service, job = rendered(stage, GPU, "NAME=run-7", "HOSTS=3", "PORT=4321", "GPUS=4")
    container = container_of([service, job])
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    variables = {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
    # A pod of an Indexed Job is called JOB-INDEX, and found under the service, its subdomain.
    assert variables["MAE_JAX_COORDINATOR_ADDRESS"] == "run-7-0.run-7:4321"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"] == "run-7"
    assert job["metadata"]["name"] == "run-7"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "run-7"}
    # Pod 0 listens on its own address alone. A variable has to stand before what names it.
    assert variables["MAE_JAX_COORDINATOR_BIND_ADDRESS"] == "$(POD_IP):4321"
    assert list(variables).index("POD_IP") < list(variables).index(
        "MAE_JAX_COORDINATOR_BIND_ADDRESS"
    )
    assert variables["MAE_JAX_NUM_PROCESSES"] == "3"
    assert variables["MAE_JAX_PROCESS_ID"] == {
        "fieldRef": {
            "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        }
    }


@MANIFESTS
def test_the_manifest_is_as_before(stage, manifest):
    ended = stage.run(RENDER, manifest, *NEEDED[manifest], "NAME=null", *FLAGS, ODD)
    check_golden(manifest.name, ended.stdout)
    (*_, last) = yaml.safe_load_all(ended.stdout)
    assert last["metadata"]["name"] == "null"  # not nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NAME=my run"], "NAME: expected up to 40 small letters, digits and -, got 'my run'"),
        (["NAME=it's"], "NAME: expected up to 40 small letters"),
        (['NAME=a"b'], "NAME: expected up to 40 small letters"),
        (["NAME=" + "a" * 41], "NAME: expected up to 40 small letters"),
        (["HOSTS=two"], "HOSTS: expected a positive number, got 'two'"),
        (["HOSTS=0"], "HOSTS: expected a positive number, got '0'"),
        (["IMAGE=a|b"], "IMAGE: expected letters, digits and ._:/@-, got 'a|b'"),
        (["IMAGE="], "IMAGE: expected letters, digits and ._:/@-, got ''"),
        (["HOST=4"], "HOST: expected one of NAME IMAGE"),
        (["four"], "four: expected KEY=VALUE or a flag of mae_jax.main"),
        (["--config.a=x\ny"], "--config.a: expected no line breaks, got some"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(stage, arguments, message):
    ended = stage.run(RENDER, GPU, *NEEDED[GPU], *FLAGS, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {message}")
    assert ended.stderr.count("\n") == 1


def test_what_is_missing_is_named(stage):
    assert "IMAGE: expected" in stage.run(RENDER, GPU, *FLAGS).stderr
    assert "--workdir: expected" in stage.run(RENDER, GPU, *NEEDED[GPU], "--config=vit_l").stderr
    ended = stage.run(RENDER, "nothing.yaml")
    assert ended.stderr == "error: render.sh: expected a manifest of launch/, got 'nothing.yaml'\n"


def test_it_is_applied_through_a_pipe(stage):
    pipe = 'set -o pipefail; "$@" | kubectl apply -f -'
    ended = stage.run("bash", "-c", pipe, "_", RENDER, GPU, *NEEDED[GPU], *FLAGS)
    assert ended.returncode == 0
    applied = (stage.folder / "applied.yaml").read_text()
    assert applied == stage.run(RENDER, GPU, *NEEDED[GPU], *FLAGS).stdout
    ended = stage.run("bash", "-c", pipe, "_", RENDER, GPU, *NEEDED[GPU], *FLAGS, "NAME=A")
    assert ended.returncode != 0
    assert (stage.folder / "applied.yaml").read_text() == ""
