#!/usr/bin/env bash
# Comparisons at the demo's budget: its recipe (scripts/demo.sh), scored by k-NN. A finished run is not run again.
#   bash scripts/compare.sh tasks       views against views and regions: 4 epochs, SEEDS="0 1 2"
#   bash scripts/compare.sh networks    every architecture on both tasks: 2 epochs, SEEDS=0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=()
run() { # NAME ARCH YAML EPOCHS SEED: once for views, once for views and regions
    local folder=.demo/$1 logs
    for logs in "$folder"{,-views}/log.txt; do
        [ ! -f "$logs" ] || [ "$(wc -l <"$logs")" -le "$4" ] ||
            { echo "compare.sh: error: $logs is of a run with other epochs than $4; move its folder away" >&2; exit 2; }
    done
    RUN=$folder-views REGIONS=False ARCH=$2 CFG=experiments/demo/$3.yaml EPOCHS=$4 SEED=$5 TRAIN_ONLY=1 bash scripts/demo.sh
    RUN=$folder REGIONS=True ARCH=$2 CFG=experiments/demo/$3.yaml EPOCHS=$4 SEED=$5 TRAIN_ONLY=1 bash scripts/demo.sh
    runs+=("$folder-views" "$folder")
}
case "${1:-}" in
tasks)
    for seed in ${SEEDS:-0 1 2}; do run "seed$seed" swin swin_micro 4 "$seed"; done
    ;;
networks)
    for seed in ${SEEDS:-0}; do
        for network in "swin swin_micro" "vil vil_micro" "cvt cvt_micro" "vit vit_micro" "resnet18 resnet_micro"; do
            read -r arch yaml <<<"$network"
            run "$arch-seed$seed" "$arch" "$yaml" 2 "$seed"
        done
    done
    ;;
*)
    echo "compare.sh: error: '${1:-}' is not tasks or networks; usage: bash scripts/compare.sh tasks|networks" >&2
    exit 2
    ;;
esac
.venv/bin/python - "${runs[@]}" <<'END'
import json, pathlib, sys
for folder in map(pathlib.Path, sys.argv[1:]):
    losses = [json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]
    newest = max(folder.glob("results*.json"), key=lambda path: path.stat().st_mtime)
    scores = json.loads(newest.read_text())["scores"]
    trained, untrained = scores["network"], scores["untrained network"]
    print(f"{folder.name:20} {len(losses)} epochs, loss {losses[0]:.2f} -> {losses[-1]:.2f}  1-NN {trained['1']['top1']:.1f} (untrained "
          f"{untrained['1']['top1']:.1f})  20-NN {trained['20']['top1']:.1f} ({untrained['20']['top1']:.1f})")
END
