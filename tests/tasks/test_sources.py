"""Sources: every row of every kind of file is read right or named with its place and reason, wherever the file lies."""

import functools
import gzip
import http.server
import io
import itertools
import json
import lzma
import os
import sys
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.prepare import FilterConfig
from tasks.preparation.sources import FORMATS, Bad, Document, File, Format, Part, Reading
from tasks.preparation.sources.read import Left, find_files, message, read_documents
from tasks.preparation.units import units_of
from trainer.errors import DataError, StorageError

MANY = 300
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}


def parts(file, of=1):
    return [Part(file, i, of) for i in range(of)]


def read(path, *, of=1, **wanted):
    """(texts, [(number, reason)], left out) of all files that a path names, each in `of` parts."""
    found = [item for file in find_files(str(path)) for part in parts(file, of) for item in read_documents(part, Reading(**wanted))]
    return (
        [item.text for item in found if isinstance(item, Document)],
        [(item.number, item.reason) for item in found if isinstance(item, Bad)],
        [item.why for item in found if isinstance(item, Left)],
    )


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def ipc(table, *, stream=False, rows=3):
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    return sink.getvalue()


def parquet(table, rows=3):
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows)
    return sink.getvalue()


def test_every_format_of_the_index_has_the_methods_of_the_interface():
    for known in FORMATS:
        assert {name for name in vars(Format) if not name.startswith("_")} <= set(dir(known))


def test_text_is_read_from_every_kind_of_file_in_the_order_of_names(tmp_path):
    texts = [f"text {i} é\r\n" for i in range(12)]
    (tmp_path / "a.txt").write_bytes(texts[0].encode())
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf" + texts[1].encode())  # as Windows editors write it
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(texts[2].encode()))
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(jsonl(texts[3:4]) + b"\r\n\n"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "e.jsonl").write_bytes(jsonl(texts[4:6]).replace(b"\n", b"\r\n"))
    (tmp_path / "f.parquet").write_bytes(parquet(pa.table({"n": [1, 2], "text": texts[6:8]})))
    (tmp_path / "g.arrow").write_bytes(ipc(pa.table({"text": texts[8:9]})))
    (tmp_path / "h.arrow").write_bytes(ipc(pa.table({"text": texts[9:10]}), stream=True))
    (tmp_path / "i.json.zst").write_bytes(PACK[".zst"](jsonl(texts[10:])))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\xff")
    assert read(tmp_path) == read(f"file://{tmp_path}") == (texts, [], [])
    assert read(tmp_path / "*.jsonl*")[0] == texts[3:4] and read(tmp_path / "**" / "*.jsonl")[0] == texts[4:6]
    assert read(tmp_path / "c.txt.gz")[0] == texts[2:3]


