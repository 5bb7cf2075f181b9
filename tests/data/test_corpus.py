"""What a corpus may be, and what every bad one is told."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.data import corpus as corpus_module
from latentforge.data import index
from latentforge.data.corpus import Corpus, Document, Entry, read
from latentforge.data.split import is_heldout
from latentforge.errors import RefusedError
from latentforge.evidence.digests import tree_sha256


def refusal(ref: str | Path) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        Corpus.open(ref)
    assert caught.value.next, "a refusal names the remedy"
    return caught.value


def entries_of(ref: str | Path) -> list[Entry]:
    corpus = Corpus.open(ref)
    return [*corpus.entries(heldout=False), *corpus.entries(heldout=True)]


def documents(ref: str | Path) -> list[Document]:
    return sorted((read(entry) for entry in entries_of(ref)), key=lambda document: document.name)


def test_the_builtin_corpus_is_the_standard_librarys_own_sources() -> None:
    corpus = Corpus.open("stdlib")
    found = {entry.name: entry for entry in entries_of("stdlib")}
    names = list(found)
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]
    text = read(found["argparse.py"]).text
    assert text == (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    assert Corpus.open("stdlib").sha256 == corpus.sha256


def test_a_folder_is_read_by_relative_path_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "sub" / "a.py").write_text("a")
    (tmp_path / "image.png").write_bytes(b"\xff\xd8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    corpus = Corpus.open(tmp_path)
    assert [(d.name, d.text) for d in documents(tmp_path)] == [
        ("b.md", "b"),
        ("lines.jsonl#000000001", "one"),
        ("lines.jsonl#000000003", "two"),
        ("sub/a.py", "a"),
    ]
    assert (corpus.kind, corpus.files, corpus.empty) == ("folder", 4, 1)
    assert corpus.sha256 == tree_sha256(tmp_path), "the digest by which the run names its corpus"


def test_a_lone_text_file_is_cut_into_pieces_that_are_the_whole_file(tmp_path: Path) -> None:
    paragraphs = "".join(f"Paragraph {n}: {'grüße ' * (n % 90)}\n\n" for n in range(400))
    (tmp_path / "a.txt").write_text(paragraphs, encoding="utf-8")
    pieces = documents(tmp_path / "a.txt")
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == paragraphs


def test_renaming_a_corpus_file_changes_no_document(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n{"text": "y"}\n')
    assert documents(tmp_path / "a.jsonl") == documents(tmp_path / "b.jsonl")


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path / "absent")
    assert "absent" in str(error)
    assert "does not exist" in str(error)


def test_a_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"x")
    assert "holds no .txt" in str(refusal(tmp_path))


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert "no text" in str(refusal(tmp_path / name))


def test_a_folder_of_empty_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("\n")
    assert "no text" in str(refusal(tmp_path))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    assert "neither a folder nor a .txt or .jsonl" in str(refusal(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ('["text"]', 'line 2 has no "text" (it has: list)'),
        ('{"txt": "a"}', "line 2 has no \"text\" (it has: 'txt')"),
        ('{"text": 5}', 'line 2: "text" is int, not a string'),
        ('{"text": "\\ud800"}', 'line 2: "text" holds a lone surrogate'),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    assert said in str(refusal(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "folder/a.py"])
def test_text_that_is_not_utf8_is_named_with_byte_and_offset(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"gr\xfc\xdfe")
    error = refusal(path.parent if "/" in name else path)
    assert "is not UTF-8: byte 0xfc at offset 2" in str(error)


def test_a_file_that_changes_after_it_was_indexed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    corpus = Corpus.open(tmp_path)
    (tmp_path / "a.txt").write_text("after!")
    with pytest.raises(RefusedError, match="changed while it was read"):
        [read(entry) for side in (False, True) for entry in corpus.entries(heldout=side)]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n{"text": "c"}')
    assert [d.text for d in documents(tmp_path / "a.txt")] == ["a"]
    assert [d.text for d in documents(tmp_path / "a.jsonl")] == ["b", "c"]
    assert [d.text for d in documents(tmp_path)] == ["b", "c", "a"]


@given(texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=40), ascii=st.booleans())
def test_json_lines_give_back_every_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii: bool
) -> None:
    path = tmp_path_factory.mktemp("c") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=ascii) + "\n" for t in texts), encoding="utf-8")
    wanted = [text for text in texts if text.strip()]
    if wanted:
        assert [document.text for document in documents(path)] == wanted
    else:
        refusal(path)


@given(names=st.lists(st.uuids().map(str), min_size=2, max_size=30, unique=True), data=st.data())
def test_order_and_split_depend_on_each_document_alone(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("c")
    for name in names:
        (folder / f"{name}.txt").write_text(data.draw(st.sampled_from(["a", "b", "c", name])))
    corpus = Corpus.open(folder)
    train, heldout = list(corpus.entries(heldout=False)), list(corpus.entries(heldout=True))
    assert sorted(e.name for e in train + heldout) == sorted(f"{name}.txt" for name in names)
    assert (corpus.index.count(heldout=False), corpus.index.count(heldout=True)) == (len(train), len(heldout))
    assert not {e.sha256 for e in train} & {e.sha256 for e in heldout}, "copies of one text fall on one side"
    assert all(is_heldout(e.sha256) for e in heldout)
    for side in (train, heldout):
        assert side == sorted(side, key=lambda e: hashlib.sha256(e.name.encode()).digest())
    for name in names[::2]:
        (folder / f"{name}.txt").unlink()
    kept = {f"{name}.txt" for name in names[1::2]}
    if kept:
        left = [e.name for e in Corpus.open(folder).entries(heldout=False)]
        assert left == [e.name for e in train if e.name in kept], "more documents move none"


def test_an_index_larger_than_memory_holds_has_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(1000))
    (tmp_path / "a.jsonl").write_text(lines)
    wanted = entries_of(tmp_path)
    monkeypatch.setattr(index, "_SORTED_AT_ONCE", 7)
    monkeypatch.setattr(index, "_READ_AT_ONCE", 3)
    assert entries_of(tmp_path) == wanted
    assert len(wanted) == 1000
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_a_file_is_checked_in_blocks_as_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(corpus_module, "_BLOCK", block)
    (tmp_path / "a.txt").write_text("\ufeffgrüße 日本 \U0001f680", encoding="utf-8")
    assert documents(tmp_path)[0].text == "grüße 日本 \U0001f680"
    for content, at, byte in ((b"ab\xe6\x97\xff", 2, "e6"), (b"abc\xf0\x9f", 3, "f0"), (b"\xef\xbb\xbfa\xff", 4, "ff")):
        (tmp_path / "a.txt").write_bytes(content)
        assert f"a.txt is not UTF-8: byte 0x{byte} at offset {at}" in str(refusal(tmp_path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus_module, "open", denied, raising=False)
    assert "a.txt: Permission denied" in str(refusal(tmp_path))


def test_reading_tells_bytes_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n\n{"text": "c"}\n')
    told: list[tuple[int, int]] = []
    corpus = Corpus.open(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (corpus.bytes, corpus.bytes)
    assert corpus.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
