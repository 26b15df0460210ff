"""The manifests of deploy/kubernetes, as they reach a cluster."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"

VERSIONS = "1.32", "1.37"
"""The oldest version of Kubernetes that is checked, and the newest one there are schemas for."""


def read(path: Path) -> list[Manifest]:
    """The documents of a YAML file."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def built(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` makes of a folder, for the fields that ours use."""
    [settings] = read(folder / "kustomization.yaml")
    used = {"apiVersion", "kind", "resources", "images", "patches"}
    assert set(settings) <= used, "this reads no other field"
    found = []
    for place in settings["resources"]:
        path = (folder / place).resolve()
        found += built(path) if path.is_dir() else read(path)
    found = copy.deepcopy(found)
    for image in settings.get("images", ()):
        for container in (c for one in found for c in containers(one)):
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    for patch in settings.get("patches", ()):
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        [target] = [one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name)]
        for operation in yaml.safe_load(patch["patch"]):
            _apply(target, **operation)
    return found


def containers(manifest: Manifest) -> list[Manifest]:
    """The containers of a resource's pods."""
    return [one for pod in templates(manifest) for one in pod["spec"]["containers"]]


def templates(manifest: Manifest) -> list[Manifest]:
    """The templates of a resource's pods: none if it has none."""
    if manifest["kind"] == "Deployment":
        return [manifest["spec"]["template"]]
    if manifest["kind"] == "RayService":
        cluster = manifest["spec"]["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        return [group["template"] for group in groups]
    return []


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Those of a kind."""
    return [one for one in manifests if one["kind"] == kind]


def check(manifest: Manifest, version: str) -> None:
    """Check a resource against Kubernetes' schema of its kind, which allows no other field."""
    kubernetes_validate.validate(manifest, version, strict=True)


def check_pod_template(template: Manifest, version: str) -> None:
    """Check a pod's template that a custom resource contains: it has the fields of a pod."""
    check({"apiVersion": "v1", "kind": "Pod", **template}, version)


def _apply(target: Manifest, op: str, path: str, value: object = None) -> None:
    """One operation of RFC 6902: `add` or `replace`."""
    *way, last = path.split("/")[1:]
    place: Any = target
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    if isinstance(place, list):
        assert (op, last) == ("add", "-")
        place.append(value)
    else:
        assert (op == "add") == (last not in place), path
        place[last] = value