def test_links_are_followed_wherever_they_lead_and_each_file_is_read_once(tmp_path):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "x.txt").write_text("x")
    (folder / "a.txt").symlink_to(elsewhere / "x.txt")
    (elsewhere / "y.jsonl").write_bytes(jsonl(["y"]))
    (folder / "deep" / "linked").symlink_to(elsewhere)
    (folder / "deep" / "round").symlink_to(folder)
    assert read(folder)[0] == ["x", "x", "y"]
    assert read(folder / "*.txt")[0] == ["x"] == read(folder / "a.txt")[0]
    (tmp_path / "whole").symlink_to(folder)
    assert read(tmp_path / "whole")[0] == ["x", "x", "y"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("gone.txt"), r"a\.txt is a link to gone\.txt, which is not there"),
        (os.mkfifo, r"a\.txt is neither a file nor a folder"),
        (lambda path: path.mkdir(), r"a\.txt is a folder, and named like a file; set data\.path to it"),
        (lambda path: path.symlink_to(path), r"a\.txt is a link to \S+a\.txt, which is not there"),
    ],
)
def test_what_is_named_like_text_and_is_none_is_refused_and_not_passed_over(tmp_path, make, message):
    (tmp_path / "b.txt").write_text("fine")
    make(tmp_path / "a.txt")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "*.txt")
    if (tmp_path / "a.txt").is_dir():
        (tmp_path / "a.txt" / "part-0.jsonl").write_bytes(jsonl(["as others write it"]))
        assert read(tmp_path)[0] == ["as others write it", "fine"]
    else:
        with pytest.raises(DataError, match=message):
            read(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_or_file_that_may_not_be_looked_into_is_refused(tmp_path):
    (tmp_path / "b.txt").write_text("fine")
    for locked in (tmp_path / "deep", tmp_path / "a.txt"):
        (locked.mkdir if locked.suffix == "" else locked.touch)(mode=0)
        with pytest.raises(DataError, match=rf"{locked}.*change its permissions"):
            read(tmp_path)
        locked.chmod(0o700)


KINDS = {
    "jsonl": jsonl,
    "parquet": lambda texts: parquet(pa.table({"text": texts})),
    "arrow": lambda texts: ipc(pa.table({"text": texts})),
    "feather": lambda texts: ipc(pa.table({"text": pa.array(texts, pa.large_string())})),
    "ipc": lambda texts: ipc(pa.table({"text": pa.array(texts).dictionary_encode()})),
    "arrows": lambda texts: ipc(pa.table({"text": pa.array([t.encode() for t in texts], pa.binary())}), stream=True),
}


@settings(max_examples=MANY, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=20),
    of=st.integers(1, 9),
)
def test_the_parts_of_a_file_are_the_file(tmp_path_factory, kind, texts, of):
    path = tmp_path_factory.mktemp("parts") / f"a.{kind}"
    path.write_bytes(KINDS[kind](texts))
    blank = [text for text in texts if not text.strip()]
    assert read(path, of=of) == ([text for text in texts if text.strip()], [], ["empty"] * len(blank))


