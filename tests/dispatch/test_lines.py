"""Log bytes become lines without losing, doubling or trusting anything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dispatch.following.lines import LINE_CAP, LineReader, harmless

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)


def read(chunks: list[bytes]) -> list[str]:
    reader = LineReader()
    lines = [line for chunk in chunks for line in reader.feed(chunk)]
    return lines + list(reader.feed(b"", final=True))


@given(st.lists(TEXT, max_size=10), st.data())
def test_lines_do_not_depend_on_where_the_bytes_are_cut(lines: list[str], data: st.DataObject) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=12)))
    chunks = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert read(chunks) == lines


def test_a_carriage_return_ends_a_line_and_crlf_is_one_end() -> None:
    assert read([b"10%\r20%\r", b"\ndone\r\nnext"]) == ["10%", "20%", "done", "next"]


def test_bytes_that_are_not_utf8_are_replaced_not_raised() -> None:
    assert read([b"a\xff\xc3", b"\xa9b\n"]) == ["a\ufffdéb"]


def test_a_log_cannot_move_the_cursor_or_set_the_title() -> None:
    assert harmless("\x1b[2J\x1b[31mred\x1b[0m \x9b5Aend") == "red 5Aend"
    for evil in ("\x1b", "\x07", "\x9b", "\x08", "\x00"):
        assert evil not in harmless(f"a{evil}[2Jb{evil}")


def test_an_endless_line_is_cut_with_a_mark_and_the_next_line_is_whole() -> None:
    lines = read([b"x" * LINE_CAP, b"x" * LINE_CAP, b"x\nnext\n"])
    assert lines[0].endswith("… (line cut at 64 KiB)")
    assert lines[-1] == "next"
    assert len(lines) == 2


def test_a_megabyte_at_once_gives_the_lines_that_it_gives_in_small_pieces() -> None:
    pieces = [b"plain words\n" * 30_000, b"\n\n", b"y" * (LINE_CAP + 5), b"\n", b"\xe2\x80\xae turned\r\n", b"tail"]
    content = b"".join(pieces) * 2 + b"plain\n" * 100
    small = read([content[at : at + 777] for at in range(0, len(content), 777)])
    assert read([content]) == small
    assert len(small) == content.count(b"\n")
    assert sum(line.endswith("… (line cut at 64 KiB)") for line in small) == 2
