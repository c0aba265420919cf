#!/usr/bin/env bash
# Segment the objects of every DAVIS 2017 validation video with DINO's protocol. EsViT published no result for this.
#   bash scripts/davis.sh ARCH DAVIS CHECKPOINT OUT [flags of eval_video.py]
#   bash scripts/davis.sh deit_small /data/davis-2017 /runs/udi/checkpoint.pth /runs/udi/davis \
#       -- MODEL.SPEC.NUM_CLS_TOKENS 2 MODEL.SPEC.POS_RESIZE scale
# DAVIS contains JPEGImages/480p, Annotations/480p and ImageSets/2017/val.txt. Writes a folder of indexed PNGs per video to OUT;
# the official davis2017-evaluation scores them:
#   python evaluation_method.py --task semi-supervised --results_path OUT --davis_path DAVIS
# Videos with an existing folder are skipped, so the same command resumes. Trailing flags override those set here.
USAGE="ARCH DAVIS CHECKPOINT OUT [flags of eval_video.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
LIST=$DAVIS/ImageSets/2017/val.txt
[ -f "$LIST" ] || usage "$LIST does not exist; DAVIS must be the DAVIS 2017 directory"
mkdir -p "$OUT"
while read -r video || [ -n "$video" ]; do
    [ -n "$video" ] && [ ! -e "$OUT/$video" ] || continue
    masks=$DAVIS/Annotations/480p/$video
    rm -rf "$OUT/.unfinished"
    "$PYTHON" "$ROOT/eval_video.py" --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --frames "$DAVIS/JPEGImages/480p/$video" \
        --first_mask "$masks/00000.png" --output_dir "$OUT/.unfinished" ${FLAGS[@]+"${FLAGS[@]}"} </dev/null
    mv "$OUT/.unfinished" "$OUT/$video"
done <"$LIST"
