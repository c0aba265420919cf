"""Remote shards: over http with lost connections and errors, from commands, and through other fsspec protocols."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.image_files import whole
from helpers.runs import TINY_RUN, TINY_SWIN, run_script, write_images
from helpers.shard_files import COUNTS, IMAGES, gray, indices, loader_of, one_epoch, write_tar

import main_esvit
from data.layouts import shards
from data.layouts.remote import open_stream
from data.layouts.shards import build_stream
from data.loader import Batch
from utils import UsageError

NAMES = [f"train-{i:03}.tar" for i in range(len(COUNTS))]


class Server(http.server.ThreadingHTTPServer):
    """Serve a folder over http.

    Attributes:
        cut: bytes after which the connection is closed, by file name.
        drops: number of times that this happens; default: always.
        status: HTTP status instead of the file.
        requests: number of requests, by file name.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cut: dict[str, int] = {}
        self.drops: dict[str, int] = {}
        self.status: dict[str, int] = {}
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        pytest.importorskip("aiohttp", reason="http needs package aiohttp")
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def pattern(self) -> str:
        return f"{self.url}/train-{{000..{len(COUNTS) - 1:03}}}.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        name = self.path.strip("/")
        server.requests[name] += 1
        if name in server.status or not (server.folder / name).is_file():
            self.send_error(server.status.get(name, 404))
            return
        content = (server.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if name in server.cut and server.requests[name] <= server.drops.get(name, 10**9):
            content = content[: server.cut[name]]
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RETRY_DELAYS", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serve shards with images 0, 1, ..., filled with their number."""
    number = 0
    for name, count in zip(NAMES, COUNTS):
        write_tar(tmp_path / name, [(f"k{i:03}.png", gray(i, 32)) for i in range(number, number + count)])
        number += count
    (tmp_path / "sizes.json").write_text(json.dumps(dict(zip(NAMES, COUNTS))))
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def epoch_of(path: str, **options: Any) -> list[Batch]:
    return one_epoch(loader_of(build_stream(path, whole, buffer=4, **options), 1), 0)


def failures_of(batches: list[Batch]) -> dict[str, str]:
    """Return name and reason of each failure, after checking that each image or a replacement has come."""
    assert sorted(indices(batches)) == list(range(IMAGES))
    assert all(batch.views for batch in batches)
    failures = {failure.split(": ")[0]: failure.split(": ", 1)[1] for batch in batches for failure in batch.failures}
    for reason in failures.values():
        assert "[" not in reason
        assert "\n" not in reason
    for batch in batches:
        shown = int((batch.views[0][0, 0, 0, 0] * 255).round())
        assert (shown == batch.indices_B.item()) == (not batch.failures)
    return failures


# --------------------------------------------------------------------------- http


def test_http_equals_folder(server: Server) -> None:
    """In the same order; the sizes come from `sizes.json`."""
    here, there = epoch_of(str(server.folder)), epoch_of(server.pattern)
    assert failures_of(there) == {}
    assert indices(there) == indices(here)


def test_epoch_images_without_sizes_json(server: Server) -> None:
    (server.folder / "sizes.json").unlink()
    with pytest.raises(UsageError, match=r"5 remote shards .*--epoch_images N \(not 0\)"):
        build_stream(server.pattern, whole)
    stream = build_stream(server.pattern, whole, epoch_images=IMAGES)
    assert stream.counts == (IMAGES // 5,) * 5


def test_connection_lost_once(server: Server) -> None:
    content = (server.folder / NAMES[2]).stat().st_size
    server.cut[NAMES[2]], server.drops[NAMES[2]] = content // 2, 2
    assert failures_of(epoch_of(server.pattern)) == {}
    assert server.requests[NAMES[2]] > 2


def test_connection_lost_each_time(server: Server) -> None:
    server.cut[NAMES[2]] = 3 * 1024 + 700  # in the content of the fourth image; what was buffered is lost too
    failures = failures_of(epoch_of(server.pattern))
    names = [f"{server.url}/{NAMES[2]} image {i}" for i in range(1, COUNTS[2] + 1)]
    assert set(names[3:]) <= failures.keys() <= set(names)
    assert all("connection was lost" in reason for reason in failures.values()), failures


@pytest.mark.parametrize("status", [404, 403, 503])
def test_http_error(server: Server, status: int) -> None:
    server.status[NAMES[1]] = server.status[NAMES[3]] = status
    failures = failures_of(epoch_of(server.pattern))
    lost = [(NAMES[1], 1)] + [(NAMES[3], i) for i in range(1, COUNTS[3] + 1)]
    assert set(failures) == {f"{server.url}/{name} image {i}" for name, i in lost}
    (reason,) = set(failures.values())
    assert str(status) in reason


def test_served_file_is_not_a_tar(server: Server) -> None:
    (server.folder / NAMES[1]).write_text("<html>please log in</html>")
    ((name, reason),) = failures_of(epoch_of(server.pattern)).items()
    assert name == f"{server.url}/{NAMES[1]} image 1"
    assert reason.startswith("it is not a complete tar file (")


def test_no_shard_is_reachable(server: Server) -> None:
    server.status = dict.fromkeys(NAMES, 404)
    with pytest.raises(UsageError, match=r"no image can be read from .*train-000\.tar \(.*404.*\), nor from 4") as e:
        build_stream(server.pattern, whole)
    assert "\n" not in str(e.value)
    assert max(server.requests.values()) == 1
    with pytest.raises(UsageError, match=r"train-002\.tar \(.*404.*\); check --data_path$"):
        build_stream(f"{server.url}/{NAMES[2]}", whole)


def test_one_reachable_shard_is_enough(server: Server) -> None:
    server.status = dict.fromkeys(NAMES[:-1], 404)
    assert len(build_stream(server.pattern, whole)) == IMAGES


def test_outage_ends_an_epoch_soon(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches without views come at once, before all shards have been tried."""
    monkeypatch.setattr(shards, "MAX_TRIED_SHARDS", 2)
    stream = build_stream(server.pattern, whole, buffer=1)
    server.status = dict.fromkeys(NAMES, 404)
    server.requests.clear()
    batch = next(iter(loader_of(stream, 1)))
    assert batch.views == []
    assert "404" in batch.failures[0]
    assert len(server.requests) <= 4


@pytest.mark.parametrize("sizes", ["{", "[]", '{"train-000.tar": -1}'])
def test_invalid_remote_sizes_json(server: Server, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("data.layouts.tars.logger.warning", lambda message, *values: messages.append(message % values))
    (server.folder / "sizes.json").write_text(sizes)
    with pytest.raises(UsageError, match=r"no sizes\.json beside"):
        build_stream(server.pattern, whole)
    (line,) = messages
    assert line.startswith(f"{server.url}/sizes.json is ignored: ")


# --------------------------------------------------------------------------- commands and other addresses


def test_stderr_of_a_command_is_the_reason(server: Server) -> None:
    command = (
        f"pipe:head -c 4000 {server.folder}/train-{{000..004}}.tar && echo 'first' >&2 && echo 'the quota: used up' >&2"
    )
    stream = build_stream(command + " && false", whole, epoch_images=IMAGES)
    failures = {
        failure.rpartition(": ")[2] for batch in one_epoch(loader_of(stream, 1), 0) for failure in batch.failures
    }
    assert failures == {"the quota used up"}
    with pytest.raises(OSError, match=r"^exit code 3$"), open_stream("pipe:exit 3") as output:
        assert output.read() == b""


def test_command_that_is_not_read_to_its_end() -> None:
    with open_stream("pipe:yes") as output:
        assert output.read(2) == b"y\n"


def test_fsspec_protocols(server: Server) -> None:
    memory = fsspec.filesystem("memory")
    for name in (*NAMES, "sizes.json"):
        memory.pipe(f"/shards/{name}", (server.folder / name).read_bytes())
    assert failures_of(epoch_of("memory://shards/train-{000..004}.tar")) == {}
    memory.rm(f"/shards/{NAMES[1]}")
    (name,) = failures_of(epoch_of("memory://shards/train-{000..004}.tar"))
    assert name == f"memory://shards/{NAMES[1]} image 1"
    with pytest.raises(UsageError, match=r"no image can be read from teapot://a/0\.tar \(Protocol not known teapot"):
        build_stream("teapot://a/{0..3}.tar", whole)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="package s3fs is installed")
def test_missing_package_is_named() -> None:
    with pytest.raises(UsageError, match=r"no image can be read from s3://a/0\.tar \(.*s3fs"):
        build_stream("s3://a/{0..3}.tar", whole)


# --------------------------------------------------------------------------- the script


@pytest.mark.slow
def test_run_without_a_server(server: Server, tmp_path: Path) -> None:
    server.status = dict.fromkeys(NAMES, 404)
    flags = [*TINY_RUN, "--data_path", server.pattern, "--output_dir", str(tmp_path / "out"), *TINY_SWIN]
    result = run_script("main_esvit.py", *flags)
    assert result.returncode == 2
    assert "main_esvit.py: error: no image can be read from" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_run_survives_some_lost_shards_and_not_all(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two hundred shards with one image each, two are missing; later all are."""
    for i, path in enumerate(sorted(write_images(tmp_path / "images", 200, size=16).iterdir())):
        write_tar(server.folder / f"one-{i:03}.tar", [(path.name, path.read_bytes())])
    messages: list[str] = []
    monkeypatch.setattr("utils.logger.warning", lambda message, *values: messages.append(message % values))
    lost = {f"one-{i:03}.tar" for i in (7, 70)}
    server.status = dict.fromkeys(lost, 404)

    def pretrain(epochs: int) -> None:
        flags = [*TINY_RUN, "--data_path", f"{server.url}/one-{{000..199}}.tar", "--epoch_images", "200"]
        flags += ["--batch_size_per_gpu", "20", "--shuffle_buffer", "2", "--output_dir", str(tmp_path / "out")]
        flags += ["--epochs", str(epochs), *TINY_SWIN]
        main_esvit.main(main_esvit.get_args_parser().parse_args(flags))

    pretrain(1)
    lines = [line for line in messages if "cannot read" in line]
    assert len(lines) == 2
    for name in lost:
        assert any(line.startswith(f"cannot read {server.url}/{name} image 1 (HTTP error 404") for line in lines)
    server.status = {f"one-{i:03}.tar": 404 for i in range(1, 200)}
    with pytest.raises(UsageError, match=r"of 200 images cannot be read, .*one-\d+\.tar image 1 \(HTTP error 404"):
        pretrain(2)
