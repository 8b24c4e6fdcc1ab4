"""In which way the PyTorch peer runs: what benchmarks/speed/tune.py tries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """mode: "eager", or one of torch.compile; attention: of torch_peer's BACKENDS, "" = torch's own choice;
    weights: "float32" (under autocast on a GPU) or "bfloat16" copies; parts: micro-batches of a step."""

    mode: str = "default"
    attention: str = ""
    weights: str = "float32"
    parts: int = 1
