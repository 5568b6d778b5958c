"""Sources: every format, every kind of broken input, and the split into two disjoint sets."""

import gzip
import json
import lzma
import pickle

import numpy as np
import pytest

from peft_pretraining.data.sources import c4, files, pydocs
from peft_pretraining.data.sources import split as splitting
from peft_pretraining.data.sources.c4 import C4Documents, open_c4
from peft_pretraining.data.sources.files import open_files
from peft_pretraining.data.sources.pydocs import open_pydocs
from peft_pretraining.data.sources.registry import open_source
from peft_pretraining.data.sources.split import split_documents
from peft_pretraining.errors import UserError
from peft_pretraining.utils import cache

TEXTS = ["first document", "second: naïve 東京 🙂\nwith a second line", "third"]
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def write(path, text):
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # Two frames, as parallel compressors write them.
        half = len(text) // 2
        packed = [
            zstandard.ZstdCompressor().compress(part.encode())
            for part in (text[:half], text[half:])
        ]
        path.write_bytes(b"".join(packed))
    else:
        with OPENERS.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


def json_lines(texts):
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)


def parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def mirror(folder, shards=5, each=7, validation=4):
    (folder / "en").mkdir(parents=True)
    for shard in range(shards):
        write(
            folder / f"en/c4-train.{shard:05d}-of-{shards:05d}.json.gz",
            json_lines(f"shard {shard} document {i}" for i in range(each)),
        )
    if validation:
        write(
            folder / "en/c4-validation.00000-of-00001.json.gz",
            json_lines(f"validation document {i}" for i in range(validation)),
        )
    return folder


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def read(path):
    return list(open_files(path).train)


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_json_lines_read_back_equal(tmp_path, kind, packing):
    assert read(write(tmp_path / f"a{kind}{packing}", json_lines(TEXTS))) == TEXTS


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_text_files_part_at_blank_lines(tmp_path, packing):
    assert read(write(tmp_path / f"a.txt{packing}", "\n\n".join(TEXTS) + "\n\n")) == TEXTS


def test_text_file_without_blank_line_holds_a_document_a_line(tmp_path):
    assert read(write(tmp_path / "a.txt", "one\ntwo\nthree\n\n\n")) == ["one", "two", "three"]


