"""Where bytes come from: directories, web servers and S3, and everything that can go wrong on the way."""

import pickle
import shutil
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from megabase.datamodules.errors import DataError
from megabase.datamodules.index import store
from megabase.datamodules.index.index_file import BLOCK_BYTES
from megabase.datamodules.index.shard_index import ShardIndex
from megabase.datamodules.index.store import LocalStore, StoreError, open_store

pytest.importorskip("aiohttp")

SHARD = "shard-00000.tar"


class WebServer(ThreadingHTTPServer):
    """Serves a directory with ranges of bytes, counts, and does to the next requests for ranges what it is told.

    faults: names of what happens to the next range requests, in order: "503", "404", "cut" (the connection
    ends in the middle), "flip" (one bit is wrong), "whole" (all of the file, with status 200), "hang" (until
    the server ends), "fine". always: what happens to every range request when `faults` is empty.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), WebHandler)
        self.directory = directory
        self.faults: deque[str] = deque()
        self.always = "fine"
        self.forbidden = False
        self.count = threading.Lock()
        self.requests = 0
        self.sent = 0
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def counted(self, sent: int) -> None:
        with self.count:
            self.requests += 1
            self.sent += sent

    def forget(self) -> None:
        self.requests = self.sent = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are part of the tests."""


class WebHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        path = self.server.directory / self.path.lstrip("/")
        wanted = self.headers.get("Range")
        fault = "fine"
        if wanted is not None and wanted != "bytes=0-0":
            fault = self.server.faults.popleft() if self.server.faults else self.server.always
        elif wanted is not None and self.server.always == "whole":
            fault = "whole"
        if self.server.forbidden:
            self.answer(403, b"no")
        elif not path.is_file():
            self.answer(404, b"nothing here")
        elif fault in ("503", "404"):
            self.answer(int(fault), b"not now")
        elif fault == "hang":
            self.server.over.wait()
        elif wanted is None or fault == "whole":
            self.answer(200, path.read_bytes())
        else:
            self.range(path.read_bytes(), wanted, fault)

    def range(self, content: bytes, wanted: str, fault: str) -> None:
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        if not part:
            self.answer(416, b"")
            return
        where = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}
        if fault == "flip":
            part = part[:-1] + bytes([part[-1] ^ 1])
        if fault == "cut":
            self.answer(206, part[: len(part) // 2], where, claimed=len(part))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.answer(206, part, where)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, claimed: int | None = None
    ) -> None:
        self.server.counted(len(body))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def copy(ecoli_shards: ShardIndex, tmp_path: Path) -> Path:
    """Shards that a test may break."""
    return Path(shutil.copytree(ecoli_shards.directory, tmp_path / "copy"))


@pytest.fixture
def server(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A web server over a copy of the shards; nobody waits long for a retry."""
    monkeypatch.setattr(store, "RETRY_DELAYS_S", (0.0, 0.01, 0.02, 0.03))
    with WebServer(copy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def test_an_epoch_over_http_costs_its_bytes_and_one_request_per_window(
    server: WebServer, ecoli_shards: ShardIndex
) -> None:
    remote = ShardIndex.open(server.url + "/")
    assert remote.directory == server.url
    assert remote.segments.identity == ecoli_shards.segments.identity
    server.forget()
    length, out = 100_000, np.empty(100_000, np.uint8)
    windows = int(remote.segments.length[0]) // length
    for window in np.random.default_rng(0).permutation(windows):
        remote.read_into(0, window * length, out)
        assert (out == ecoli_shards.read(0, window * length, length)).all()
    assert server.requests == windows
    assert windows * length <= server.sent <= windows * (length + 2 * BLOCK_BYTES)


def test_windows_of_whole_blocks_cost_no_byte_more(server: WebServer) -> None:
    remote = ShardIndex.open(server.url)
    server.forget()
    for window in range(5):
        remote.read(0, window * 2 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert (server.requests, server.sent) == (5, 10 * BLOCK_BYTES)


@pytest.mark.parametrize(
    "faults", [["503", "503"], ["cut"], ["flip"], ["cut", "503", "flip", "cut", "503", "503"]]
)
def test_temporary_errors_are_retried(server: WebServer, ecoli_shards: ShardIndex, faults: list[str]) -> None:
    remote = ShardIndex.open(server.url)
    server.forget()
    server.faults.extend(faults)
    assert (remote.read(0, 5, 70_000) == ecoli_shards.read(0, 5, 70_000)).all()
    assert not server.faults
    assert server.requests == len(faults) + 1


def test_request_to_a_hanging_server_is_retried(
    server: WebServer, ecoli_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = ShardIndex.open(server.url)
    monkeypatch.setattr(store, "TIMEOUT_S", 0.3)
    server.faults.append("hang")
    assert (remote.read(0, 5, 100) == ecoli_shards.read(0, 5, 100)).all()


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        ("503", 5, r"cannot be read in 5 attempts \(HTTP 503: "),
        ("cut", 5, r"cannot be read in 5 attempts \("),
        ("404", 1, r"does not exist any more"),
        ("whole", 1, r"the server sends whole files only.*copy the shards to a disk"),
    ],
)
def test_permanent_errors_are_reported(server: WebServer, fault: str, requests: int, message: str) -> None:
    remote = ShardIndex.open(server.url)
    server.forget()
    server.always = fault
    name = remote.segments.record[0].replace("|", r"\|")
    with pytest.raises(DataError, match=rf"{server.url}/{SHARD}: record '{name}': {message}"):
        remote.read(0, 0, 70_000)
    assert server.requests == requests


def test_bytes_that_stay_wrong_are_read_twice_and_refused(server: WebServer) -> None:
    remote = ShardIndex.open(server.url)
    server.forget()
    server.always = "flip"
    start = 70_000 // BLOCK_BYTES * BLOCK_BYTES
    place = rf"{SHARD}: record .* bases \[{start}, {start + BLOCK_BYTES}\) differ from their checksum"
    with pytest.raises(DataError, match=place):
        remote.read(0, 70_000, 8)
    assert server.requests == 2


def test_remote_shard_truncated_while_it_is_read_is_named(server: WebServer, copy: Path) -> None:
    remote = ShardIndex.open(server.url)
    with (copy / SHARD).open("r+b") as shard:
        shard.truncate(40_000)
    with pytest.raises(DataError, match=rf"{SHARD}: record .*: .* bytes received, .* requested"):
        remote.read(0, BLOCK_BYTES, 70_000)
    with pytest.raises(DataError, match=rf"{SHARD}: record .*: ends before the bytes that are"):
        remote.read(0, 70_000, 70_000)


def test_a_server_without_ranges_is_refused_when_opened(server: WebServer) -> None:
    server.always = "whole"
    with pytest.raises(DataError, match=rf"{SHARD}: the server sends whole files only"):
        ShardIndex.open(server.url)
    assert server.requests <= 2


def test_places_without_shards_are_refused(server: WebServer, copy: Path) -> None:
    with pytest.raises(DataError, match=rf"{server.url}/sub: no index.parquet in it: make shards"):
        ShardIndex.open(server.url + "/sub")
    server.forbidden = True
    with pytest.raises(
        DataError, match=r"index.parquet: refused \(HTTP 403: .*\): check .* your credentials"
    ):
        ShardIndex.open(server.url)
    server.forbidden = False
    with (copy / SHARD).open("ab") as shard:
        shard.write(b"more")
    with pytest.raises(DataError, match=rf"{server.url}/{SHARD}: \d+ bytes, the index says \d+: copy"):
        ShardIndex.open(server.url)
    (copy / SHARD).unlink()
    with pytest.raises(
        DataError, match=rf"{server.url}/{SHARD}: the index names this shard but it does not exist"
    ):
        ShardIndex.open(server.url)


def test_missing_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RETRY_DELAYS_S", (0.0,))
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/index.parquet: cannot be read in 2 attempts"):
        ShardIndex.open("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("url", "package", "message"),
    [
        ("gs://bucket/shards", "gcsfs", r"gs://bucket/shards: .*not installed: `pip install gcsfs`"),
        ("s3://bucket/shards", "s3fs", r"not installed: `pip install s3fs`"),
        ("https://host/shards", "aiohttp", r"not installed: `pip install aiohttp`"),
        ("nonsense://bucket", "", r"nonsense://bucket: .*give a directory, or a URL such as s3://"),
    ],
)
def test_protocols_without_a_package_are_refused(
    url: str, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("fsspec.implementations.http")]:
        monkeypatch.delitem(sys.modules, module)
    for protocol in ("gs", "s3", "https"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=message):
        open_store(url)


class Windows(Dataset[Any]):
    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> Any:
        return self.index.read(0, number * 50_000, 50_000)


@pytest.mark.slow
def test_workers_read_over_http(server: WebServer, ecoli_shards: ShardIndex) -> None:
    """The process that forks has an event loop running and a connection open."""
    remote = ShardIndex.open(server.url)
    windows = Windows(remote)
    expected = [windows[number] for number in range(len(windows))]
    loader = DataLoader(windows, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for found, window in zip(loader, expected, strict=True):
        assert (found.numpy() == window).all()
    assert (remote.read(0, 3, 50_000) == ecoli_shards.read(0, 3, 50_000)).all()


def test_pickled_store_reads(server: WebServer, ecoli_shards: ShardIndex) -> None:
    remote = ShardIndex.open(server.url)
    remote.read(0, 0, 9)
    assert (pickle.loads(pickle.dumps(remote)).read(0, 3, 9) == ecoli_shards.read(0, 3, 9)).all()


def test_threads_read_over_http(server: WebServer, ecoli_shards: ShardIndex) -> None:
    remote = ShardIndex.open(server.url)
    with ThreadPoolExecutor(4) as threads:
        for number, found in enumerate(threads.map(lambda at: remote.read(0, at * 999, 999), range(40))):
            assert (found == ecoli_shards.read(0, number * 999, 999)).all()


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_filesystems_are_read(ecoli_shards: ShardIndex, protocol: str) -> None:
    url = f"file://{ecoli_shards.directory}"
    if protocol == "memory":
        url = "memory://bucket/shards"
        fsspec.filesystem("memory").put(f"{ecoli_shards.directory}/", "/bucket/shards/", recursive=True)
    index = ShardIndex.open(url)
    assert (index.read(1, 17, 40_000) == ecoli_shards.read(1, 17, 40_000)).all()


def test_few_files_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_most_open", lambda: 2)
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    files = LocalStore(tmp_path)

    def reads(name: str) -> bytes:
        buffers = bytearray(3), bytearray(0), bytearray(5)
        files.read_into(name, 500, [memoryview(buffer) for buffer in buffers])
        return b"".join(buffers)

    with ThreadPoolExecutor(4) as threads:
        names = [str(number % 6) for number in range(600)]
        for name, found in zip(names, threads.map(reads, names), strict=True):
            assert found == bytes([int(name)]) * 8
    assert len(files._open) <= 5  # two, and one more for each thread that came at the same time


def test_a_read_that_comes_in_pieces_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    whole = store.os.preadv
    monkeypatch.setattr(
        store.os, "preadv", lambda file, parts, at: whole(file, [next(filter(len, parts))[:7]], at)
    )
    buffers = bytearray(20), bytearray(30)
    LocalStore(tmp_path).read_into("a", 10, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == bytes(range(10, 60))
    with pytest.raises(StoreError, match="ends at byte 100, and byte 104 is needed"):
        LocalStore(tmp_path).read_into("a", 90, [memoryview(bytearray(15))])


@pytest.mark.slow
def test_s3_is_read_by_range(ecoli_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("genomes")
        bucket.put(f"{ecoli_shards.directory}/", "genomes/ecoli/", recursive=True)
        remote = ShardIndex.open("s3://genomes/ecoli")
        assert (remote.read(1, 17, 40_000) == ecoli_shards.read(1, 17, 40_000)).all()
        loader = DataLoader(Windows(remote), batch_size=None, num_workers=1, multiprocessing_context="fork")
        assert (next(iter(loader)).numpy() == ecoli_shards.read(0, 0, 50_000)).all()
        with pytest.raises(DataError, match=r"s3://genomes/none: no index.parquet in it"):
            ShardIndex.open("s3://genomes/none")
        bucket.rm(f"genomes/ecoli/{SHARD}")
        with pytest.raises(DataError, match=rf"s3://genomes/ecoli/{SHARD}: the index names this shard but"):
            ShardIndex.open("s3://genomes/ecoli")
    finally:
        server.stop()
