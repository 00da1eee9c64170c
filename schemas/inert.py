"""Text from outside made fit to be shown: alone responsible for that nothing in it acts on what shows it.

Answers, document ids, a provider's names, paths and whatever else somebody else wrote may hold terminal escapes,
marks that turn the reading direction, markup, HTML or a formula. On a terminal they are spelt out; on a page and in a
cell of a spreadsheet they are escaped.
JSON needs neither: `json.dumps` writes ASCII, and whoever reads it gets the text as it was.
"""

from __future__ import annotations

import re
import unicodedata

#: What markdown, or the HTML in it, gives a meaning to inside of a line.
_MARKS = {mark: f"\\{mark}" for mark in "\\`*_[]|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"}
_ESCAPES = str.maketrans(_MARKS)
#: What a page makes a link of without being asked to.
_LINKS = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)

#: What makes a spreadsheet calculate; it skips blanks before that. A number needs no escape and is none of ours.
_FORMULAS = ("=", "+", "-", "@", " ", "\u00a0", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def plain(text: str) -> str:
    """One line of text with everything that is not to be seen spelt out, as in `\\x1b`; for a terminal or a log."""
    if text.isprintable():
        return text
    return "".join(character if _is_seen(character) else _spell(character) for character in text)


def plain_lines(text: str) -> str:
    """The same for text that may have several lines."""
    return "\n".join(map(plain, text.split("\n")))


def escape_markdown(text: str) -> str:
    """One line of text that a markdown page shows as it is: no markup, no HTML, no link, no cell of its own."""
    return _LINKS.sub(lambda found: f"&#{ord(found[0])};", plain(text).translate(_ESCAPES))


def escape_cell(text: str) -> str:
    """One line of text that a spreadsheet shows as it is, and does not take for a formula."""
    shown = plain(text)
    return f"'{shown}" if shown.startswith(_FORMULAS) else shown


def _is_seen(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _spell(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
