"""What wandb has written offline: the records of a `.wandb` file, in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32768  # bytes at the start of the file, and between two points that no record's header crosses
LAST_PARTS = (1, 4)  # types of a record that is whole, and of the last part of one


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a file."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, record = HEADER, b""
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
        _, length, kind = struct.unpack("<IHB", content[position : position + HEADER])
        position += HEADER + length
        record += content[position - length : position]
        if kind in LAST_PARTS:
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def offline_runs(folder: Path) -> list[Path]:
    """The files of the starts of a run, in their order."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    rows = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def run_record(path: Path) -> Any:
    """What a run says about itself: ID, project and config."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")
