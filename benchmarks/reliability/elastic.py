"""Other numbers of devices and of processes: a run goes on with the same rows and, nearly, the same losses.

  python -m benchmarks.reliability.elastic

A run on 8 simulated devices is the reference. From its checkpoint others go on: on 4, 2 and 1 devices, and
with 2 and 4 processes, with axes of every kind, also a tensor axis over two processes. Last, one run
changes all of these every 20 steps. Prints the largest relative difference of a loss in the first 20 steps
after the change and of the one at step 100 after it; rows that were not the same would show at once, by more
than 1e-3. Exits 1 unless all are within their bounds. Writes benchmarks/results/reliability_elastic.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.reliability import harness
from llm_jax.training import metrics

ROOT = Path(__file__).resolve().parents[2]
CHANGE, STEPS = 20, 120
CASES = {  # optimiser: (processes, devices of each, mesh)
    "adamw": [
        (1, 8, "fsdp=2,tensor=2"),
        (1, 4, ""),
        (1, 4, "tensor=2"),
        (1, 2, ""),
        (1, 2, "fsdp=2"),
        (1, 1, ""),
        (2, 4, ""),
        (2, 2, "fsdp=2,tensor=2"),
        (2, 1, "tensor=2"),
        (4, 2, "fsdp=4"),
        (4, 1, "tensor=4"),
    ],
    "muon": [(1, 4, "fsdp=2"), (1, 1, ""), (2, 2, "tensor=2"), (4, 1, "")],
}
CHAIN = [
    *((4, 2, "fsdp=4"), (1, 1, ""), (2, 4, "fsdp=2,tensor=2"), (1, 4, "tensor=4"), (4, 1, "")),
]
BOUNDS = {"adamw": 1e-5, "muon": 1e-4}  # of the first 20 steps; 1e-4 at step 100


@dataclass(frozen=True)
class Setting:
    """One way to run: the command line of each of its processes."""

    processes: int
    devices: int
    mesh: str

    def run(self, workdir: Path, text: Path, optimizer: str, steps: int) -> str:
        """Trains; gives what process 0 printed. A process that fails ends the benchmark."""
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        axes = [f"--config.mesh.{axis}" for axis in self.mesh.split(",") if axis]
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={ROOT}/configs/tiny_clm.py"]
        flags = {
            "data.text": text,
            "data.validation": "position",
            "model.num_heads": 4,
            "optimizer": optimizer,
            "schedule": "constant",  # so that more steps can be asked for and nothing before changes
            "schedule.warmup_steps": 10,
            "steps": steps,
            "evaluation.every": CHANGE,
            "checkpoint.every": CHANGE,
            "mesh.cpu_devices": self.devices,
        }
        command += [
            f"--workdir={workdir}",
            "--extend",
            *axes,
            *(f"--config.{k}={v}" for k, v in flags.items()),
        ]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        processes = []
        for i in range(self.processes):
            place = [f"--coordinator=localhost:{port}", f"--processes={self.processes}", f"--process={i}"]
            alone = self.processes == 1
            started = subprocess.Popen(
                [*command, *([] if alone else place)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(started)
        errors = [process.communicate()[1] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("\n".join(errors))
        return errors[0]


def losses(workdir: Path) -> list[float]:
    """By step, from 1."""
    return [r["loss"] for r in metrics.read(workdir / "metrics") if r["kind"] == "train"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as root:
        harness.write_texts(Path(root), seed=0)
        text = Path(root, "a.jsonl")
        for optimizer, cases in CASES.items():
            reference = Path(root, optimizer)
            Setting(1, 8, "").run(reference, text, optimizer, CHANGE)
            saved = Path(root, f"{optimizer}.saved")
            shutil.copytree(reference, saved)
            Setting(1, 8, "").run(reference, text, optimizer, STEPS)
            for processes, devices, mesh in cases:
                workdir = Path(root, f"{optimizer}.{processes}.{devices}.{mesh}")
                shutil.copytree(saved, workdir)
                said = Setting(processes, devices, mesh).run(workdir, text, optimizer, STEPS)
                results.append(compare(reference, workdir, optimizer, said))
                results[-1] |= {
                    "processes": processes,
                    "devices": devices * processes,
                    "mesh": mesh or "data",
                }
                print(json.dumps(results[-1]))
                shutil.rmtree(workdir)
        workdir = Path(root, "chain")
        shutil.copytree(Path(root, "adamw.saved"), workdir)
        for number, setting in enumerate(CHAIN, start=1):
            said = Setting(*setting).run(workdir, text, "adamw", CHANGE + 20 * number)
        results.append(compare(Path(root, "adamw"), workdir, "adamw", said) | {"chain": CHAIN})
        print(json.dumps(results[-1]))
    held = sum(result["held"] for result in results)
    print(f"{held} of {len(results)} within their bounds")
    if held < len(results):
        raise SystemExit(1)
    record.write("reliability_elastic", record.environment("jax", "flax", "optax") | {"results": results})


def compare(reference: Path, workdir: Path, optimizer: str, said: str) -> dict:
    """Relative differences of the losses after the change."""
    one, other = losses(reference), losses(workdir)
    apart = [abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)]
    first, late = max(apart[CHANGE : CHANGE + 20]), apart[CHANGE + 99]
    return {
        "optimizer": optimizer,
        "first 20 steps": first,
        "at step 100": late,
        "said what it costs": "no longer the same bits" in said,
        "held": len(one) == STEPS and first <= BOUNDS[optimizer] and late <= 1e-4,
    }


if __name__ == "__main__":
    main()
