#!/usr/bin/env bash
# Fine-tune on ImageNet with the recipe of DeiT and the layer-wise learning rates of BEiT. There is no published result for it.
#   bash scripts/eval_finetune.sh ARCH IMAGENET CHECKPOINT OUT [flags of eval_finetune.py]
#   GPUS=2 bash scripts/eval_finetune.sh swin_tiny /data/imagenet /runs/swin_tiny/checkpoint.pth /runs/swin_tiny/finetuned
# 100 epochs with 1024 images a step (BATCH): PER_GPU (64) images on each of GPUS, gradients accumulated to BATCH. The learning rate is
# 0.0005 for 256 images, thus 0.002. OUT gets results/finetune.json, log.txt, best.pth and checkpoint.pth; the same command resumes a
# run that was killed. Flags at the end override those here.
USAGE="ARCH IMAGENET CHECKPOINT OUT [flags of eval_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
PER_GPU=${PER_GPU:-64} BATCH=${BATCH:-1024}
count_gpus
split_batch
launch eval_finetune.py --arch "$ARCH" --data_path "$IMAGENET" --pretrained_weights "$CHECKPOINT" --output_dir "$OUT" \
    --batch_size_per_gpu "$PER_GPU" --accum_iter "$ACCUM" --epochs 100 --warmup_epochs 5 --lr 0.0005 --layer_decay 0.75
