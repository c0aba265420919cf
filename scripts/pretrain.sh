#!/usr/bin/env bash
# Pre-train on ImageNet with the published 300-epoch recipe and batch size on any number of GPUs.
#   bash scripts/pretrain.sh ARCH IMAGENET OUT [flags of main_esvit.py]
#   GPUS=2 bash scripts/pretrain.sh swin_tiny /data/imagenet /runs/swin_tiny                  batch 512 = 2 x 64 x 4 accumulated
#   GPUS=8 PER_GPU=128 BATCH=1024 bash scripts/pretrain.sh swin_tiny ...                      batch 1024, not accumulated
#   bash scripts/pretrain.sh vil_2262 ... --use_dense_prediction False                        views only
# --lr (0.0005) is for 256 images; the optimizer uses lr x BATCH / 256: 0.0005 for a batch of 256, 0.001 for 512, 0.002 for 1024.
# Accumulated micro-batches count as one batch for the step, the schedules and the center; BatchNorm, where a network has it, sees
# one micro-batch at a time. Trailing flags override those set here.
USAGE="ARCH IMAGENET OUT [flags of main_esvit.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
PER_GPU=${PER_GPU:-64} BATCH=${BATCH:-512}
count_gpus
split_batch
launch main_esvit.py --arch "$ARCH" --data_path "$IMAGENET" --output_dir "$OUT" \
    --use_dense_prediction True --batch_size_per_gpu "$PER_GPU" --accum_iter "$ACCUM" \
    --epochs 300 --warmup_epochs 10 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --norm_last_layer False \
    --local_crops_scale 0.05 0.4