def test_parquet_reads_back_equal(tmp_path):
    assert read(parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": TEXTS})) == TEXTS


def test_folder_is_read_recursively_in_the_order_of_names(tmp_path):
    for name in ("b/z", "b/a", "a", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", json_lines([name]))
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden/x.jsonl", json_lines(["hidden"]))
    (tmp_path / "notes.md").write_text("no corpus")
    assert read(tmp_path) == ["a", "b/a", "b/z", "c"]


@pytest.mark.parametrize("name", ["validation", "val"])
def test_folder_brings_its_own_split(tmp_path, name):
    for part, texts in (("train", [*TEXTS, "held"]), (name, ["held"])):
        (tmp_path / part).mkdir()
        write(tmp_path / part / "a.jsonl", json_lines(texts))
    split = split_documents(open_source(str(tmp_path), 0))
    assert list(split.train) == TEXTS and list(split.validation) == ["held"]


def test_blank_documents_are_left_out_and_lone_surrogates_replaced(tmp_path):
    path = write(
        tmp_path / "a.jsonl", json_lines(["", " \n", "a"]) + '{"text": "half \\ud83d pair"}\n\n'
    )
    assert read(path) == ["a", "half \ufffd pair"]


def test_missing_file(tmp_path):
    assert "no such file" in error_of(open_source, str(tmp_path / "nowhere.jsonl"), 0)
    assert "--dataset pydocs" in error_of(open_source, str(tmp_path / "nowhere.jsonl"), 0)


def test_folder_without_readable_file(tmp_path):
    (tmp_path / "a.md").write_text("x")
    assert "no readable file" in error_of(open_source, str(tmp_path), 0)
    assert ".jsonl.zst" in error_of(open_source, str(tmp_path / "a.md"), 0)


def test_empty_corpus(tmp_path):
    assert "no document" in error_of(
        open_source, str(write(tmp_path / "a.jsonl", json_lines([" "]))), 0
    )


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{broken", "not valid JSON (Expecting property name"),
        ('["text"]', "the line is a JSON list, not an object; write one object"),
        ('"text"', "the line is not a JSON object; write one object"),
        ('{"text": 3}', "the field `text` holds a number, not a string"),
        ('{"text": null}', "the field `text` holds null, not a string"),
        ('{"text": {"a": 1}}', "the field `text` holds an object, not a string"),
        ('{"txt": "a", "id": 3}', "no field `text` (its fields: 'txt', 'id')"),
        ("{}", "no field `text` (its fields: none)"),
        ('{"text": "a", "x": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    ],
    ids=range(9),
)
def test_bad_record_names_file_and_line(tmp_path, line, problem):
    path = write(tmp_path / "a.jsonl.gz", json_lines(TEXTS) + line + "\n")
    message = error_of(lambda: list(files.read_file(path)))
    assert message.startswith(f"{path}, line 4: ") and problem in message


def test_an_integer_of_thousands_of_digits_in_another_field_does_not_matter(tmp_path):
    line = f'{{"id": {"7" * 5_000}, "text": "here"}}\n'
    assert read(write(tmp_path / "a.jsonl", line)) == ["here"]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", gzip.compress(b'{"text": "a"}'), "a.jsonl holds gzip data, not what its name "
         "says: rename it to a.jsonl.gz."),
        ("a.jsonl", lzma.compress(b'{"text": "a"}'), "rename it to a.jsonl.xz."),
        ("a.jsonl.gz", lzma.compress(b'{"text": "a"}'), "is not gz data, although its name ends"),
        ("a.jsonl.gz", b'{"text": "a"}', "is not gz data, although its name ends in .gz: rename it "
         "to a.jsonl, or fetch it again."),
        ("a.txt", b"PK\x03\x04rest", "holds a zip archive, not what its name says: unpack it"),
        ("a.json", b"BZh91AY", "holds bzip2 data"),
        ("a.jsonl", b"PAR1rest", "holds Parquet data, not what its name says: rename it to "
         "a.parquet."),
        ("a.parquet", b"PARErest", "holds encrypted Parquet data"),
        ("a.parquet", b'{"text": "a"}', "cannot be read as Parquet"),
        ("a.txt", b"\0" * 257 + b"ustar" + b"\0" * 300, "is a tar archive: unpack it"),
        ("a.txt", "naïve".encode("utf-16"), "is UTF-16 text, and only UTF-8 is read: convert it "
         "with `iconv -f UTF-16 -t UTF-8 a.txt`."),
        ("a.txt", "one\nnaïve\n".encode("latin-1"), "a.txt, line 2: byte 0xef is not UTF-8 text; "
         "if the file is in another encoding, convert it, for instance with `iconv -f LATIN1"),
        ("a.jsonl.gz", gzip.compress('{"text": "naïve"}'.encode("latin-1")), "line 1: byte 0xef"),
        ("a.json", b'[\n{"text": "a"},\n{"text": "b"}\n]', "line 1: the file is one JSON value "
         "over several lines; write one object a line, for instance with `jq -c"),
        ("a.json", b'[{"text": "a"}]', "line 1: the line is a JSON list"),
        ("a.json", b'{\n"text": "a"\n}', "the file is one JSON value over several lines"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "cannot be read to its end: "
         "it ends too early, so it was cut short; fetch it again."),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-8] + b"damaged.", "its data is "
         "damaged"),
    ],
    ids=range(18),
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = error_of(read, tmp_path / name)
    assert expected in message and message.startswith(str(tmp_path / name))


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    assert "cannot be opened (Permission denied): make it readable" in error_of(read, path)


