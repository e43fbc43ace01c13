"""The manifests: fields that exist, nobody root, secrets by reference, and commands that this version understands."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from typing import Any

import click
import jsonschema
import pytest
import yaml
from cli_kit import ROOT
from kuberay_schema import KINDS

from sisa.cli import jobwords
from sisa.cli.main import cli
from sisa.cli.options import spread_ids
from sisa.recipe import parse_recipe

FOLDER = ROOT / "configs" / "kuberay"
DOCUMENTS = [
    (path.name, document) for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
IDS = [f"{name}:{document['kind']}" for name, document in DOCUMENTS]


def found(value: Any, key: str) -> Iterator[Any]:
    """Everything that stands under a key, at any depth."""
    if isinstance(value, dict):
        for name, child in value.items():
            if name == key:
                yield child
            yield from found(child, key)
    elif isinstance(value, list):
        for child in value:
            yield from found(child, key)


def pods(document: Any) -> list[Any]:
    """Specs of pods: what has containers."""
    if isinstance(document, dict):
        return [document] if "containers" in document else [pod for child in document.values() for pod in pods(child)]
    return [pod for child in document for pod in pods(child)] if isinstance(document, list) else []


def named(kind: str) -> dict[str, Any]:
    (document,) = (document for _, document in DOCUMENTS if document["kind"] == kind)
    return document


def check(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(KINDS[document["kind"]]).validate(document)


def parsed(words: list[str]) -> dict[str, Any]:
    verb, *rest = words
    parent = click.Context(cli, info_name="sisa", **cli.context_settings)
    return cli.commands[verb].make_context(verb, spread_ids(rest), parent=parent).params


def commands() -> list[tuple[str, list[str]]]:
    """Every command line in the manifests, without what starts it."""
    lines = [
        (name, shlex.split(entrypoint)) for name, document in DOCUMENTS for entrypoint in found(document, "entrypoint")
    ]
    return lines + [(name, words) for name, document in DOCUMENTS for words in found(document, "command")]


@pytest.mark.parametrize("document", [document for _, document in DOCUMENTS], ids=IDS)
def test_every_field_exists(document):
    check(document)


def test_all_kinds_are_there():
    kinds = [document["kind"] for _, document in DOCUMENTS]
    assert sorted(kinds) == ["ConfigMap", "CronJob", "Deployment", "RayCluster", "RayJob", "RayJob", "Service"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagee"), "x"),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "1"),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "enableInTreeAutoscalling"), True),
        (("apiVersion",), "ray.io/v1alpha1"),
    ],
    ids=str,
)
def test_a_field_that_is_wrong_is_noticed(path, value):
    document = copy.deepcopy(named("RayCluster"))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("document", [document for _, document in DOCUMENTS if pods(document)])
def test_nobody_is_root_and_everything_has_limits(document):
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys()


@pytest.mark.parametrize("document", [document for _, document in DOCUMENTS if pods(document)])
def test_what_is_mounted_is_there(document):
    for pod in pods(document):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def test_secrets_are_named_and_never_written_down():
    for _, document in DOCUMENTS:
        for variable in (one for several in found(document, "env") for one in several):
            secret = re.search(r"KEY|SECRET|PASSWORD|TOKEN$", variable["name"])
            assert ("valueFrom" in variable) == bool(secret)
        assert not jobwords.PASSWORD.search(yaml.safe_dump(document))


def test_keys_and_passwords_stay_with_the_driver():
    cluster = named("RayCluster")["spec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert {"keys", "recipe"} <= {volume["name"] for volume in head["volumes"]}
    for group in cluster["workerGroupSpecs"]:
        worker = group["template"]["spec"]
        assert {volume["name"] for volume in worker["volumes"]} == {"shared", "scratch"}
        assert [variable["name"] for variable in worker["containers"][0]["env"]] == [
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
        ]


def test_spot_machines_come_and_go():
    groups = {group["groupName"]: group for group in named("RayCluster")["spec"]["workerGroupSpecs"]}
    assert (groups["spot"]["minReplicas"], groups["steady"]["minReplicas"]) == (0, 1)
    assert groups["spot"]["maxReplicas"] > groups["steady"]["maxReplicas"]
    assert groups["spot"]["template"]["spec"]["tolerations"]
    assert named("RayCluster")["spec"]["enableInTreeAutoscaling"] is True


def test_the_recipe_is_one_and_means_the_same_everywhere():
    recipe = parse_recipe(yaml.safe_load(named("ConfigMap")["data"]["recipe.yaml"]))
    for place in (recipe.store, recipe.data.source, recipe.routing.key_file):
        assert place.startswith(("/shared/", "/var/run/sisa/keys/"))


def test_every_command_is_understood_and_attaches():
    seen = set()
    for name, words in commands():
        if words[:3] == ["python", "-m", jobwords.MODULE]:
            inner = words[words.index("--") + 1 :]
            assert parsed(inner)["address"] == "auto", name
        else:
            assert words[0] == "sisa"
            inner = words[1:]
            asked = parsed(inner)
            if inner[0] == "submit":
                assert asked["address"].startswith("http")
                jobwords.job_words(list(asked["words"]), needs=list(asked["needs"]), as_json=False)
        seen.add(inner[0])
    assert seen == {"train", "repair", "submit", "serve"}


def test_the_versions_agree():
    import ray

    assert named("RayCluster")["spec"]["rayVersion"] == ray.__version__
