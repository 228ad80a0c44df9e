"""The paper's filters: repair is ftfy's to the letter, and the shortcuts never change an answer."""

import random
import string

import ftfy
import pytest

from openelm.data import filters
from openelm.data.filters import has_characters, normalized_characters, repair, split_pieces

# What ftfy's steps look at: quotes, entities, mark-up, line ends, controls, escapes, accents, surrogates, mojibake.
NASTY_WORDS = (
    "\r\n \x00 \x0b \x0c \x1a \x1b \x1c \x7f \x80 \x85 \x9d \xa0 \xad "
    "\x1b[31m \x1b[0;1m &amp; &AMP; &lt; &eacute; &EACUTE; &#39; &#x2019; &#0; &nosuch; &amp;amp; &amp "
    "‘ ’ “ ” ‚ „ ʼ \u2028 \u2029 \u206a \ufeff \ufff9 \ufffc \ufffd "
    "ĳ ŉ ǆ ﬁ ﬆ Ａ ！ \u3000 ｱ ﾞ ￦ 한 \u1100 \u1161 "
    "e\u0301 \u0301 \u0327 \u0344 \u212b \u2126 é É ü Ø 好 \U0001f600 \U0001d15e "
    "\ud83d \udca9 \ud83d\udca9 \udca9\ud83d "
    "Ã© Ã â€™ â€œ â€\x9d Â Â\xa0 ÃƒÂ© Ð¡ вЂ™ ‚Äô √© à² œ € £ ¤ ¬ ° ± ² ½ § ¶ │ ═ █ α Σ Β€ ā€ ï¿½ â€ï¿½ "
)
NASTY = [*"ab AZ09.,;&<>#'\"\\/\t\n\n\r", *NASTY_WORDS.split(" ")]


def differences(texts: list[str]) -> list[tuple[str, str, str]]:
    return [(text, ours, theirs) for text in texts if (ours := repair(text)) != (theirs := ftfy.fix_text(text))]


def every_character(step: int) -> list[str]:
    return [f"a{chr(code)}b" for code in range(0, 0x10000, step)]


def test_repair_is_ftfy_for_every_character_of_latin_and_a_part_of_the_others() -> None:
    assert not differences([f"a{chr(code)}b" for code in range(0x600)])
    assert not differences([f"a{chr(code)}b" for code in range(0x2000, 0x2100)])
    assert not differences([f"a{chr(code)}b" for code in range(0xFB00, 0x10000)])
    assert not differences(every_character(step=17))


@pytest.mark.slow  # all 65,536 characters of the BMP, alone, between letters and after an accented letter
def test_repair_is_ftfy_for_every_character_of_the_bmp() -> None:
    assert not differences(every_character(step=1))
    assert not differences([f"é{chr(code)}" for code in range(0x10000)])
    assert not differences([chr(code) for code in range(0x10000, 0x110000, 3)])


def test_repair_is_ftfy_for_random_nasty_texts() -> None:
    draw = random.Random(1)
    texts = ["".join(draw.choices(NASTY, k=draw.randint(1, 12))) for _ in range(3000)]
    texts += ["".join(draw.choices([*NASTY, *string.ascii_letters * 5], k=60)) for _ in range(300)]
    assert not differences(texts)


@pytest.mark.slow  # two hundred thousand random texts
def test_repair_is_ftfy_for_many_random_nasty_texts() -> None:
    draw = random.Random(2)
    for _ in range(200):
        assert not differences(["".join(draw.choices(NASTY, k=draw.randint(1, 12))) for _ in range(1000)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "plain & simple\nAT&T; &c.\n",
        "&amp; before\n<b> &amp; same line\n&amp; after\n",
        "é &amp; before\né <b> &amp; same line\né &amp; after\n",
        "ends with an entity &lt;\nand then &amp;\n",  # "&lt;" becomes "<" without being mark-up
        "<p>&eacute;</p>\nclear é line\n&eacute;",
        "one\r\ntwo\rthree\x0b\x0cfour\x1cfive\x1dsix\x85seven\u2028eight\n",
        "\x1b[1mbold\x1b[0m\n\x1b lone\n",
        "ã\x83\x84 on one line\nand é on another, â€™ on a third\n",
    ],
)
def test_repair_is_ftfy_line_by_line(text: str) -> None:
    assert repair(text) == ftfy.fix_text(text)


def test_mark_up_late_in_a_very_long_line_does_not_keep_the_entities_before_it() -> None:
    """ftfy cuts such lines at a million characters and looks for "<" in each part."""
    text = "&amp; é" + "a" * 1_000_100 + "<b> &amp;\n&amp; é\n"
    repaired = repair(text)
    assert repaired == ftfy.fix_text(text)
    assert repaired.startswith("& é") and repaired.endswith("&amp;\n&amp; é\n")


def test_clean_text_is_not_given_to_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters.ftfy, "fix_text", lambda *_, **__: pytest.fail("ftfy was called"))
    clean = 'def f(x):\n\treturn {"a": x & 1}  # naïve, 好\n\x0c\n'
    assert repair(clean) == clean


def test_has_characters_agrees_with_the_full_count_around_the_threshold() -> None:
    draw = random.Random(3)
    alphabet = ["a", "B", " ", "  ", "\n", "\t", ".", "!", "-", "é", "İ", "ß", "Σ", "\xa0", "\u3000", "…", "好"]
    for _ in range(600):
        text = "".join(draw.choices(alphabet, weights=[draw.random() ** 4 for _ in alphabet], k=draw.randint(0, 3000)))
        count = normalized_characters(text)
        for minimum in (0, 1, count - 1, count, count + 1, 200):
            assert has_characters(text, minimum) == (count >= minimum)


def test_has_characters_reads_on_where_a_long_beginning_says_nothing() -> None:
    assert has_characters("." * 100_000 + "a" * 200, 200)
    assert not has_characters("." * 100_000 + "a" * 199, 200)


def test_normalized_characters_by_hand() -> None:
    assert normalized_characters("  Hello,\n\n\tWORLD! - ok  ") == len("hello world ok")
    assert normalized_characters("«a»") == 3  # only ASCII punctuation is removed
    assert normalized_characters("?!") == 0


def test_pieces_are_cut_at_single_spaces_and_lose_only_those() -> None:
    assert split_pieces("", 2) == [""]
    assert split_pieces("a b", 2) == ["a b"]
    assert split_pieces("a b c", 2) == ["a b", "c"]
    assert split_pieces("a  b\nc d", 2) == ["a ", "b\nc d"]  # what stands between two spaces is an empty word
    assert split_pieces("a b ", 2) == ["a b", ""]
    draw = random.Random(4)
    for _ in range(300):
        text = "".join(draw.choices("ab \n", k=draw.randint(0, 60)))
        words = draw.randint(1, 9)
        pieces = split_pieces(text, words)
        assert " ".join(pieces) == text
        assert [piece.count(" ") + 1 for piece in pieces[:-1]] == [words] * (len(pieces) - 1)
        assert pieces[-1].count(" ") + 1 <= words
