#!/usr/bin/env bash
# All that needs a GPU, in one call: attention kernels, the speed table, two steps by kernel, Shakespeare's GPU setting
# at three seeds, and of a larger text the modern preset at 124M.
#   pip install 'jax[cuda13]' -r requirements/benchmarks.txt && benchmarks/gpu.sh tinyshakespeare.txt corpus/
# Results are in benchmarks/results/. What fails is said at the end; the rest goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
text=${1:?the texts: benchmarks/gpu.sh tinyshakespeare.txt corpus/}
corpus=${2:?a text of 30 M tokens or more, as benchmarks/gpu.sh tinyshakespeare.txt corpus/}
python -c 'import jax; assert jax.default_backend() == "gpu", "jax finds no GPU"' || exit
failed=0
attempt() { "$@" || { failed=1; echo "failed: $*" >&2; }; }
attempt python benchmarks/attention_kernels.py
attempt python -m benchmarks.speed.run --rows=124m,1.3b,8b_layers,bert_base --text="$text"
for row in 124m bert_base; do attempt python -m benchmarks.speed.kernels --row="$row" --text="$text"; done
attempt python benchmarks/shakespeare_gpu.py --text="$text"
for part in :tune ""; do
  attempt python scripts/sweep.py --config="configs/sweep_modern_124m.py$part" --config.data.text="$corpus" \
    --workdir="runs/modern_124m${part/:/_}"
done
attempt python -m benchmarks.modern_124m --tuned=runs/modern_124m_tune --sweep=runs/modern_124m
exit $failed
