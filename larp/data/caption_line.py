"""A caption as one line of pixels, in whatever fonts of this machine have its characters."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

SIZE = 14
"""Height of the letters, in pixels."""
_LONGEST = 2000
"""Characters of a caption that are looked at."""
_CUT = "..."
_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
_STYLES = ("bold", "italic", "oblique", "light", "black", "thin", "condensed", "narrow", "serif", "mono")


class CaptionLine:
    """A text as runs of one font each, cut to a width in pixels.

    Line breaks become spaces. A character that no font has is written in ASCII: without its accent, or as its number.
    """

    def __init__(self, text: str, most: int):
        pieces = _pieces(unicodedata.normalize("NFC", " ".join(text[:_LONGEST].split())))
        if _width(_runs(pieces)) > most:
            cut, least, over = (_font(None), _CUT), 0, len(pieces)
            while over - least > 1:  # the longest beginning that fits, by bisection
                middle = (least + over) // 2
                least, over = (middle, over) if _width(_runs([*pieces[:middle], cut])) <= most else (least, middle)
            pieces = [*pieces[:least], cut]
        self._runs = _runs(pieces)
        self.width = _width(self._runs)
        """In pixels."""

    def draw(self, canvas, x: int, y: int) -> None:
        """Draw the line on an ImageDraw, in black, its top left corner at (x, y)."""
        default = _font(None)
        for font, text in self._runs:
            if font is default:
                canvas.text((x, y), text, fill="black", font=font)
            else:
                canvas.text((x, y + default.getmetrics()[0]), text, fill="black", font=font, anchor="ls")
            x += int(font.getlength(text))


def _pieces(text: str) -> list[tuple]:
    """Return (font, text) for each character that is drawn; marks and spaces stay in the font of the one before them."""
    pieces = []
    for character in text:
        category, last = unicodedata.category(character), pieces[-1][0] if pieces else _font(None)
        if character == " " or (category[0] in "MC" and _has(last, character)):
            pieces.append((last, character))
        elif category in ("Mn", "Me", "Cf", "Cc"):
            continue  # an accent, or a sign for the order of writing
        elif (font := _font_for(character)) is not None:
            pieces.append((font, character))
        else:
            plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode().strip()
            pieces.append((_font(None), plain or character.encode("ascii", "backslashreplace").decode()))
    return pieces


def _runs(pieces: list[tuple]) -> list[tuple]:
    """Join pieces of one font, so that scripts whose letters change beside each other are shaped whole."""
    return [
        (fonts[0], "".join(texts))
        for fonts, texts in (zip(*group, strict=True) for _, group in groupby(pieces, key=lambda piece: id(piece[0])))
    ]


def _width(runs: list[tuple]) -> int:
    return sum(int(font.getlength(text)) for font, text in runs)


@cache
def _font_for(character: str):
    """Return the first font that has a character, or None."""
    if "\ud800" <= character <= "\udfff":
        return None
    fonts = (_font(path) for path in (None, *(() if character.isascii() else _font_files())))
    return next((font for font in fonts if font is not None and _has(font, character)), None)


def _has(font, character: str) -> bool:
    try:
        glyph = _glyph(font, character)
    except (AttributeError, OSError, ValueError):  # a bitmap font, or a damaged one
        return False
    return glyph != _missing(font) and (
        any(glyph[1]) or unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf", "Zs")
    )


def _glyph(font, character: str) -> tuple:
    mask = _unshaped(font).getmask(character)
    return mask.size, bytes(mask)


@cache
def _unshaped(font):
    """Return a font that draws what is asked for, and not a circle before a mark that stands alone."""
    from PIL import ImageFont

    source = font.path if isinstance(font.path, str) else io.BytesIO(font.font_bytes)
    return ImageFont.truetype(source, SIZE, layout_engine=ImageFont.Layout.BASIC)


@cache
def _missing(font) -> tuple:
    """Return the glyph, often a box, that a font shows for a character that it lacks: here one that is none."""
    return _glyph(font, "\U0010ffff")


@cache
def _font(path: str | None):
    """Return the font of a file, or Pillow's own; None for a file that is no font of outlines."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(SIZE) if path is None else ImageFont.truetype(path, SIZE)
    except OSError:
        return None


@cache
def _font_files() -> tuple[str, ...]:
    """Return the font files of this machine, upright sans-serif ones first."""

    def rank(path: str) -> tuple:
        name = Path(path).name.lower()
        return sum(style in name for style in _STYLES), "sans" not in name, name

    return tuple(sorted(_below(_FOLDERS), key=rank))


def _below(folders) -> Iterator[str]:
    for folder in folders:
        for root, _, files in os.walk(os.path.expanduser(folder)):
            yield from (os.path.join(root, name) for name in files if name.lower().endswith((".ttf", ".otf", ".ttc")))