# What a line says, and what becomes of it: a text, None (no row), or a reason.
HOSTILE = [
    (b'{"text": "torn', "no JSON"),
    (b"{'text': 1}", "no JSON"),
    (b"[1]", "no object"),
    (b"null", "no object"),
    (b'"text"', "no object"),
    (b"", None),
    (b" \t ", None),
    (b"\r", None),
    (b'{"body": "x"}', "no field"),
    (b"{}", "no field"),
    (b'{"text": null}', "null"),
    (b'{"text": 7}', "no text"),
    (b'{"text": ["a"]}', "no text"),
    (b'{"text": {"text": "a"}}', "no text"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n"}', "empty"),
    (b'{"text": "\\ud800"}', "no Unicode"),
    (b'{"text": "\\udc00\\ud800"}', "no Unicode"),
    (b'{"text": "\xff"}', "no UTF-8"),
    (b"\xfe\xff\x00{", "no UTF-8"),
    (b'{"text": "a\x00b"}', "no JSON"),  # a control character has to be escaped
    (b'\xef\xbb\xbf{"text": "mark"}', "no JSON"),  # of a byte order, in the middle of a file
    (b"[" * 200_000, "no JSON"),
    (b'{"text": "x", "deep": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "no JSON"),
    (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "no JSON"),  # more digits than Python turns into a number
    (b'{"text": "a", "text": "b"}', "a field twice"),
    (b'{"x": 1, "x": 2, "text": "other keys twice"}', ["other keys twice"]),
    (b'{"text": "a\\u0000b"}', ["a\x00b"]),
    (b'{"text": "\\ud83d\\ude00"}', ["😀"]),
    (b'{"text": "crlf\\r\\n"}\r', ["crlf\r\n"]),
    ('{"text": "e\u0301\u2028\ufeff"}'.encode(), ["e\u0301\u2028\ufeff"]),
    (b'{"text": "' + b"l" * 2001 + b'"}', "too long"),
    (b'{"text": "' + b"l" * 2_000_000 + b'"}', "too long"),  # a line that is not even parsed
    (b'{"text": "fits", "rest": "' + b"l" * 3000 + b'"}', ["fits"]),
    (b'{"text": NaN}', "no text"),
]


@settings(max_examples=MANY, deadline=None)
@given(
    lines=st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=15),
    ends=st.booleans(),
    packing=st.sampled_from(sorted(PACK)),
    of=st.integers(1, 7),
)
def test_each_line_of_a_hostile_file_is_a_text_or_named_with_number_and_reason(tmp_path_factory, lines, ends, packing, of):
    path = tmp_path_factory.mktemp("lines") / f"a.jsonl{packing}"
    if lines[0][0][:1] == b"\xef":
        lines = [*lines[1:], lines[0]]  # at the beginning it is no fault
    if lines[0][0][:1] == b"\xef":
        return
    path.write_bytes(PACK[packing](b"\n".join(line for line, _ in lines) + (b"\n" if ends else b"")))
    texts, bad, left = read(path, of=1 if packing else of, max_bytes=2000)
    assert texts == [text for _, fate in lines if isinstance(fate, list) for text in fate]
    expected = [(i, fate) for i, (_, fate) in enumerate(lines, 1) if isinstance(fate, str) and fate != "empty"]
    assert bad == expected
    assert left == ["empty"] * sum(fate == "empty" for _, fate in lines)


@settings(max_examples=MANY, deadline=None)
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(["a.jsonl", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.txt.xz"]),
)
def test_bytes_of_any_kind_crash_nothing_and_are_not_lost_without_a_word(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    texts, bad, left = read(path)
    assert texts or bad or left or not data.strip() or not data.replace(b"\xef\xbb\xbf", b"").decode(errors="replace").strip()


TEXTS = [f"text number {i} " + "word " * (i % 7) for i in range(40)]


@settings(max_examples=MANY, deadline=None)
@given(
    kind=st.sampled_from(["jsonl.gz", "jsonl.zst", "jsonl.xz", "txt.gz", "txt.zst", "parquet", "arrow", "arrows"]),
    share=st.floats(0, 0.9999),
)
def test_a_file_that_was_cut_off_is_noticed_and_what_it_still_holds_is_right(tmp_path_factory, kind, share):
    if kind in KINDS:
        whole = KINDS[kind](TEXTS)
    elif kind.startswith("txt"):
        whole = PACK["." + kind.partition(".")[2]](" ".join(TEXTS).encode())
    else:
        whole = PACK["." + kind.partition(".")[2]](jsonl(TEXTS))
    path = tmp_path_factory.mktemp("cut") / f"a.{kind}"
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    texts, bad, _ = read(path)
    assert texts == TEXTS[: len(texts)] and len(bad) == 1 and bad[0][1] == "damaged file"
    assert bad[0][0] in (0, len(texts) + 1)


@settings(max_examples=MANY, deadline=None)
@given(
    kind=st.sampled_from(["jsonl.gz", "jsonl.zst", "jsonl.xz", "parquet", "arrow", "arrows"]),
    at=st.floats(0, 0.9999),
    flip=st.integers(1, 255),
)
@example(kind="arrows", at=0.001, flip=153)
def test_a_damaged_byte_crashes_nothing(tmp_path_factory, kind, at, flip):
    data = bytearray(KINDS[kind](TEXTS) if kind in KINDS else PACK["." + kind.partition(".")[2]](jsonl(TEXTS)))
    data[int(len(data) * at)] ^= flip
    path = tmp_path_factory.mktemp("flip") / f"a.{kind}"
    path.write_bytes(bytes(data))
    texts, bad, left = read(path)
    assert texts or bad or left


def test_a_stream_whose_first_length_is_damaged_loses_no_row_unsaid(tmp_path):
    data = KINDS["arrows"](TEXTS)
    for at, flip in itertools.product(range(4, 8), range(1, 256)):
        path = tmp_path / "a.arrows"
        path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        texts, bad, _ = read(path)
        assert bad or texts == TEXTS, (at, flip)


def test_rows_of_tables_that_are_no_text_are_named_with_their_number(tmp_path):
    def bad(table, **wanted):
        found = set()
        for name, data in (("a.parquet", parquet(table)), ("a.arrow", ipc(table)), ("a.arrows", ipc(table, stream=True))):
            (tmp_path / name).write_bytes(data)
            for of in (1, 3):
                texts, wrong, left = read(tmp_path / name, of=of, **wanted)
                found.add((tuple(texts), tuple(wrong), len(left)))
        assert len(found) == 1
        return found.pop()

    torn = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffb")])
    assert bad(pa.table({"text": torn})) == (("a", "b"), ((2, "no UTF-8"),), 0)
    assert bad(pa.table({"text": ["fine"] * 6 + [None, ""]})) == (("fine",) * 6, ((7, "null"),), 1)
    assert bad(pa.table({"text": [1, 2, 3, 4]})) == ((), tuple((i, "no text") for i in range(1, 5)), 0)
    assert bad(pa.table({"text": [["a"], None]})) == ((), ((1, "no text"), (2, "null")), 0)
    assert bad(pa.table({"text": [{"a": 1, "b": ["c"]}]})) == ((), ((1, "no text"),), 0)
    assert bad(pa.table({"text": pa.nulls(2)})) == ((), ((1, "null"), (2, "null")), 0)
    assert bad(pa.table({"text": ["a", "long"]}), max_bytes=3) == (("a",), ((2, "too long"),), 0)


def test_a_table_without_the_column_counts_as_all_its_rows(tmp_path):
    for name, make in (("a.parquet", parquet), ("a.arrow", ipc), ("b.arrows", functools.partial(ipc, stream=True))):
        (tmp_path / name).write_bytes(make(pa.table({"body": ["x"] * 8, "n": range(8)})))
        [file] = find_files(str(tmp_path / name))
        [bad] = [item for part in parts(file, 3) for item in read_documents(part, Reading())]
        assert bad.rows == 8 and message(file, bad) == f"{tmp_path / name} has no column 'text', only 'body', 'n'; set data.text_field"


@pytest.mark.parametrize(
    ("op", "value", "kept"),
    [
        ("==", "en", [0, 3]),
        ("!=", "en", [1]),
        ("in", ["de", "fr"], [1]),
        ("not in", ["de", "fr"], [0, 3]),
        ("contains", "n", [0, 3]),
    ],
)
def test_filters_keep_the_rows_they_say_in_every_format(tmp_path, op, value, kept):
    rows = [{"text": f"t{i}", "lang": lang, "score": i / 4} for i, lang in enumerate(["en", "de", None, "en"])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.parquet").write_bytes(parquet(pa.Table.from_pylist(rows)))
    (tmp_path / "a.arrow").write_bytes(ipc(pa.Table.from_pylist(rows)))
    rule = FilterConfig(field="lang", op=op, value=value)
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        texts, bad, left = read(tmp_path / name, filters=(rule,))
        assert texts == [f"t{i}" for i in kept] and not bad and left == ["filtered"] * (4 - len(kept))
        above = FilterConfig(field="score", op=">=", value=0.5)
        assert read(tmp_path / name, filters=(rule, above))[0] == [f"t{i}" for i in kept if i >= 2]
        assert read(tmp_path / name, filters=(FilterConfig(field="lang", op=">", value=3),))[1][0] == (1, "cannot be filtered")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"field": "a", "op": "~", "value": 1}, "op"),
        ({"field": "a", "op": "in", "value": 1}, "wants a list"),
        ({"field": "a", "op": "==", "value": [1]}, "wants one value"),
        ({"field": "a", "op": "in", "value": []}, "drop every row"),
        ({"field": "a", "op": "<", "value": True}, "no order"),
        ({"field": "a", "op": "==", "value": float("nan")}, "never true"),
        ({"field": "a", "op": "contains", "value": 3}, "text to look for"),
        ({"field": "", "op": "==", "value": 3}, "field"),
        ({"field": "a", "op": "==", "value": None}, "value"),
        ({"field": "a", "value": 1, "and": 2}, "and"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_before_anything_is_read(rule, message):
    with pytest.raises(ValueError, match=message):
        FilterConfig(**rule)


def test_a_filter_on_plain_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"data\.filters .* plain text"):
        read(tmp_path, filters=(FilterConfig(field="a", value=1),))


def test_a_huge_line_or_bomb_is_left_out_without_being_held_in_memory(tmp_path):
    import tracemalloc

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * 100_000_000 + b'"}\n' + jsonl(["after"]), 1))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 100_000_000, 1))
    tracemalloc.start()
    found = read(tmp_path, max_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == (["after"], [(1, "too long"), (1, "too long")], [])
    assert peak < 30e6


def test_a_parquet_file_is_read_a_row_group_at_a_time(tmp_path):
    texts = [f"{i} " * 20_000 for i in range(400)]  # 30 MB
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=20, compression="none", use_dictionary=False)
    before = pa.total_allocated_bytes()
    del texts
    most = 0
    [file] = find_files(str(tmp_path))
    for _ in read_documents(Part(file), Reading()):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 8e6


