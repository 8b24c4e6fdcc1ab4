"""A plan before anything runs: what it says is what the compiler makes."""

import dataclasses
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
from jax.experimental import topologies

from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig
from llm_jax.planning import collectives, compiled, gpu_target, plan, residuals, search
from llm_jax.planning.collectives import Collective
from llm_jax.planning.machine import Machine
from llm_jax.training import experiment

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "data.text": "python:docs",
    "data.sequence_length": "64",
    "global_batch_size": "16",
    "evaluation.batch_size": "16",
    "model.num_layers": "3",
    "model.num_heads": "4",
    "model.model_dim": "64",
    "model.mlp_dim": "256",
    "model.remat": "True",
    "model.tied_head": "False",
}
EIGHT = Machine.parse("cpu:8")


def complete(changes=None, **mesh):
    config = experiment.override(experiment.default_config(), SHAPE | (changes or {}))
    found = experiment.complete(experiment.resolve(config, find_text=False), 512)
    return dataclasses.replace(found, mesh=MeshConfig(**mesh))


EXPERTS = {"model.num_experts": "4", "model.mlp_dim": "64"}
FOUR = {"model.num_layers": "4"}
GOLDEN = {
    "ddp": ({}, {"recipe": "ddp"}),
    "fsdp": ({}, {"recipe": "fsdp"}),
    "hsdp": ({}, {"recipe": "hsdp", "fsdp": 4}),
    "zero 1": ({}, {"data": 2, "fsdp": 4, "zero": 1}),
    "zero 2": ({"accumulation": "2"}, {"data": 2, "fsdp": 4, "zero": 2}),
    "tp": ({}, {"recipe": "tp", "tensor": 4, "data": 2}),
    "fsdp_tp": ({}, {"recipe": "fsdp_tp", "tensor": 2}),
    "long_context": ({}, {"recipe": "long_context", "context": 2}),
    "moe": (EXPERTS, {"recipe": "moe"}),
    "moe, capacity, tensor": (
        EXPERTS | {"model.capacity_factor": "1.25"},
        {"expert": 2, "tensor": 2, "fsdp": 2},
    ),
    "pipeline": (FOUR, {"recipe": "pipeline"}),
    "pipeline, fsdp, two rounds": (FOUR, {"stage": 2, "stage_rounds": 2, "fsdp": 4}),
    "multislice": ({}, {"recipe": "multislice"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_the_compiler_agrees(name, monkeypatch):
    """Kinds, bytes and numbers of messages along every axis, and memory. XLA's CPU compiler makes a
    reduce-scatter an all-reduce of the whole, which sends twice as much, and several all-reduces one."""
    changes, mesh = GOLDEN[name]
    listed, read = [], collectives.read
    monkeypatch.setattr(collectives, "read", lambda *args: listed.extend(read(*args)) or listed)
    found = compiled.compile_plan(plan.make(complete(changes, **mesh), EIGHT))
    (needed, wanted), (made, messages) = totals(found.needed), totals(listed)
    for key in needed | made:
        slack = 0.11 * needed[key] + 12_000  # gains, norms and losses
        assert abs(made[key] - needed[key]) <= slack, (key, made[key], needed[key])
        if key[0] != "all-reduce":
            # More: gains, norms, segments. Fewer: what the last layer of a recomputed run ends in.
            assert 0.95 * wanted[key] <= messages[key] <= wanted[key] + 8, key
    parts = found.compiled["memory"]
    at_rest = found.at_rest + found.memory["batch"]
    assert parts["arguments"] == pytest.approx(at_rest, rel=0.1)
    assert found.memory["total"] == pytest.approx(parts["total"], rel=0.4)


@pytest.mark.slow
def test_messages_are_counted_by_step():
    """However many steps a dispatch has."""
    one, two = (
        compiled.compile_plan(plan.make(complete({"steps_per_dispatch": steps}, data=8), EIGHT))
        for steps in ("1", "2")
    )
    (key, sent), *_ = one.compiled["collectives"].items()
    assert key == ("all-reduce", ("data",)) and sent > 1e4
    assert two.compiled["collectives"][key] == pytest.approx(sent, rel=0.02)


@pytest.mark.slow
def test_tables_cut_twice_are_gathered_once_a_step():
    """It aborted the process."""
    found = compiled.compile_plan(plan.make(complete(data=2, fsdp=2, tensor=2, zero=1), EIGHT))
    least = collectives.by_kind(found.needed)
    gathers = [
        sum(sent for (kind, _), sent in one.items() if kind == "all-gather")
        for one in (least, found.compiled["collectives"])
    ]
    assert gathers[1] <= 1.02 * gathers[0]


def totals(listed):
    """Bytes and numbers of messages by kind and axes, a reduce-scatter as an all-reduce."""
    sent, messages = Counter(), Counter()
    for one in listed:
        scattering = one.kind == "reduce-scatter"
        key = ("all-reduce" if scattering else one.kind, one.axes)
        sent[key] += one.sent * (2 if scattering else 1) * (one.group > 1)
        messages[key] += one.times
    return sent, messages


def test_groups_of_any_spelling():
    mesh = {"data": 2, "fsdp": 4}
    lines = {
        "replica_groups={{0,1,2,3},{4,5,6,7}}": (("fsdp",), 4),
        "replica_groups=[4,2]<=[2,4]T(1,0)": (("data",), 2),
        "replica_groups=[1,8]<=[8]": (("data", "fsdp"), 8),
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": (("fsdp",), 4),
        "replica_groups=mesh['data'=2,'fsdp'=4] {'data'}": (("data",), 2),
        "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": (("fsdp",), 4),
    }
    for groups, (axes, size) in lines.items():
        gather = f"  %x = f32[16]{{0}} all-gather(%p), {groups}, dimensions={{0}}"
        program = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{gather}\n}}\n"
        assert collectives.read(program, mesh) == [Collective("all-gather", axes, 64.0, 1, size)]


def test_a_gpu_s_reduce_scatters_are_of_their_operands():
    """Whole in the first half of an asynchronous one, shards in one at once."""
    groups = "replica_groups={{0,1}}, dimensions={0}, to_apply=%add"
    parts = "(bf16[4]{0}, bf16[4]{0})"
    for line in (
        f"%s = ((bf16[8]{{0}}, bf16[8]{{0}}), {parts}) reduce-scatter-start(%p, %q), {groups}",
        f"%s = {parts} reduce-scatter(%p, %q), {groups}",
    ):
        program = f"ENTRY %main (p: bf16[8]) -> bf16[4] {{\n  {line}\n}}\n"
        assert collectives.read(program, {"fsdp": 2})[0].sent == 16


def test_loops_and_fusions_are_counted():
    """Seven times in a loop; and an all-reduce in a fusion that is a reduce-scatter."""
    program = """%all-reduce-scatter.1 (p: bf16[8]) -> bf16[4] {
  %y = bf16[8]{0} all-reduce(%p), replica_groups={{0,1}}
}
%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %f = bf16[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
%condition (p: (s32[], bf16[8])) -> pred[] {
  %constant.1 = s32[] constant(7)
}
ENTRY %main (p: bf16[8]) -> bf16[8] {
  %w = (s32[], bf16[8]) while(%t), condition=%condition, body=%body
}
"""
    found = collectives.read(program, {"data": 2})
    assert found == [Collective("reduce-scatter", ("data",), 16.0, 7, 2)]
    assert found[0].sent == 7 * 8


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v5p:4x4", 1, "not offered"),
        ("v9:2x2", 1, "not known"),
        ("cpu:many", 1, "number of devices"),
        ("cpu:8", 2, "number of devices"),
    ],
)
def test_machines_that_are_none(topology, slices, message):
    with pytest.raises(UserError, match=message):
        Machine.parse(topology, slices)


