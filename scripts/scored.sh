#!/usr/bin/env bash
# Sourced by demo.sh and demo_udi.sh, after setup.sh.
# scored RUN: whether RUN holds k-NN scores that are newer than its checkpoint and than the script that says with which flags; then
# they are shown once more.
scored() {
    "$PYTHON" - "$1" "scripts/$(basename "$0")" <<'END'
import json, pathlib, sys

run, script = map(pathlib.Path, sys.argv[1:])
made = lambda path: path.stat().st_mtime_ns
found = max(run.glob("results*.json"), key=made, default=None)
if found is None or made(found) <= max(made(run / "checkpoint.pth"), made(script)):
    sys.exit(1)
try:
    record = json.loads(found.read_text())
    lines = [f"k-NN of {record['compared']}:"] + [
        f"{name}: {k}-NN classifier result: Top1: {score['top1']:.2f}, {record['top5_is'].capitalize()}: {score['top5']:.2f}"
        for name, scores in record["scores"].items()
        for k, score in scores.items()
    ]
except (ValueError, LookupError, TypeError, AttributeError):
    sys.exit(1)
print(f"{found} is newer than {run / 'checkpoint.pth'} and {script}: its scores stand; remove it to score again")
print("\n".join(lines))
END
}
