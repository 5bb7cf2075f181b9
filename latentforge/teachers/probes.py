"""Texts on which tokenizers that look alike show what they do differently."""

from __future__ import annotations

PROBE_TEXTS: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog.",
    "it's I'M they'Ll we'd won't 'tis rock'n'roll",  # contractions, either case
    "0 12 345 6789 1234567890 3.14159 1,000,000 0x1F ½ ²",  # how digits are grouped
    "a  b   c    d\tе\n\n\n  e \r\n f\x0bg\u00a0h\u2003i\u3000j",  # runs of blanks, line ends, other spaces
    " leading and trailing ",
    "",
    "é e\u0301 Å A\u030a ｆｕｌｌ ﬁ ﷺ \u1e9b\u0323",  # composed and decomposed, full width, ligatures
    "İstanbul ǅ ß ẞ ΑΣ ΣΑ straße",  # letters whose case folds oddly
    "def f(x):\n    return x**2 # комментарий\n\tif (a&&b)||c{d}[e]<f>",
    "snake_case camelCase SCREAMING_CASE kebab-case a.b.c C++ C# ...!!!???---===",
    "日本語のテキストと漢字、中文文本。한국어 텍스트",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "😀👩‍👩‍👧‍👦🏳️‍🌈👍🏽 e\u20e3 \U0001f468\u200d\U0001f4bb",  # joined, tinted, with variation selectors
    "\ufeffmark \u200bzero\u200dwidth\u00adsoft \u202eright-to-left\u202c",
    "\x00\x01\x1b[31m\x7f\u0085\u2028\u2029 \ufffd \ufffe \U0010ffff",  # controls, replacement, non-characters
    "<|endoftext|><s></s><pad>[CLS][SEP]<0x0A>▁under▁score ĠĊ",  # text that looks like tokens
    "http://user:pw@example.org:8080/a/b?c=d&e=%20#f me@example.org",
    "Tel. +49 (30) 123-456 | 12:34:56 | 2026-11-21T19:16:10Z | $1.50 €2 £3 ¥4",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "x" + " " * 77 + "y" + "\n" * 33 + "z" + "\t" * 9,
)
