"""The paper's text filters (section 2.2), as pure functions: split, count characters, repair.

A document is cut into pieces at single spaces; a piece that says too little is dropped; what stays is repaired.
"""

from __future__ import annotations

import re
import string
import unicodedata

import ftfy
from ftfy.badness import is_bad

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# ASCII that ftfy never touches: all but control characters, and "&", which may begin an HTML entity.
_PLAIN_ASCII = bytes(b for b in range(128) if b in b"\t\n\x0c" or (32 <= b < 127 and b != ord("&")))
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
# Every character that one of ftfy's steps replaces or removes on sight, wherever it stands.
_REPLACED = re.compile(
    "[\x00-\x08\x0b\x0d-\x1f\x7f-\x9f"  # controls, carriage returns, C1 controls
    "\u02bc\u2018-\u201f"  # curly quotation marks
    "\u2028\u2029"  # line and paragraph separators
    "\u206a-\u206f\ufeff\ufff9-\ufffc"  # deprecated format characters, byte-order mark, object replacement
    "\u0132\u0133\u0149\u01f1-\u01f3\u01c4-\u01cc\ufb00-\ufb06"  # Latin ligatures
    "\u3000\uff01-\uffef"  # full and half widths
    "\ud800-\udfff]"
)
# ftfy cuts longer lines arbitrarily, so they are left to it.
_LONG_LINE = 1_000_000


def split_pieces(text: str, words: int) -> list[str]:
    """The document in pieces of ``words`` words, words being what stands between single spaces."""
    if text.count(" ") < words:
        return [text]
    parts = text.split(" ")
    return [" ".join(parts[i : i + words]) for i in range(0, len(parts), words)]


def utf8_bytes(text: str) -> int:
    """Bytes of the text in UTF-8, the unit of bits per byte."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def normalized_characters(text: str) -> int:
    """Characters of the lower-case text without ASCII punctuation, runs of white space counted as one."""
    return len(" ".join(text.lower().translate(_NO_PUNCTUATION).split()))


def has_characters(text: str, minimum: int) -> bool:
    """Whether ``normalized_characters(text) >= minimum``, reading no more of a long text than needed."""
    head = max(1024, 8 * minimum)
    # Appending text never lowers the count, so a beginning that is long enough decides.
    if len(text) > head and normalized_characters(text[:head]) >= minimum:
        return True
    return normalized_characters(text) >= minimum


def repair(text: str) -> str:
    """``ftfy.fix_text(text)`` (NFC), calling ftfy for those lines only that it could change."""
    if text.isascii() and _unchanged(text):
        return text
    fixed = []
    entities: str | bool = "auto"
    for line in _lines(text):
        fixed.append(line if _unchanged(line) else ftfy.fix_text(line, unescape_html=entities))
        # As ftfy does: from the first "<" on, "&amp;" is taken for mark-up and kept.
        if "<" in line:
            entities = False
    return "".join(fixed)


def _lines(text: str) -> list[str]:
    """Lines with their ends, at line feeds alone."""
    parts = text.split("\n")
    return [part + "\n" for part in parts[:-1]] + parts[-1:]


def _unchanged(text: str) -> bool:
    """Whether ftfy surely leaves a line, or any ASCII text, as it is (False says nothing)."""
    if text.isascii():
        odd = text.encode("ascii").translate(None, _PLAIN_ASCII)
        return not odd.strip(b"&") and (not odd or not _ENTITY.search(text))
    return (
        len(text) <= _LONG_LINE
        and not _REPLACED.search(text)
        and not _ENTITY.search(text)
        and unicodedata.is_normalized("NFC", text)
        and not is_bad(text)
    )
