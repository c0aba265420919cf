#!/usr/bin/env bash
# Views against views and regions at the same budget: the demo's recipe with both losses, scored by k-NN.
#   bash scripts/compare_tasks.sh            seeds 0 1 2
#   SEEDS="0" bash scripts/compare_tasks.sh
# Needs what scripts/demo.sh set up; a finished run is not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=.venv/bin/python
[ -d .demo/data ] || { echo "compare_tasks.sh: error: .demo/data is missing; run bash scripts/demo.sh first" >&2; exit 2; }
for seed in ${SEEDS:-0 1 2}; do
    for regions in False True; do
        REGIONS=$regions SEED=$seed TRAIN_ONLY=1 bash scripts/demo.sh
    done
done
"$PYTHON" - <<'END'
import json, pathlib
for folder in sorted(pathlib.Path(".demo").glob("seed*")):
    score = json.loads((folder / "knn.json").read_text())["network"]
    print(f"{folder.name}: 1-NN {score['1']['top1']:.1f}, 20-NN {score['20']['top1']:.1f}")
END
