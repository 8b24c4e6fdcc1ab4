"""How much code a run of scripts/train.py goes through: lines of every module that it imports, by room.

  python benchmarks/path_of_train.py

Lines of code: those with a token that is neither comment nor docstring. Needs no device.
"""

from __future__ import annotations

import ast
import runpy
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_CODE = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING")


def lines_of_code(path: Path) -> int:
    """Lines with code on them."""
    documented = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented |= {*range(node.lineno, node.end_lineno + 1)}
    lines = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if tokenize.tok_name[token.type] not in NO_CODE:
                lines |= {*range(token.start[0], token.end[0] + 1)}
    return len(lines - documented)


def main() -> None:
    script = ROOT / "scripts" / "train.py"
    runpy.run_path(str(script), run_name="imported")
    rooms = Counter({"scripts/train.py": lines_of_code(script)})
    for name, module in sorted(sys.modules.items()):
        if name.startswith("llm_jax.") and module.__file__:
            rooms[name.split(".")[1]] += lines_of_code(Path(module.__file__))
    for room, count in rooms.items():
        print(f"{room:<18} {count:>5}")
    print(f"{'together':<18} {rooms.total():>5}")


if __name__ == "__main__":
    main()