def test_bandwidth_of_a_torus():
    pod = Machine.parse("v5p:4x4x8", 2)
    assert pod.devices == 256 and pod.chip.memory == 95e9
    assert pod.bandwidth(("fsdp",), 8, 8) == 200e9
    assert pod.bandwidth(("fsdp",), 32, 32) == 400e9
    assert pod.bandwidth(("data", "fsdp"), 128, 128) == 600e9
    assert pod.bandwidth(("replica",), 2, 128) == 6.2e9
    gpus = Machine.parse("h100:8x2")
    assert gpus.bandwidth(("fsdp",), 8, 8) == 450e9
    assert gpus.bandwidth(("data",), 2, 16) == 50e9  # from node to node


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:8", "pip install 'jax\\[cuda13\\]'"),
        ("a100:8", "H100, H200 and GH200"),
        ("h100-pcie:1", "SXM"),
    ],
)
def test_gpus_that_cannot_be_compiled_for(topology, message, monkeypatch):
    def absent(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=message):
        compiled.find_devices(Machine.parse(topology))


def test_what_xla_must_know_of_a_gpu():
    found = {name: gpu_target.target(Machine.parse(f"{name}:1")) for name in ("h100", "h200")}
    assert "memory_bandwidth: 3350000000000" in found["h100"]
    assert f"device_memory_size: {3 * 141 * 10**9 // 4}" in found["h200"]
    assert all(text.count("{") == text.count("}") == 4 for text in found.values())


def test_a_gpu_s_compiler_refuses_nothing():
    """So that what it made is compared with what jax takes of a GPU."""
    made = plan.make(complete(), Machine.parse("h200:1"))
    for total, fits in ((0.7 * 141e9, True), (0.8 * 141e9, False)):
        said = {"memory": {"total": total}, "out_of_memory": None}
        assert dataclasses.replace(made, compiled=said).fits is fits


