#!/usr/bin/env bash
# Make the pictures of docs/: method, and from a demo run attention, correspondence, features and report.
#   bash scripts/docs_pictures.sh            from the run of scripts/demo.sh, .demo/seed0, to docs/
#   bash scripts/docs_pictures.sh RUN OUT    from another run of the demo's network, to another folder
# The photographs come from scikit-image. report.png is a screenshot and needs Chromium.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "docs_pictures.sh: error: $1" >&2; exit 2; }
RUN=${1:-.demo/seed0} OUT=${2:-docs}
PYTHON=${PYTHON:-.venv/bin/python}
[ -f "$RUN/analysis/report.html" ] || fail "$RUN/analysis/report.html is missing; run bash scripts/demo.sh first"
BROWSER=$(command -v chromium || command -v chromium-browser || command -v google-chrome) ||
    fail "no chromium on PATH; on Debian: apt-get install chromium"
PHOTOS=$("$PYTHON" -c 'import pathlib, importlib.util as u; print(pathlib.Path(u.find_spec("skimage").origin).parent / "data")')
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

look() {
    "$PYTHON" run_analysis.py --arch swin --cfg experiments/demo/swin_micro.yaml --device cpu \
        --pretrained_weights "$RUN/checkpoint.pth" --checkpoint_key student --output_dir "$WORK/pictures" "$@"
}

# Block 3 has shifted windows; at 128 pixels a window covers the face.
look --vis_attention --block 3 --image_size 128 --image_path "$PHOTOS/astronaut.png" --query 220 100
look --vis_features --image_size 320 --image_path "$PHOTOS/astronaut.png"
look --vis_correspondence --image_size 256 --image_path "$PHOTOS/chelsea.png"
HOME=$WORK "$BROWSER" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
    --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$WORK/profile" --window-size=1280,4200 \
    --screenshot="$WORK/pictures/report.png" "file://$(realpath "$RUN")/analysis/report.html" 2>/dev/null >&2

"$PYTHON" - "$WORK/pictures" "$OUT" <<'END'
"""Shrink each picture below 150 KB: to 256 colors, then to fewer pixels."""
import io, pathlib, sys
from PIL import Image

LIMIT, WIDEST = 150_000, 1200
source, out = map(pathlib.Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
for pattern in ("swin_ssl_astronaut_attention.png", "swin_ssl_*_correspondence.png", "swin_ssl_*_features.png", "report.png"):
    (path,) = source.glob(pattern)
    name = path.stem.rsplit("_", 1)[-1] + ".png"
    picture = Image.open(path).convert("RGB")
    width = min(WIDEST, picture.width)
    while True:
        small = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        small.quantize(256, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
        if stream.tell() < LIMIT:
            break
        width = round(0.92 * width)
    (out / name).write_bytes(stream.getvalue())
    print(f"{out / name}: {small.width} x {small.height}, {stream.tell() / 1000:.0f} KB")
END
"$PYTHON" -m tools.draw_method "$OUT/method.png"
