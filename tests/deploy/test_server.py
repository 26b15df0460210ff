"""The manifests of one server: what Kubernetes accepts, and what the server and its image mean."""

from __future__ import annotations

import copy
import re
import tomllib
from typing import Any

import pytest
from kubernetes_validate import ValidationError

from reft_runtime.interventions.registry.remote.place import CALL_SECONDS
from server.routes.operations import public
from server.settings import Settings, load_settings
from tests.deploy.manifests import FOLDER, ROOT, VERSIONS, Manifest, built, check, of_kind

DOCKERFILE = (ROOT / "Dockerfile").read_text()
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module", params=["server", "server-gpu"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return built(FOLDER / request.param)


@pytest.fixture
def pod(manifests: list[Manifest]) -> Manifest:
    [deployment] = of_kind(manifests, "Deployment")
    spec: Manifest = deployment["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: Manifest) -> Manifest:
    [only] = pod["containers"]
    found: Manifest = only
    return found


@pytest.fixture
def settings(container: Manifest, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the server reads from the image's variables and the container's."""
    variables = dict(re.findall(r"\b(REFT_[A-Z_]+)=(\S+)", DOCKERFILE))
    for one in container["env"]:
        if "value" not in one:
            assert one["valueFrom"]["secretKeyRef"]
        variables[one["name"]] = one.get("value", KEY)
    for name, value in variables.items():
        assert name.removeprefix("REFT_").lower() in {*Settings.model_fields, "cache"}
        monkeypatch.setenv(name, value)
    return load_settings({})


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_resource(manifests: list[Manifest], version: str) -> None:
    for one in manifests:
        check(one, version)


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (("spec", "template", "spec", "terminationGraceSeconds"), 75),
        (("spec", "template", "spec", "containers", 0, "readinessProbe", "httpGet", "port"), None),
        (("spec", "replicas"), "1"),
    ],
)
def test_a_mistake_is_refused(manifests: list[Manifest], way: tuple[Any, ...], value: Any) -> None:
    wrong: Any = copy.deepcopy(of_kind(manifests, "Deployment")[0])
    place = wrong
    for step in way[:-1]:
        place = place[step]
    if value is None:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    with pytest.raises(ValidationError):
        check(wrong, VERSIONS[-1])


def test_the_server_starts_with_these_variables(settings: Settings) -> None:
    assert settings.host == "0.0.0.0"
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == KEY
    assert settings.drain_seconds > 0


def test_no_manifest_holds_a_key(manifests: list[Manifest], container: Manifest) -> None:
    assert not of_kind(manifests, "Secret")
    assert all("value" not in one for one in container["env"] if "KEY" in one["name"])


def test_probes_ask_routes_that_need_no_key(container: Manifest) -> None:
    routes = {path for route in public.routes if (path := getattr(route, "path", None))}
    asked = {
        kind: container[kind]["httpGet"]
        for kind in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert {get["path"] for get in asked.values()} <= routes
    assert asked["livenessProbe"]["path"] == "/livez"
    assert asked["readinessProbe"]["path"] == "/readyz"
    assert {get["port"] for get in asked.values()} == {"http"}


def test_the_first_start_has_as_long_as_the_images_own_check(container: Manifest) -> None:
    [minutes] = re.findall(r"--start-period=(\d+)m", DOCKERFILE)
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= int(minutes) * 60


def test_ports_are_those_on_which_the_server_listens(
    manifests: list[Manifest], container: Manifest, settings: Settings
) -> None:
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": settings.port, "metrics": settings.metrics_port}
    [service] = of_kind(manifests, "Service")
    assert {one["targetPort"] for one in service["spec"]["ports"]} == {"http"}
    [policy] = of_kind(manifests, "NetworkPolicy")
    rules = {rule["ports"][0]["port"]: rule.get("from") for rule in policy["spec"]["ingress"]}
    assert set(rules) == set(ports)
    assert rules["metrics"], "metrics have no key, so not everybody may reach them"


def test_all_select_the_pod(manifests: list[Manifest]) -> None:
    [deployment] = of_kind(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    [service] = of_kind(manifests, "Service")
    [policy] = of_kind(manifests, "NetworkPolicy")
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        policy["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()


def test_a_drain_ends_before_the_pod_is_killed(
    pod: Manifest, container: Manifest, settings: Settings
) -> None:
    [_, pause] = container["lifecycle"]["preStop"]["exec"]["command"]
    ends = int(pause) + settings.drain_seconds + CALL_SECONDS
    assert pod["terminationGracePeriodSeconds"] > ends


def test_one_server_at_a_time_owns_the_state(manifests: list[Manifest]) -> None:
    [deployment] = of_kind(manifests, "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_whatever_the_image_writes_to_is_a_volume(
    manifests: list[Manifest], pod: Manifest, container: Manifest
) -> None:
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    [written] = re.findall(r"VOLUME \[(.*)\]", DOCKERFILE)
    assert set(mounts) == {*re.findall(r'"(.*?)"', written), "/tmp"}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    claims = {one["metadata"]["name"] for one in of_kind(manifests, "PersistentVolumeClaim")}
    claimed = [one.get("persistentVolumeClaim") for one in volumes.values()]
    assert {one["claimName"] for one in claimed if one} == claims


def test_the_pod_may_do_nothing_beyond_serving(pod: Manifest, container: Manifest) -> None:
    [user, group] = re.findall(r"USER (\d+):(\d+)", DOCKERFILE)[0]
    who = pod["securityContext"]
    assert who["runAsNonRoot"]
    assert (who["runAsUser"], who["runAsGroup"], who["fsGroup"]) == (
        int(user),
        int(group),
        int(group),
    )
    may = container["securityContext"]
    assert may["readOnlyRootFilesystem"]
    assert not may["allowPrivilegeEscalation"]
    assert may["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


def test_kubernetes_adds_no_variables_that_the_server_would_read(pod: Manifest) -> None:
    # Of a Service `reft` it would make REFT_PORT=tcp://10.0.0.1:8000.
    assert pod["enableServiceLinks"] is False


def test_the_image_is_that_of_this_version(container: Manifest) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert container["image"].startswith(f"{project['name']}:{project['version']}")


def test_only_the_gpus_server_asks_for_one() -> None:
    for folder, device, gpus in (("server", "cpu", None), ("server-gpu", "cuda", "1")):
        [deployment] = of_kind(built(FOLDER / folder), "Deployment")
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        variables = {one["name"]: one.get("value") for one in container["env"]}
        assert variables.get("REFT_DEVICE", "cpu") == device
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
        assert container["image"].endswith("cu130") == (gpus is not None)