def test_what_does_not_fit_says_what_to_do(capsys):
    """8B copied to 16 chips of 16 GB: its parameters and moments alone are 96 GB."""
    mesh = ("--config.mesh.data=16", "--config.mesh.fsdp=1", "--config.global_batch_size=16")
    code, said = call_script(capsys, "--topology=v5e:4x4", *mesh)
    assert code == 3 and "IT DOES NOT FIT" in said and "optimizer" in said and "mesh.fsdp" in said


def call_script(capsys, *flags):
    argv = ["plan.py", f"--config={ROOT}/configs/llama_8b.py", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / "plan.py"), run_name="__main__")
    return ended.value.code, capsys.readouterr().out


def test_the_script_on_a_pod(capsys, tmp_path):
    """Shapes of the published 8B model; what is written is what scripts read."""
    file = tmp_path / "plan.json"
    mesh = ("--config.mesh.data=4", "--config.mesh.fsdp=32", "--config.global_batch_size=128")
    code, said = call_script(
        capsys, "--topology=v5p:4x4x8", *mesh, f"--json={file}", "--explain", "--price=4"
    )
    assert code == 0 and "dollars" in said and "blocks/attention/query" in said
    found = json.loads(file.read_text())
    assert found["parameters"]["total"] == 8_030_261_248
    # 6 N D without the look-up, and attention: 12 layers length width by the mask's half.
    weights = found["parameters"]["total"] - found["parameters"]["embedding"] - 266_240
    assert found["flops_per_token"]["full_attention"] == 6 * weights + 12 * 32 * 4096 * 4096
    memory = found["memory_per_device_bytes"]
    assert memory["parameters"] == pytest.approx(8_030_261_248 * 4 / 32, rel=2e-3)
    assert memory["total"] == pytest.approx(sum(memory.values()) - memory["total"])
    assert found["fits"] and 0.5 < found["mfu_bound"] < 0.8
    sent = {(row["kind"], row["axis"]): row["minimum_bytes"] for row in found["collectives"]}
    layers = 2 * (weights - found["parameters"]["head"])  # bfloat16
    tables = 2 * (found["parameters"]["head"] + found["parameters"]["embedding"])
    assert sent["all-gather", "fsdp"] == pytest.approx((2 * layers + tables) * 31 / 32)
    assert sent["reduce-scatter", "fsdp"] == pytest.approx((layers + tables) * 31 / 32)
    assert sent["all-reduce", "data"] == pytest.approx((layers + tables) / 32 * 2 * 3 / 4)


def test_kernels_of_others_are_counted():
    attention = '%f = (bf16[8]) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax"'
    product = '%c = bf16[8] custom-call(%f, %w), custom_call_target="__cublas$lt$matmul", metadata={}'
    text = "\n".join([attention, "%a = f32[8] add(%b, %c)", product, attention])
    assert compiled.kernels(text) == {"__cublas$lt$matmul": 1, "__cudnn$fmhaSoftmax": 2}


@pytest.mark.slow
def test_search_ranks_what_fits():
    """Whatever mesh the config has, also one whose other settings are of a pipeline alone."""
    rows = {"global_batch_size": "4", "evaluation.batch_size": "4"}
    e = complete(FOUR | rows, stage=2, stage_parts=4, stage_rounds=2)
    plans = search.search(e, Machine.parse("v5e:2x2"), 4)
    speeds = [one.roofline.tokens_per_second for one in plans]
    assert plans and all(one.fits for one in plans) and speeds == sorted(speeds, reverse=True)
    with pytest.raises(UserError, match="peaks"):
        search.search(e, EIGHT, 1)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_pipeline_keeps_no_weights(rounds):
    """They would be a copy in every tick; what is dealt out to several rounds is one."""
    mesh = {"stage": 2, "stage_rounds": rounds, "fsdp": 2, "data": 2}
    found = plan.make(complete(FOUR | {"model.mlp_dim": "2048"}, **mesh), EIGHT)
    weights = sum(a.bytes for a in found.state["params"])
    assert residuals.kept(found.program, True) < weights * rounds


def test_gathered_weights_are_not_kept():
    """Without recomputation a layer's activations are kept, and not its weights made whole."""
    cut, whole = (plan.make(complete(recipe=name), EIGHT).program for name in ("fsdp", "ddp"))
    assert residuals.kept(cut, remat=False) <= residuals.kept(whole, remat=False)


def test_a_stage_of_zero_that_is_none():
    with pytest.raises(UserError, match=r"mesh\.zero=4"):
        plan.make(complete(zero=4), EIGHT)
