"""The Helm chart: rendered by Helm itself, each object against Kubernetes's own schemas. There is no cluster here: what
a scheduler, a volume or a network plugin makes of it was not tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deploy.cli import app

pytestmark = pytest.mark.containers

CHART = Path(__file__).parents[2] / "deploy" / "chart"
#: The oldest and the newest Kubernetes that it is checked for.
KUBERNETES = ("1.27", "1.34")

NODE = {"name": "clinic-a", "credentialsSecret": "a", "corpus": {"claim": "notes", "paths": ["**/*.txt", "b.jsonl"]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "a node alone": {"master": {"enabled": False}, "nodes": [NODE]},
    "everything": {
        "config": "[stop]\nversions = 3\n",
        "master": {"operators": ["alice", "bob"], "storage": {"size": "1Ti", "storageClassName": "fast"}},
        "nodes": [
            {**NODE, "args": ["--device", "cuda"], "resources": {"limits": {"nvidia.com/gpu": 1}}},
            {**NODE, "name": "clinic-b", "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        ],
        "images": {"master": "registry.example:5000/master", "node": "n@sha256:ab", "pullSecrets": ["pull"]},
        "networkPolicy": {
            "brokerPeers": [{"ipBlock": {"cidr": "192.0.2.0/24"}}],
            "metricsPeers": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        },
    },
    "without policies": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    import helm_python as helm  # of the extra [containers], which the ordinary suite is collected without
    import yaml

    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="fed", namespace="ml")
    found = [each for name, text in texts.items() if name.endswith(".yaml") for each in yaml.safe_load_all(text)]
    return [each for each in found if each]


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in objects if each["kind"] == "StatefulSet"
    }


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_it_renders_is_what_kubernetes_knows(settings: str, kubernetes: str) -> None:
    import kubernetes_validate

    objects = rendered(SETTINGS[settings])
    for each in objects:
        kubernetes_validate.validate(each, kubernetes, strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names)), names


def test_lint_has_nothing_against_it() -> None:
    import helm_python as helm

    found = helm.lint(str(CHART))
    assert not found["errors"]
    assert [each for each in found["messages"] if "icon" not in each["error"]] == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_pod_may_write_only_what_is_its_own_and_talks_to_nobody_of_the_cluster(settings: str) -> None:
    found = pods(rendered(SETTINGS[settings]))
    assert found
    for name, pod in found.items():
        (container,) = pod["containers"]
        assert pod["enableServiceLinks"] is False and pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
        assert writable == {"/var/lib/shared-encoder", "/tmp"}
        mounted, there = {each["name"] for each in container["volumeMounts"]}, {each["name"] for each in pod["volumes"]}
        assert mounted == there | {"state"}
        assert container["resources"]["limits"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_a_pod_runs_is_a_command_of_ours_with_flags_that_it_has(settings: str) -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    for pod in pods(rendered(SETTINGS[settings])).values():
        (container,) = pod["containers"]
        name, *flags = container["args"]
        known = {flag for parameter in commands[name].params for flag in parameter.opts}
        assert {flag.partition("=")[0] for flag in flags if flag.startswith("--")} <= known, flags


def test_each_node_reads_its_own_corpus_with_its_own_credentials() -> None:
    objects = rendered(SETTINGS["everything"])
    found = pods(objects)
    assert set(found) == {"fed-master", "fed-clinic-a", "fed-clinic-b"}
    clinic = found["fed-clinic-a"]
    assert clinic["containers"][0]["args"] == [
        *("node", "--http=0.0.0.0:9464", "--json", "--config=/etc/shared-encoder/config.toml"),
        *("--corpus=/corpus/**/*.txt", "--corpus=/corpus/b.jsonl", "--device", "cuda"),
    ]
    volumes = {each["name"]: each for each in clinic["volumes"]}
    assert volumes["credentials"]["secret"]["secretName"] == "a"
    assert volumes["corpus"]["persistentVolumeClaim"] == {"claimName": "notes", "readOnly": True}
    environment = {each["name"]: each["value"] for each in found["fed-master"]["containers"][0]["env"]}
    assert environment["SHARED_ENCODER_MASTER__OPERATORS"] == '["alice","bob"]'
    images = {name: pod["containers"][0]["image"] for name, pod in found.items()}
    assert images["fed-master"] == "registry.example:5000/master:0.1.0" and images["fed-clinic-a"] == "n@sha256:ab"
    (policy,) = [each for each in objects if each["kind"] == "NetworkPolicy"]
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in objects if each["kind"] == "StatefulSet"]
    assert all(selected <= each.items() for each in labels), "the policy is for each of them"


@pytest.mark.parametrize(
    "values",
    [
        {"nodes": [{"name": "clinic-a"}]},
        {"nodes": [{**NODE, "name": "Clinic A"}]},
        {"nodes": [{**NODE, "name": "master"}]},
        {"nodes": [{**NODE, "gpu": 1}]},
        {"master": {"versions": 3}},
        {"terminationGracePeriodSeconds": "long"},
    ],
)
def test_values_that_are_none_are_refused(values: dict[str, Any]) -> None:
    from helm_python.errors import HelmError

    with pytest.raises(HelmError):
        rendered(values)
