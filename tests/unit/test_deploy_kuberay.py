"""The Kubernetes manifests: real schemas, Ray's own reading of them, and what they promise of rights and probes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kuberay"
KUBERNETES = "1.34"
OURS = ("RayCluster", "RayJob", "RayService")


@lru_cache
def definitions() -> dict[str, Any]:
    """Kubernetes' strict definitions: a field that is not known is an error."""
    found = importlib.util.find_spec("kubernetes_validate")
    if found is None or found.origin is None:
        pytest.skip("needs kubernetes-validate, which holds the schemas")
    folder = Path(found.origin).parent / f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    return json.loads((folder / "_definitions.json").read_text())["$defs"]


@lru_cache
def ray_schema() -> dict[str, Any]:
    """One JSON schema of KubeRay's types over Kubernetes' definitions."""

    def of(kind: Any) -> dict[str, Any]:
        match kind:
            case {"enum": values}:
                return {"enum": values}
            case [inner]:
                return {"type": "array", "items": of(inner)}
            case "map":
                return {"type": "object", "additionalProperties": {"type": "string"}}
            case str() if kind.startswith("k8s:"):
                return {"$ref": f"#/$defs/io.k8s.{kind.removeprefix('k8s:')}"}
            case str() if kind[0].isupper():
                return {"$ref": f"#/$defs/{kind}"}
        return {"type": kind}

    types = yaml.safe_load((ROOT / "tests/kuberay_fields.yaml").read_text())
    made = {
        name: {
            "type": "object",
            "additionalProperties": False,
            "properties": {field.rstrip("!"): of(kind) for field, kind in fields.items()},
            "required": [field.rstrip("!") for field in fields if field.endswith("!")],
        }
        for name, fields in types.items()
    }
    return {"$defs": definitions() | made}


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object, as `path: message`."""
    if document["kind"] in OURS:
        schema = ray_schema() | {"$ref": f"#/$defs/{document['kind']}"}
    else:
        group, _, version = document["apiVersion"].rpartition("/")
        [name] = [
            name
            for name, found in definitions().items()
            for of in found.get("x-kubernetes-group-version-kind", ())
            if (of["group"], of["version"], of["kind"]) == (group, version, document["kind"])
        ]
        schema = {"$ref": f"#/$defs/{name}", "$defs": definitions()}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors]


def documents() -> list[dict[str, Any]]:
    names = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in names for document in yaml.safe_load_all(path.read_text())]


def one(kind: str) -> dict[str, Any]:
    [found] = [document for document in documents() if document["kind"] == kind]
    return found


def ray_clusters() -> dict[str, dict[str, Any]]:
    return {
        "RayCluster": one("RayCluster")["spec"],
        "RayJob": one("RayJob")["spec"]["rayClusterSpec"],
        "RayService": one("RayService")["spec"]["rayClusterConfig"],
    }


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, spec in ray_clusters().items():
        yield f"{kind} head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{kind} {group['groupName']}", group["template"]
    yield "submitter", one("RayJob")["spec"]["submitterPodTemplate"]


@pytest.mark.parametrize("document", documents(), ids=lambda d: f"{d['kind']}-{d['metadata'].get('name', 'job')}")
def test_every_object_fits_its_schema(document: dict[str, Any]) -> None:
    assert problems(document) == []


def test_the_schema_notices_what_is_wrong() -> None:
    cluster = one("RayCluster")
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    cluster["spec"]["workerGroupSpecs"][0]["minReplicas"] = "0"
    cluster["spec"]["autoscalerOptions"]["upscalingMode"] = "Fast"
    cluster["spec"]["authoptions"] = {}
    found = "\n".join(problems(cluster))
    for part in ("readyProbe", "minReplicas: '0' is not of type", "'Fast' is not one of", "authoptions"):
        assert part in found
    policy = one("PersistentVolumeClaim")
    policy["spec"]["accessMode"] = "x"
    assert problems(policy)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_builds_it_with_secrets_and_not_without(tmp_path: Path) -> None:
    folder = tmp_path / "kuberay"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("secrets"))
    build = ["kubectl", "kustomize", str(folder)]
    refused = subprocess.run(build, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0 and "secrets/" in refused.stderr, "no secret has a default"
    (folder / "secrets").mkdir()
    for name in ("environment", "keys.json", "tls.crt", "tls.key"):
        (folder / "secrets" / name).write_text("AWS_ACCESS_KEY_ID=a\n")
    built = subprocess.run(build, capture_output=True, text=True, timeout=60, check=True).stdout
    objects = list(yaml.safe_load_all(built))
    assert [p for d in objects for p in problems(d)] == []
    assert {d["metadata"].get("namespace", "dermaflow") for d in objects} == {"dermaflow"}
    there = {(d["kind"], d["metadata"]["name"]) for d in objects}
    for _, pod in pods():  # everything that a pod names is made
        spec = pod["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        for source in spec["containers"][0].get("envFrom", ()):
            [(kind, ref)] = source.items()
            assert ({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], ref["name"]) in there
        for volume in spec["volumes"]:
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in there
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there


def test_ray_reads_the_groups_as_meant() -> None:
    """By what Ray's autoscaler makes of the object when it asks Kubernetes for it."""
    config = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    for kind, spec in ray_clusters().items():
        cluster = {"metadata": {"name": kind, "namespace": "dermaflow"}, "spec": spec}
        types = config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0, kind
        if kind == "RayCluster":
            gpu, cpu = types["gpu"], types["cpu"]
            assert (gpu["min_workers"], gpu["max_workers"], gpu["resources"]["GPU"]) == (0, 4, 1)
            assert (cpu["min_workers"], cpu["max_workers"], cpu["resources"]["CPU"]) == (0, 16, 8)
            assert "GPU" not in cpu["resources"]


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=[name for name, _ in pods()])
def test_no_pod_has_more_than_it_needs(name: str, pod: dict[str, Any]) -> None:
    spec, labels = pod["spec"], pod["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == "dermaflow", "the network policies find it by this"
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys() and all("hostPath" not in v for v in spec["volumes"])
    is_head = labels["app.kubernetes.io/component"].endswith("-head")
    assert spec["automountServiceAccountToken"] is is_head, "only an autoscaler speaks to Kubernetes"
    [container] = spec["containers"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
    if name != "submitter":
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in (52365, 8265, 8000)
    if "gpu" in name:
        assert spec["tolerations"] and spec["nodeSelector"] and container["resources"]["limits"]["nvidia.com/gpu"]


def test_secrets_are_named_and_never_written() -> None:
    for path in FOLDER.glob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            assert document["kind"] != "Secret", f"{path}: a secret in the repository"
    roles = [rule for d in documents() if d["kind"] == "Role" for rule in d["rules"]]
    assert roles and all("*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"] for rule in roles)
    assert not [d for d in documents() if d["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    [nothing] = [d for d in documents() if d["metadata"].get("name") == "nothing"]
    assert nothing["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_the_service_is_what_the_code_can_start() -> None:
    options = pytest.importorskip("serve.options")
    schema = pytest.importorskip("ray.serve.schema")
    config = yaml.safe_load(one("RayService")["spec"]["serveConfigV2"])
    deployed = schema.ServeDeploySchema.model_validate(config)
    assert deployed.applications[0].import_path == "serve.app:build"
    found = options.checked(options.Options.model_validate(deployed.applications[0].args))
    mounted = {m["mountPath"] for m in list(pods())[-2][1]["spec"]["containers"][0]["volumeMounts"]}
    assert str(found.keys.parent) in mounted and str(found.state.parent) in mounted
    assert one("RayCluster")["spec"]["rayVersion"] == pytest.importorskip("ray").__version__
