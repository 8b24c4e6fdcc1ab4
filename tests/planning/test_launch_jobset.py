"""The JobSet against its schema."""

import json
import re
import shlex

import pytest
import yaml
from launch_jobs import GOLDEN, JOBS, QUOTED, emitted

from llm_jax.planning import launch_jobset


def problems(value, schema, definitions, path="$"):
    """Where a value departs from a JSON schema, of which as much is read as ours needs."""
    schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return [f"{path} is no {kind}"]
    found = [] if value in schema.get("enum", [value]) else [f"{path} is {value!r}"]
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{path} is {value!r}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{path} is {value}")
    found += [f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value]
    for name, part in value.items() if isinstance(value, dict) else ():
        inner = schema.get("properties", {}).get(name) or schema["additionalProperties"]
        found += (
            problems(part, inner, definitions, f"{path}.{name}") if inner else [f"{path}.{name}: unknown"]
        )
    for i, part in enumerate(value if isinstance(value, list) else ()):
        found += problems(part, schema["items"], definitions, f"{path}[{i}]")
    return found


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset_sweep.yaml"])
def test_jobset_keeps_to_its_schema(name):
    schema = json.loads((GOLDEN / "jobset.schema.json").read_text())
    manifests = list(yaml.safe_load_all(emitted(name)))
    assert len(manifests) == (JOBS[name][1].points or 1)
    for manifest in manifests:
        assert problems(manifest, schema, schema["definitions"]) == []
        misspelt = {**manifest, "spec": {**manifest["spec"], "replicatedJob": []}}
        assert problems(misspelt, schema, schema["definitions"]) == ["$.spec.replicatedJob: unknown"]


def test_jobset_has_a_pod_a_host_and_all_chips():
    job = JOBS["jobset.yaml"][1]
    spec = yaml.safe_load(emitted("jobset.yaml"))["spec"]
    (slices,) = spec["replicatedJobs"]
    child = slices["template"]["spec"]
    (container,) = child["template"]["spec"]["containers"]
    chips = slices["replicas"] * child["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == job.slices * job.topology.chips and child["parallelism"] == child["completions"]
    assert spec["suspend"] is True  # Kueue admits it
    assert container["command"][:2] == ["bash", "-c"] and shlex.quote(QUOTED) in container["command"][2]


def test_points_are_jobsets_with_an_index():
    manifests = list(yaml.safe_load_all(emitted("jobset_sweep.yaml")))
    assert [m["metadata"]["name"] for m in manifests] == ["rates-0", "rates-1"]
    assert [re.findall(r"--index=(\d)", yaml.dump(m)) for m in manifests] == [["0", "0"], ["1", "1"]]


def expanded(text):
    """What Kubernetes makes of a command: k8s.io/kubernetes third_party/forked/golang/expansion."""
    known = {"HOME": "EXPANDED"}
    return re.sub(
        r"\$(?:(\$)|\((\w+)\))",
        lambda m: "$" if m[1] else known.get(m[2], m[0]),
        text,
    )


@pytest.mark.parametrize("value", ["$HOME", "$(HOME)", "$$", "$$(HOME)", "$$$x", "a$", "${HOME}"])
def test_kubernetes_leaves_dollars_alone(value):
    assert expanded(launch_jobset.literal(value)) == value
