#!/usr/bin/env bash
# Linear segmentation of ADE20K, as the linear setup of DINOv2 but on all four stages. EsViT published no result for this.
#   bash scripts/eval_segmentation.sh ARCH ADE20K CHECKPOINT OUT [flags of eval_segmentation.py]
#   GPUS=4 bash scripts/eval_segmentation.sh swin_tiny /data/ADEChallengeData2016 /runs/swin_tiny/checkpoint.pth /runs/swin_tiny/ade20k
#   bash scripts/eval_segmentation.sh vit_base ... --stages 1                                         ViTs have one stage
#   bash scripts/eval_segmentation.sh swin_tiny ... --lr 0.0003 0.001 0.003                           a classifier for each rate
# Images with a shorter side of 512 pixels, scaled by 0.5 to 2 and cropped to 512; windows of 512 pixels with a stride of 341 in validation.
# 32 epochs with 16 images a step (BATCH) on any number of GPUS, about 40,000 steps. OUT gets results/segmentation.json, predictions.png,
# log.txt and segmentation.pth; the same command resumes a run that was killed. Flags at the end override those here.
USAGE="ARCH ADE20K CHECKPOINT OUT [flags of eval_segmentation.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
BATCH=${BATCH:-16}
count_gpus
numbers BATCH
[ $((BATCH % GPUS)) -eq 0 ] || usage "BATCH=$BATCH is no multiple of GPUS=$GPUS; change one of them"
launch eval_segmentation.py --arch "$ARCH" --data_path "$ADE20K" --pretrained_weights "$CHECKPOINT" --output_dir "$OUT" \
    --checkpoint_key teacher --stages 1 2 3 4 --classes 150 --reduce_zero_label --image_size 512 --window 512 --stride 341 \
    --epochs 32 --lr 0.001 --batch_size_per_gpu $((BATCH / GPUS))
