#!/usr/bin/env bash
# Compare tasks, networks or methods with the recipe of scripts/demo.sh, scored by k-NN. Finished runs are not repeated.
#   bash scripts/compare.sh tasks       views, and views and regions: 4 epochs, SEEDS="0 1 2"
#   bash scripts/compare.sh networks    every architecture on both tasks: 2 epochs, SEEDS=0
#   bash scripts/compare.sh methods     EsViT on both tasks (Swin), DINO (ViT) and UDI (ViT): 4 epochs, SEEDS=0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=()
train() { # FOLDER EPOCHS SEED SCRIPT; the script's other settings come from the environment
    local log=$1/log.txt
    [ ! -f "$log" ] || [ "$(wc -l <"$log")" -le "$2" ] ||
        { echo "compare.sh: error: $log is from a run of more than $2 epochs; move its directory away" >&2; exit 2; }
    RUN=$1 EPOCHS=$2 SEED=$3 TRAIN_ONLY=1 bash "$4"
    runs+=("$1")
}
views() { # NAME ARCH YAML EPOCHS SEED
    REGIONS=False ARCH=$2 CFG=experiments/demo/$3.yaml train ".demo/$1-views" "$4" "$5" scripts/demo.sh
}
both() { # NAME ARCH YAML EPOCHS SEED: once for views, once for views and regions
    views "$@"
    REGIONS=True ARCH=$2 CFG=experiments/demo/$3.yaml train ".demo/$1" "$4" "$5" scripts/demo.sh
}
case "${1:-}" in
tasks)
    for seed in ${SEEDS:-0 1 2}; do both "seed$seed" swin swin_micro 4 "$seed"; done
    ;;
networks)
    for seed in ${SEEDS:-0}; do
        for network in "swin swin_micro" "vil vil_micro" "cvt cvt_micro" "vit vit_micro" "resnet18 resnet_micro"; do
            read -r arch yaml <<<"$network"
            both "$arch-seed$seed" "$arch" "$yaml" 2 "$seed"
        done
    done
    ;;
methods)
    for seed in ${SEEDS:-0}; do
        both "seed$seed" swin swin_micro 4 "$seed"
        views "vit4-seed$seed" vit vit_micro 4 "$seed"
        train ".demo/udi4-seed$seed" 4 "$seed" scripts/demo_udi.sh
    done
    ;;
*)
    echo "compare.sh: error: '${1:-}' is not tasks, networks or methods; usage: bash scripts/compare.sh tasks|networks|methods" >&2
    exit 2
    ;;
esac
.venv/bin/python - "${runs[@]}" <<'END'
import json, pathlib, sys
for folder in map(pathlib.Path, sys.argv[1:]):
    losses = [json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]
    scores = json.loads((folder / "results" / "knn.json").read_text())["scores"]
    print(f"{folder.name:20} {len(losses)} epochs, loss {losses[0]:.2f} -> {losses[-1]:.2f}", end="")
    for k in ("1-NN", "20-NN"):
        print(f"  {k} {scores[f'network, {k}']['top1']:.1f} (untrained {scores[f'untrained network, {k}']['top1']:.1f})", end="")
    print()
END
