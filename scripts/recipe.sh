#!/usr/bin/env bash
# Sourced by the recipes, which have set USAGE: checks of arguments, and the start of a script as GPUS processes.
# Paths are those of the folder that a recipe is started from.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}

usage() {
    local recipe
    recipe=$(basename "$0")
    echo "$recipe: error: $1; usage: bash scripts/$recipe $USAGE" >&2
    exit 2
}

# needs "NAME NAME ..." "$@": an argument that is no flag for every name.
needs() {
    local -a names
    local given=0 word
    read -ra names <<<"$1"
    shift
    for word in "$@"; do
        [[ $word != -* ]] || break
        given=$((given + 1))
    done
    [ "$given" -ge "${#names[@]}" ] || usage "${names[*]} are needed, $given were given"
}

# numbers NAME ...: variables that hold whole numbers above 0.
numbers() {
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || usage "$name=${!name} is not a number above 0"
    done
}

# GPUS: all of this machine unless it is set; one process where there is none.
count_gpus() {
    GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    numbers GPUS
}

# ACCUM: how many micro-batches of PER_GPU images on each of GPUS make BATCH.
split_batch() {
    numbers PER_GPU BATCH
    [ $((BATCH % (GPUS * PER_GPU))) -eq 0 ] ||
        usage "BATCH=$BATCH is no multiple of GPUS x PER_GPU = $((GPUS * PER_GPU)); change one of them"
    ACCUM=$((BATCH / (GPUS * PER_GPU)))
}

# launch SCRIPT.py FLAG ...: one process without a launcher, so that mistakes end with one line and code 2.
launch() {
    local script=$1
    shift
    [ "$GPUS" -gt 1 ] || exec "$PYTHON" "$ROOT/$script" "$@"
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$ROOT/$script" "$@"
}
