#!/usr/bin/env bash
# Fine-tune a ViT on ImageNet with the recipe of BEiT, as UDI (Su and Ji, ECCV 2024).
#   bash scripts/eval_finetune_beit.sh ARCH IMAGENET CHECKPOINT OUT [flags of eval_finetune.py]
#   GPUS=4 PER_GPU=256 bash scripts/eval_finetune_beit.sh deit_small /data/imagenet /runs/udi/checkpoint.pth /runs/udi/finetuned \
#       -- MODEL.SPEC.NUM_CLS_TOKENS 2 MODEL.SPEC.POS_RESIZE scale
# 200 epochs with 1024 images a step (BATCH), learning rate 0.001 for the head, times 0.55 for each block below. Validation images are
# resized bilinearly, as in UDI. BEiT also rescales the initial projections, which has no effect on loaded weights.
# OUT gets results/finetune.json, log.txt, best.pth and checkpoint.pth; the same command resumes a run that was killed. Flags at the
# end override those here.
USAGE="ARCH IMAGENET CHECKPOINT OUT [flags of eval_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
PER_GPU=${PER_GPU:-64} BATCH=${BATCH:-1024}
count_gpus
split_batch
launch eval_finetune.py --arch "$ARCH" --data_path "$IMAGENET" --pretrained_weights "$CHECKPOINT" --output_dir "$OUT" \
    --batch_size_per_gpu "$PER_GPU" --accum_iter "$ACCUM" --epochs 200 --warmup_epochs 20 --lr 0.00025 --min_lr 0.000001 \
    --layer_decay 0.55 --weight_decay 0.05 --clip_grad 0 --drop_path 0.1 --init_scale 0.001 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    --val_interpolation bilinear