def test_bad_parquet(tmp_path):
    assert "no column `text` among id" in error_of(
        read, parquet(tmp_path / "a.parquet", {"id": [1]})
    )
    assert "row 1" in error_of(read, parquet(tmp_path / "b.parquet", {"text": ["a", None]}))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet at all")
    assert "c.parquet cannot be read as Parquet" in error_of(read, tmp_path / "c.parquet")


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_broken_compression(tmp_path, packing):
    path = write(
        tmp_path / f"a.jsonl{packing}", json_lines(f"{i} {i * 7919 % 1000}" for i in range(20_000))
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    assert f"{path} cannot be read to its end" in error_of(read, path)


def test_hash_split_is_disjoint_complete_and_stable(tmp_path):
    texts = [f"document {i % 1500}" for i in range(2000)]
    split = split_documents(
        open_files(write(tmp_path / "a.jsonl", json_lines(texts))), fraction=0.1
    )
    train, held_out = list(split.train), list(split.validation)
    assert not set(train) & set(held_out) and sorted(train + held_out) == sorted(texts)
    assert 0.07 < len(held_out) / len(texts) < 0.13
    # Written down once: other numbers would move documents between the sets of a run that is
    # continued.
    assert [i for i in range(60) if splitting.is_in_fraction(f"document {i}", 0.1)] == [
        2,
        10,
        17,
        37,
        57,
    ]


def test_validation_file_takes_its_documents_out_of_training(tmp_path):
    source = open_files(write(tmp_path / "a.jsonl", json_lines(TEXTS)))
    held_out = write(tmp_path / "b.jsonl", json_lines([TEXTS[1], "other"]))
    split = split_documents(source, str(held_out))
    assert list(split.train) == [TEXTS[0], TEXTS[2]] and list(split.validation) == [
        TEXTS[1],
        "other",
    ]
    assert "--validation_file" in error_of(split_documents, source, str(tmp_path / "c.jsonl"))


def test_c4_mirror_orders_shards_by_the_seed_and_keeps_the_order_within(tmp_path):
    source = open_source(str(mirror(tmp_path)), 3)
    texts = list(source.train)
    shards = [int(text.split()[1]) for text in texts[::7]]
    assert source.streamed and sorted(shards) == list(range(5)) and shards != list(range(5))
    assert (
        texts
        == [f"shard {shard} document {i}" for shard in shards for i in range(7)]
        == list(source.train)
    )
    assert texts != list(open_source(str(tmp_path), 4).train) and sorted(texts) == sorted(
        open_source(str(tmp_path), 4).train
    )
    assert list(source.validation) == [f"validation document {i}" for i in range(4)]
    assert list(pickle.loads(pickle.dumps(source.train))) == texts


def test_c4_mirror_reads_a_shard_from_any_document_on(tmp_path):
    documents = open_source(str(mirror(tmp_path, each=2500)), 3).train
    order, whole = np.random.Generator(np.random.PCG64(3)).permutation(5), list(documents)
    assert documents.n_shards == 5 and not documents.remote and C4Documents(None, "train", 0).remote
    for shard in (0, 3):
        for skip in (0, 1, 999, 1000, 1001, 2400, 2500, 2501):
            assert (
                list(documents.read(shard, skip)) == whole[2500 * shard : 2500 * (shard + 1)][skip:]
            )
    for other in order[1:]:
        (tmp_path / f"en/c4-train.{other:05d}-of-00005.json.gz").unlink()
    assert (
        len(list(pickle.loads(pickle.dumps(documents)).read(0, 2000))) == 500
    )  # no other shard is opened


def test_c4_of_the_hub_is_asked_once_for_its_files_and_lets_network_errors_through(
    tmp_path, monkeypatch
):
    import datasets

    files = [str(path) for path in c4.mirror_files(mirror(tmp_path), "train")]
    opened, load = [], datasets.load_dataset

    def hub(*_, **__):
        opened.append(True)
        return load("json", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    documents = pickle.loads(pickle.dumps(open_c4(None, 0).train))
    assert len(list(documents)) == 35 and len(opened) == 1

    failures, read_batches = (
        [ConnectionError("the line is down"), EOFError()],
        datasets.IterableDataset.iter,
    )

    def unsteady(*arguments, **options):
        if failures:
            raise failures.pop()
        return read_batches(*arguments, **options)

    monkeypatch.setattr(datasets.IterableDataset, "iter", unsteady)
    with pytest.raises(EOFError):
        next(documents.read(0, 0))
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    assert len(list(documents)) == 35 and pauses == [1]


def test_c4_mirror_without_validation(tmp_path):
    source = open_source(str(mirror(tmp_path, validation=0)), 0)
    assert "--validation_file" in error_of(lambda: list(source.validation))


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b'{"url": "x"}\n'),
        gzip.compress(b'{"text": null}\n{"text": "a"}\n'),
        None,
    ],
    ids=["no gzip", "no text", "text is null", "cut short"],
)
def test_c4_mirror_with_a_broken_shard(tmp_path, content):
    shard = mirror(tmp_path) / "en/c4-train.00002-of-00005.json.gz"
    shard.write_bytes(shard.read_bytes()[:-20] if content is None else content)
    assert "C4 mirror" in error_of(lambda: list(C4Documents(tmp_path, "train", 0)))


