#!/usr/bin/env bash
# Sourced by the recipes after they set USAGE: parse positional arguments and launch a script on GPUS processes.
# Paths are relative to the working directory of the recipe.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}

usage() {
    local recipe
    recipe=$(basename "$0")
    echo "$recipe: error: $1; usage: bash scripts/$recipe $USAGE" >&2
    exit 2
}

# take "$@": assign the positional arguments to the names in USAGE; `launch` appends the remaining flags.
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

# numbers NAME ...: require positive integers in the variables.
numbers() {
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || usage "$name=${!name} is not a positive integer"
    done
}

# Set GPUS, unless it is set, to the number of GPUs of this machine, or 1 without a GPU.
count_gpus() {
    GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    numbers GPUS
}

# Set ACCUM to the number of micro-batches of GPUS x PER_GPU images in BATCH.
split_batch() {
    numbers PER_GPU BATCH
    [ $((BATCH % (GPUS * PER_GPU))) -eq 0 ] ||
        usage "BATCH=$BATCH is not a multiple of GPUS x PER_GPU = $((GPUS * PER_GPU)); change one of them"
    ACCUM=$((BATCH / (GPUS * PER_GPU)))
}

# launch SCRIPT.py FLAG ...: start the script with the user's flags last, so that they override. A single process needs no
# launcher; its usage errors are then one line with exit code 2.
launch() {
    local script=$ROOT/$1
    shift
    set -- "$script" "$@" ${FLAGS[@]+"${FLAGS[@]}"}
    [ "$GPUS" -gt 1 ] || exec "$PYTHON" "$@"
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$@"
}
