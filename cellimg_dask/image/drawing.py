"""A picture of a graph, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cellimg_dask.image.layers import Element, Layers, layered

__all__ = ["CACHED", "DIRTY", "UNSAVED", "Card", "draw"]

CACHED, DIRTY, UNSAVED = "#f2b134", "#d1495b", "#7a5195"
"""Colours of cells, in bars and their legend."""

_LEGEND = (("cached", CACHED), ("dirty", DIRTY), ("not saved", UNSAVED))
_LETTER = 6.7
"""Width of a letter of 11 pixels, in any of the fonts."""
_LINE = 15
_PAD = 10
_BAR = 7
_GAP = 46
_MARGIN = 12
_INK = "#7b8794"
_NARROWEST, _WIDEST = 18, 44
_FONTS = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True, slots=True)
class Card:
    """A box with text."""

    title: str
    """Its first line."""
    lines: Sequence[str]
    """Further lines."""
    reads: Sequence[int]
    """Numbers of the cards that have a line to this one, from 0; all are smaller than its own."""
    fill: str
    """Colour of the box."""
    stroke: str
    """Colour of its border."""
    is_dashed: bool = False
    """Whether the border is dashed."""
    bar: Sequence[tuple[str, float]] | None = None
    """Colours and shares of the bar, from the left; None: it has none."""


def draw(cards: Sequence[Card]) -> str:
    """Return a picture in rows: each card below those that it reads.

    Every card but the last is read by another.
    """
    layers = layered([tuple(dict.fromkeys(card.reads)) for card in cards])
    longest = max((len(text) for card in cards for text in (card.title, *card.lines)), default=0)
    width = min(max(longest, _NARROWEST), _WIDEST) * _LETTER + 2 * _PAD
    heights = [_height(card) for card in cards]
    tops, top = [], float(_MARGIN)
    for row in layers.rows:
        tops.append(top)
        boxes = (heights[box] for box, own in row if layers.row[box] == own)
        top += max(boxes, default=0) + _GAP
    tops.append(top)
    shapes = _lines(layers, width, tops, heights)
    for number, card in enumerate(cards):
        at = layers.centre[number, layers.row[number]] * width + _MARGIN
        shapes += _box(card, at - width / 2, tops[layers.row[number]], width, heights[number])
    colours = {colour for card in cards for colour, share in card.bar or () if share}
    shapes += _legend(colours, top - _GAP / 2)
    whole_width = max(layers.width * width + 2 * _MARGIN, 260.0)
    whole_height = top - _GAP + _MARGIN + (_GAP / 2 if colours else 0)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{whole_width:.0f}' "
        f"height='{whole_height:.0f}' viewBox='0 0 {whole_width:.1f} {whole_height:.1f}' "
        f"font-family=\"{_FONTS}\" font-size='11'>"
        f"<rect width='100%' height='100%' fill='#ffffff'/>{''.join(shapes)}</svg>"
    )


def _height(card: Card) -> float:
    bar = 0 if card.bar is None else _BAR + 4
    return _LINE * (1 + len(card.lines)) + bar + _PAD


def _box(card: Card, left: float, top: float, width: float, height: float) -> list[str]:
    dash = " stroke-dasharray='5 3'" if card.is_dashed else ""
    full = escape("\n".join([card.title, *card.lines]))
    frame = (
        f"<g><title>{full}</title><rect class='card' x='{left:.1f}' y='{top:.1f}' "
        f"width='{width:.1f}' height='{height:.1f}' rx='4' fill='{card.fill}' "
        f"stroke='{card.stroke}' stroke-width='1.3'{dash}/>"
    )
    shapes = [frame]
    for number, text in enumerate([card.title, *card.lines]):
        look = "font-weight='bold' fill='#1f2933'" if number == 0 else "fill='#3e4c59'"
        shown = text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
        shapes.append(
            f"<text x='{left + _PAD:.1f}' y='{top + _LINE * (number + 1):.1f}' {look}>"
            f"{escape(shown)}</text>"
        )
    if card.bar is not None:
        x, y, room = left + _PAD, top + height - _PAD - _BAR + 2, width - 2 * _PAD
        shapes.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{room:.1f}' height='{_BAR}' fill='#e4e7eb'/>"
        )
        for colour, share in card.bar:
            # What there is can be seen, however little it is.
            part = min(max(share * room, 2.0 if share else 0.0), left + _PAD + room - x)
            shapes.append(
                f"<rect x='{x:.1f}' y='{y:.1f}' width='{part:.1f}' height='{_BAR}' "
                f"fill='{colour}'/>"
            )
            x += part
    shapes.append("</g>")
    return shapes


def _lines(
    layers: Layers,
    width: float,
    tops: Sequence[float],
    heights: Sequence[float],
) -> list[str]:
    def middle(element: Element) -> float:
        return layers.centre[element] * width + _MARGIN

    # Where lines arrive at a card, in the order in which they come.
    arrivals: dict[int, list[Element]] = {}
    for upper, (box, row) in layers.segments:
        if layers.row[box] == row:
            arrivals.setdefault(box, []).append(upper)
    for uppers in arrivals.values():
        uppers.sort(key=middle)
    shapes = []
    for upper, lower in layers.segments:
        box, row = lower
        begin, end = tops[row] - _GAP, tops[row]
        x, to = middle(upper), middle(lower)
        start = begin
        if layers.row[upper[0]] == upper[1]:
            # From the card itself, which may be lower than others of its row.
            start = tops[upper[1]] + heights[upper[0]]
        if layers.row[box] == row:
            count = len(arrivals[box])
            step = min(16.0, 0.8 * width / count)
            to += (arrivals[box].index(upper) - (count - 1) / 2) * step
            end -= 5
            tail = ""
            head = f"<path d='M{to - 3.5:.1f},{end:.1f} h7 l-3.5,5 z' fill='{_INK}'/>"
        else:
            # It passes between the boxes of this row.
            head, tail = "", f"V{tops[row + 1] - _GAP:.1f}"
        half = (begin + end) / 2
        curve = f"M{x:.1f},{start:.1f} V{begin:.1f} C{x:.1f},{half:.1f} {to:.1f},{half:.1f} "
        shapes.append(
            f"<path d='{curve}{to:.1f},{end:.1f} {tail}' fill='none' stroke='{_INK}' "
            f"stroke-width='1.2'/>{head}"
        )
    return shapes


def _legend(colours: set[str], y: float) -> list[str]:
    shapes, x = [], float(_MARGIN)
    for name, colour in _LEGEND:
        if colour in colours:
            shapes.append(
                f"<rect x='{x:.1f}' y='{y - 8:.1f}' width='9' height='9' fill='{colour}'/>"
                f"<text x='{x + 14:.1f}' y='{y:.1f}' fill='#3e4c59'>{name}</text>"
            )
            x += 28 + len(name) * _LETTER
    return shapes