def test_c4_without_network(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match="could not be reached for allenai/c4.*--dataset pydocs.*--dataset FILE"
    ) as caught:
        open_c4(None, 0)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_pydocs_are_distinct_docstrings_in_a_fixed_order_and_cached(tmp_path, monkeypatch):
    packages = ("json", "email", "a_package_nobody_has")
    texts = list(open_pydocs(tmp_path, packages).train)
    assert any(text.startswith("JSON (JavaScript Object Notation)") for text in texts)
    assert len(texts) == len(set(texts)) > 50 and min(map(len, texts)) >= 100
    (cached,) = tmp_path.iterdir()
    content = cached.read_bytes()
    assert content[4:8] == bytes(4)  # no time in gzip's header
    cached.unlink()
    open_pydocs(tmp_path, packages)
    assert cached.read_bytes() == content
    monkeypatch.setattr(pydocs, "_collect", lambda *_: pytest.fail("gathered twice"))
    assert list(open_pydocs(tmp_path, packages).train) == texts
    monkeypatch.setattr(pydocs, "package_versions", lambda _: {"json": "99"})
    with pytest.raises(
        pytest.fail.Exception, match="gathered twice"
    ):  # other versions, another cache
        open_pydocs(tmp_path, packages)


def test_pydocs_keep_one_of_equal_docstrings_in_the_order_of_the_files(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("b.py", "a.py", "c.py")]
    for file, word in zip(files, ("one ", "two ", "one "), strict=True):
        file.write_text(f'"""{word * 30}"""\n')
    monkeypatch.setattr(pydocs, "package_files", lambda _: files)
    assert list(open_pydocs(tmp_path, ("json",)).train) == [
        ("one " * 30).strip(),
        ("two " * 30).strip(),
    ]


def test_files_that_do_not_parse_give_no_docstring(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(f'def f():\n    """{"long " * 30}"""\n')
    assert pydocs.docstrings(path) == [("long " * 30).strip()]
    path.write_text("def f(:\n")
    assert pydocs.docstrings(path) == []


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("ALPHADECAY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg/alphadecay"
    monkeypatch.setenv("ALPHADECAY_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
    assert cache.cache_folder(tmp_path / "given") == tmp_path / "given"
    (tmp_path / "file").write_text("")
    assert "ALPHADECAY_CACHE" in error_of(cache.cache_folder, tmp_path / "file")
