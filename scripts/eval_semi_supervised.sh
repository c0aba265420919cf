#!/usr/bin/env bash
# Fine-tune with the labels of 1 or 10 % of ImageNet, as UDI (Su and Ji, ECCV 2024): keeps the first layer of the projection head.
#   bash scripts/eval_semi_supervised.sh ARCH IMAGENET CHECKPOINT OUT [flags of eval_finetune.py]
#   GPUS=4 PER_GPU=128 bash scripts/eval_semi_supervised.sh deit_small /data/imagenet /runs/udi/checkpoint.pth /runs/udi/1percent \
#       --target_list_path 1percent.txt -- MODEL.SPEC.NUM_CLS_TOKENS 2 MODEL.SPEC.POS_RESIZE scale
# The lists are those of SimCLRv2, one file name a line. 1000 epochs with 512 images a step (BATCH), learning rate 0.000005 for all
# layers. Unlike the published script it keeps no average of the weights (which is never scored there), and the minimum learning rate
# is not above the initial one.
# OUT gets results/finetune.json, log.txt, best.pth and checkpoint.pth; the same command resumes a run that was killed. Flags at the
# end override those here.
USAGE="ARCH IMAGENET CHECKPOINT OUT [flags of eval_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
PER_GPU=${PER_GPU:-64} BATCH=${BATCH:-512}
count_gpus
split_batch
launch eval_finetune.py --arch "$ARCH" --data_path "$IMAGENET" --pretrained_weights "$CHECKPOINT" --output_dir "$OUT" \
    --batch_size_per_gpu "$PER_GPU" --accum_iter "$ACCUM" --epochs 1000 --warmup_epochs 5 --lr 0.0000025 --min_lr 0.000001 \
    --layer_decay 1 --weight_decay 0.05 --clip_grad 0 --drop_path 0.1 --finetune_head_layer 1 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25
