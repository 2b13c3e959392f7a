"""Sources elsewhere: a bucket, a hub, links. What a store does not give is tried again or refused by name, never left out."""

import functools
import gzip
import hashlib
import http.server
import itertools
import json
import threading
import urllib.parse

import pyarrow as pa
import pytest

from tasks.preparation import prepare
from tasks.preparation.sources.find import find_files, storage_errors
from tests.tasks.test_preparation import small, some_texts
from tests.tasks.test_sources import jsonl, parquet, read
from trainer.errors import DataError, StorageError

TEXTS = some_texts(240)


@pytest.fixture
def bucket(gcs):
    """The texts in five files of three kinds."""
    objects = gcs.buckets["bucket"]
    for i in range(3):
        objects[f"texts/{i}.jsonl.gz"] = gzip.compress(jsonl(TEXTS[i * 50 : (i + 1) * 50]))
    objects["texts/3.parquet"] = parquet(pa.table({"text": TEXTS[150:200]}), rows=10)
    objects["texts/deep/4.jsonl"] = jsonl(TEXTS[200:])
    objects["texts/readme.pdf"] = b"no"
    return gcs


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the same texts come to on this machine."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS))
    return prepare(small(folder / "a.jsonl"), cache=folder / "cache")


def test_a_bucket_is_read_by_folder_glob_and_name_and_gives_the_data_of_the_same_texts_here(bucket, expected, tmp_path):
    assert read("gs://bucket/texts/*.jsonl.gz")[0] == TEXTS[:150]
    assert read("gs://bucket/texts/3.parquet", of=3)[0] == TEXTS[150:200]
    assert prepare(small("gs://bucket/texts"), cache=tmp_path).digest == expected.digest
    bucket.log.clear()
    assert prepare(small("gs://bucket/texts"), cache=tmp_path).digest == expected.digest
    assert not [path for _, path in bucket.log if "alt=media" in path], "what was read is known by the versions in the listing"


@pytest.mark.parametrize("action", ["503", "429", "reset", "truncate"])
def test_a_bucket_that_fails_for_a_while_costs_no_text_and_one_that_stays_away_is_no_empty_one(bucket, expected, tmp_path, action):
    asked = set()

    def first_time(method, path):
        return None if path in asked or asked.add(path) else action

    for which, path in ((first_time, "gs://bucket/texts"), (lambda m, p: action, "gs://bucket/texts/*"), (None, "gs://bucket/texts")):
        bucket.fault = which or (lambda method, path: action if "alt=media" in path else None)
        config = small(path)
        if which is first_time:
            assert prepare(config, cache=tmp_path / "once").digest == expected.digest
            continue
        with pytest.raises(StorageError, match=r"gs://bucket/texts\S* could not be read") as failed:
            prepare(config, cache=tmp_path / "never")
        assert failed.value.retryable


@pytest.mark.parametrize("answer", [b'{"items": [{"name" "a"}]}', b'{"items": [{"name": "\xff"}]}'])
def test_an_answer_that_was_damaged_on_its_way_is_asked_for_again(answer):
    with pytest.raises(StorageError, match="gs://bucket/texts could not be read: its store's answer was damaged") as failed:
        with storage_errors("gs://bucket/texts"):
            json.loads(answer)
    assert failed.value.retryable


