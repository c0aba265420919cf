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

# take "$@": the first arguments, none of them a flag, by their names in USAGE; `launch` adds the others.
take() {
    local -a names
    local name given=0
    read -ra names <<<"${USAGE%%[*}"
    for name in "${names[@]}"; do
        [ $# -gt 0 ] && [[ $1 != -* ]] || usage "${names[*]} are needed, $given were given"
        printf -v "$name" %s "$1"
        shift
        given=$((given + 1))
    done
    FLAGS=("$@")
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

# launch SCRIPT.py FLAG ...: with the user's flags last, so that they win; one process goes without a launcher, so that mistakes end
# with one line and code 2.
launch() {
    local script=$ROOT/$1
    shift
    set -- "$script" "$@" ${FLAGS[@]+"${FLAGS[@]}"}
    [ "$GPUS" -gt 1 ] || exec "$PYTHON" "$@"
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$@"
}