def test_a_file_that_vanishes_or_changes_after_the_listing_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a", "b"]))
    [file] = find_files(str(path))
    path.write_bytes(jsonl(["a", "c"]))
    with pytest.raises(DataError, match=r"a\.jsonl changed while"):
        list(read_documents(Part(file), Reading()))
    path.unlink()
    with pytest.raises(DataError, match=r"there is no .*a\.jsonl"):
        list(read_documents(Part(file), Reading()))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path):
    """(folder, its address) by Python's own server, which gives no ranges."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_are_read_over_http_also_where_the_server_gives_no_ranges(served):
    folder, url = served
    texts = [f"text {i} " + "x" * 200 for i in range(30_000)]  # 6 MB: more than one block
    (folder / "a.jsonl").write_bytes(jsonl(texts))
    (folder / "b.parquet").write_bytes(parquet(pa.table({"text": texts}), rows=10_000))
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"small"))
    for name in ("a.jsonl", "b.parquet"):
        assert read(f"{url}/{name}") == (texts, [], [])
        [unit] = units_of(find_files(f"{url}/{name}"))
        assert len(unit.parts) == 1
    assert read(f"{url}/c.txt.gz")[0] == ["small"]
    assert len(find_files(f"{url}/*.jsonl")) == 1
    (folder / "d.jsonl").write_bytes(jsonl(["fine"]) + b"torn\n")
    [file] = find_files(f"{url}/d.jsonl")
    *_, bad = read_documents(Part(file), Reading())
    assert message(file, bad).startswith(f"{url}/d.jsonl:2 is no JSON")
    with pytest.raises(DataError, match="there is no"):
        find_files(f"{url}/nothing.jsonl")


def test_a_store_that_fails_is_an_error_that_may_pass(tmp_path):
    file = File("http://127.0.0.1:9/a.jsonl", "http://127.0.0.1:9/a.jsonl", 5, None)
    with pytest.raises(StorageError):
        list(read_documents(Part(file), Reading()))


def test_any_address_of_fsspec_names_files_and_globs():
    fs = fsspec.filesystem("memory")
    fs.pipe({"/sources/a.jsonl": jsonl(["a"]), "/sources/deep/b.parquet": parquet(pa.table({"text": ["b"]})), "/sources/c.bin": b"no"})
    assert read("memory://sources")[0] == ["a", "b"]
    assert read("memory://sources/**/*.parquet")[0] == ["b"]
    fs.rm("/sources", recursive=True)


def test_a_missing_package_is_named(monkeypatch):
    known = sys.modules["fsspec.registry"]
    monkeypatch.setitem(known.known_implementations, "hf", {"class": "no_such_package.Fs", "err": "it is not installed"})
    monkeypatch.delitem(known._registry, "hf", raising=False)
    with pytest.raises(DataError, match="install huggingface_hub"):
        find_files("hf://datasets/a/b")


def test_small_files_go_together_large_ones_in_parts_and_a_new_file_disturbs_few_units():
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.pareto(0.7, 2000) * 20_000 + 1, 4e7).astype(int)
    files = [File("/x", f"/x/{i:05d}.jsonl", int(size), "v") for i, size in enumerate(sizes)]
    units = units_of(files)
    assert [p for u in units for p in u.parts] == [
        Part(f, i, next(q.of for u in units for q in u.parts if q.file == f))
        for f in files
        for i in range(next(q.of for u in units for q in u.parts if q.file == f))
    ]
    weights = [unit.weight for unit in units]
    assert max(weights) <= 3_000_000 and len(units) <= 2.5 * sum(sizes) / 2_000_000
    more = units_of(sorted([*files, File("/x", "/x/01000b.jsonl", 5, "v")]))
    assert len(set(more) - set(units)) <= 8


def test_units_of_very_much_data_are_not_endless():
    files = [File("/x", f"/x/{i}.parquet", 10**9, "v") for i in range(1000)]
    assert 1000 <= len(units_of(files)) <= 5000
