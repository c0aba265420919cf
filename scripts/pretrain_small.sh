#!/usr/bin/env bash
# Pre-train a small network on some hundred to some ten thousand images, on a CPU or on GPUs.
#   bash scripts/pretrain_small.sh NETWORK IMAGES OUT [flags of main_esvit.py]
#   bash scripts/pretrain_small.sh cvt_32 thumbnails/train /runs/thumbnails
#   PASSES=240000 bash scripts/pretrain_small.sh swin_64 photos /runs/photos              three times as long
# NETWORK is a yaml of experiments/small/; choose it by the size of the images: 32, 64 or 128 pixels. The epochs follow from the
# number of images, so that every run sees PASSES images and takes about as long; EPOCHS=N sets them instead. Trailing flags
# override those set here. PROCESSES is the number of GPUs, or without one of cores, 4 at most.
# docs/small_data.md compares these settings with others.
USAGE="NETWORK IMAGES OUT [flags of main_esvit.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
CFG=$ROOT/experiments/small/$NETWORK.yaml
[ -f "$CFG" ] || usage "NETWORK=$NETWORK is not one of $(cd "$ROOT/experiments/small" && basename -s .yaml -- *.yaml | xargs)"

describe='
import os, sys
import torch
from data.datasets import build_dataset
from utils import UsageError
try:
    images = len(build_dataset(sys.argv[1], "train", lambda image: image))
except UsageError as error:
    sys.exit(f"pretrain_small.sh: error: {error}")
print(images, torch.cuda.device_count(), 4 if os.cpu_count() >= 4 else min(2, os.cpu_count()))
'
read -r COUNT DEVICES CORES < <(PYTHONPATH=$ROOT "$PYTHON" -c "$describe" "$IMAGES") || exit 2

PIXELS=${NETWORK##*_} BATCH=64
PASSES=${PASSES:-$((PIXELS > 32 ? 80000 : 250000))}
numbers PASSES
FITTING=$(((PASSES + COUNT / 2) / COUNT))
EPOCHS=${EPOCHS:-$((FITTING > 1 ? FITTING : 1))}
if [ "$DEVICES" -eq 0 ]; then # a thread and its own images for each process
    export OMP_NUM_THREADS=1
    set -- --num_workers 0
else
    set --
fi
GPUS=${PROCESSES:-$((DEVICES > 0 ? DEVICES : CORES))}
numbers EPOCHS GPUS
PER_GPU=$((BATCH / GPUS))
split_batch
launch main_esvit.py --arch "${NETWORK%_*}" --cfg "$CFG" --data_path "$IMAGES" --output_dir "$OUT" --patch_size $((PIXELS / 8)) "$@" \
    --use_dense_prediction True --batch_size_per_gpu "$PER_GPU" --epochs "$EPOCHS" --warmup_epochs $((EPOCHS / 20)) \
    --lr 0.004 --weight_decay_end 0.04 --momentum_teacher 0.992 --freeze_last_layer 0 --koleo_weight 0.3 \
    --out_dim 1024 --head_hidden_dim 512 --head_bottleneck_dim 128 \
    --aug-opt small_aug --local_crops_number 4 --local_crops_size $((PIXELS / 2)) --local_crops_scale 0.1 0.5
