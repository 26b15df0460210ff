"""The manifests of a cluster on Ray Serve: KubeRay's fields, pods, and the configuration inside."""

from __future__ import annotations

import importlib
import re
from typing import Any

import jsonschema
import pytest
import yaml

from server.cluster.config import ClusterConfig, parse_config
from tests.deploy.manifests import (
    FOLDER,
    ROOT,
    VERSIONS,
    Manifest,
    built,
    check,
    check_pod_template,
    containers,
    of_kind,
    templates,
)


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    """The schema of an object with no other fields."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
POD = {"type": "object"}
"""Checked by Kubernetes' own schema."""
RAY_SERVICE = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_object(["name"], name={"type": "string"}, labels=WORDS),
    spec=_object(
        ["serveConfigV2", "rayClusterConfig"],
        serveConfigV2={"type": "string"},
        excludeHeadPodFromServeSvc={"type": "boolean"},
        rayClusterConfig=_object(
            ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
            rayVersion={"type": "string"},
            authOptions=_object(["mode"], mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling={"type": "boolean"},
            headGroupSpec=_object(["template"], rayStartParams=WORDS, template=POD),
            workerGroupSpecs={
                "type": "array",
                "minItems": 1,
                "items": _object(
                    ["groupName", "template"],
                    groupName={"type": "string"},
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=WORDS,
                    template=POD,
                ),
            },
        ),
    ),
)
"""Of the fields of KubeRay's RayService those that the manifests use."""


@pytest.fixture(scope="module", params=["ray", "ray-gpu"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return built(FOLDER / request.param)


@pytest.fixture
def service(manifests: list[Manifest]) -> Manifest:
    [only] = of_kind(manifests, "RayService")
    return only


@pytest.fixture
def application(service: Manifest) -> Manifest:
    """The only application that Ray Serve deploys."""
    settings = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert set(settings) == {"proxy_location", "applications"}
    [only] = settings["applications"]
    assert set(only) == {"name", "route_prefix", "import_path", "args"}
    found: Manifest = only
    return found


@pytest.fixture
def config(application: Manifest, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    """The cluster as its replicas read it, with their key from the Secret."""
    monkeypatch.setenv("REFT_API_KEY", "a-key-of-the-test")
    return parse_config(application["args"])


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_resource_and_pod(manifests: list[Manifest], version: str) -> None:
    for one in manifests:
        if one["kind"] != "RayService":
            check(one, version)
        for template in templates(one):
            check_pod_template(template, version)


def test_kuberay_knows_every_field(service: Manifest) -> None:
    jsonschema.validate(service, RAY_SERVICE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**service, "spec": {**service["spec"], "replicas": 2}}, RAY_SERVICE)


def test_the_configuration_is_one_that_the_cluster_takes(config: ClusterConfig) -> None:
    assert config.settings.needs_key
    assert config.settings.shared_state
    assert config.most_replicas > 1


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own
def test_ray_finds_the_application(application: Manifest) -> None:
    pytest.importorskip("ray")
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_ray_is_of_the_version_that_is_installed(service: Manifest) -> None:
    [pinned] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == pinned


def test_nobody_runs_code_in_the_cluster_without_its_token(
    manifests: list[Manifest], service: Manifest
) -> None:
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    [policy] = of_kind(manifests, "NetworkPolicy")
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [rule["ports"] for rule in open_to_all] == [[{"port": 8000}]]


def test_workers_hold_the_replicas(service: Manifest, config: ClusterConfig) -> None:
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] == group["maxReplicas"] == config.most_replicas
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) > config.resources.cpus
    assert float(limits.get("nvidia.com/gpu", 0)) == config.resources.gpus


def test_all_pods_share_the_state_and_nothing_else(
    manifests: list[Manifest], service: Manifest, config: ClusterConfig
) -> None:
    [claim] = of_kind(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in templates(service):
        [container] = template["spec"]["containers"]
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        assert set(mounts.values()) == set(volumes)
        claimed = {path for path, name in mounts.items() if "emptyDir" not in volumes[name]}
        assert claimed == {config.settings.state_dir}


def test_pods_have_the_key_from_the_secret_and_no_more_rights_than_the_server(
    manifests: list[Manifest], service: Manifest
) -> None:
    assert not of_kind(manifests, "Secret")
    [server] = templates(of_kind(built(FOLDER / "server"), "Deployment")[0])
    [alone] = server["spec"]["containers"]
    for template in templates(service):
        assert template["spec"]["securityContext"] == server["spec"]["securityContext"]
        assert template["spec"]["enableServiceLinks"] is False
        assert template["spec"]["automountServiceAccountToken"] is False
    for container in containers(service):
        assert container["image"].startswith(alone["image"])
        assert container["securityContext"].items() <= alone["securityContext"].items()
        assert {one["name"]: one for one in alone["env"]}["REFT_API_KEY"] in container["env"]