def test_what_a_bucket_refuses_or_does_not_have_is_said_once_with_the_way_out(bucket, tmp_path):
    for status in ("401", "403"):
        bucket.fault = lambda method, path, status=status: status
        with pytest.raises(DataError, match=r"gs://bucket/texts may not be read(.|\n)*gcloud auth application-default login"):
            find_files("gs://bucket/texts")
    bucket.fault = lambda method, path: None
    for path in ("gs://bucket/nothing", "gs://nowhere/a.jsonl"):
        with pytest.raises(DataError, match=f"there is no {path}"):
            find_files(path)
    bucket.buckets["bucket"]["texts/1.jsonl.gz"] = gzip.compress(jsonl(["fine"]) + b'{"text": 7}\n')
    with pytest.raises(DataError, match=r"gs://bucket/texts/1\.jsonl\.gz:2: field 'text' is 7, not text"):
        prepare(small("gs://bucket/texts"), cache=tmp_path)
    whole = bucket.buckets["bucket"]["texts/3.parquet"]
    bucket.buckets["bucket"]["texts/3.parquet"] = whole[:-300]
    with pytest.raises(DataError, match=r"gs://bucket/texts/3\.parquet is no Parquet file"):
        prepare(small("gs://bucket/texts/3.parquet"), cache=tmp_path)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that its file system speaks to read a data set."""

    protocol_version = "HTTP/1.1"

    def __init__(self, files, faults, *args):
        self.files, self.faults = files, faults
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def _say(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value):
        self._say(200, json.dumps(value).encode(), Content_Type="application/json")

    def _all(self):
        return sorted(self.files.keys() | {name.rpartition("/")[0] for name in self.files if "/" in name})

    def _facts(self, path):
        if path not in self.files:
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        data = self.files[path]
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if (status := next(self.faults, None)) is not None:
            self._say(status, b"{}")
        elif "/tree/main" in path:
            folder = path.partition("/tree/main")[2].strip("/")
            below = [p for p in self._all() if p.startswith(f"{folder}/" if folder else "")]
            deep = "recursive=true" in self.path.lower()
            self._json([self._facts(p) for p in below if deep or p.count("/") == (folder.count("/") + 1 if folder else 0)])
        elif "/resolve/main/" in path:
            data = self.files[path.partition("/resolve/main/")[2]]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            self._say(206, data[int(first) : int(last) + 1 if last else None])
        else:
            self._json({"id": "us/texts", "sha": "0" * 40, "siblings": [], "tags": [], "downloads": 0, "likes": 0, "private": False})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        found = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
        self._json([self._facts(path) for path in found if path in self._all()])


@pytest.fixture
def hub(monkeypatch):
    """(files, a list whose first element is an iterator of answers that come instead of the right ones)."""
    from huggingface_hub import HfFileSystem, constants

    files, faults = {}, [itertools.repeat(None)]

    class Each:
        def __iter__(self):
            return self

        def __next__(self):
            return next(faults[0])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, files, Each())) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        )
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        HfFileSystem.clear_instance_cache()
        yield files, faults
        server.shutdown()
        HfFileSystem.clear_instance_cache()


def test_a_data_set_of_a_hub_is_read_by_folder_glob_and_name(hub, expected, tmp_path):
    files, faults = hub
    files |= {"data/a.jsonl.gz": gzip.compress(jsonl(TEXTS[:90])), "data/b.parquet": parquet(pa.table({"text": TEXTS[90:]}), rows=50)}
    files["README.pdf"] = b"no"
    assert read("hf://datasets/us/texts/data/a.jsonl.gz") == (TEXTS[:90], [], [])
    for path in ("", "/data", "/data/a.jsonl.gz", "/**/*.gz"):
        assert all(file.version for file in find_files(f"hf://datasets/us/texts{path}")), path
    assert read("hf://datasets/us/texts/**/*.parquet", of=2)[0] == TEXTS[90:]
    assert prepare(small("hf://datasets/us/texts"), cache=tmp_path).digest == expected.digest
    with pytest.raises(DataError, match=r"there is no hf://datasets/us/texts/nothing\.jsonl"):
        find_files("hf://datasets/us/texts/nothing.jsonl")
    files["data/a.jsonl.gz"] = files["data/a.jsonl.gz"][:-20]
    with pytest.raises(DataError, match=r"hf://datasets/us/texts/data/a\.jsonl\.gz:\d+ and all after it cannot be unpacked"):
        prepare(small("hf://datasets/us/texts/data/a.jsonl.gz"), cache=tmp_path)
    faults[0] = itertools.repeat(500)
    with pytest.raises(StorageError, match="hf://datasets/us/texts/data could not be read"):
        find_files("hf://datasets/us/texts/data")
