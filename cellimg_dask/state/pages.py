"""A mapping of cells that is never changed, only replaced by one with a few others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Pages"]

_PAGE = 512


class Pages(Mapping[int, Any]):
    """An immutable mapping from integers.

    Another one with a few replaced items shares most of this one's memory: the items lie in pages
    of 512, and only the pages that differ are copied.
    """

    __slots__ = ("_count", "_pages")

    def __init__(self) -> None:
        self._pages: dict[int, dict[int, Any]] = {}
        self._count = 0

    def replaced(self, items: Mapping[int, Any]) -> Pages:
        """Return a mapping that has ``items`` as well, or instead."""
        new = Pages()
        pages = new._pages = self._pages.copy()
        new._count = self._count
        copied: set[int] = set()
        for index, value in items.items():
            number = index // _PAGE
            if number not in copied:
                copied.add(number)
                pages[number] = pages.get(number, {}).copy()
            page = pages[number]
            new._count += index not in page
            page[index] = value
        return new

    def get(self, index: int, default: Any = None) -> Any:
        """Return the item of ``index``."""
        page = self._pages.get(index // _PAGE)
        return default if page is None else page.get(index, default)

    def __getitem__(self, index: int) -> Any:
        return self._pages[index // _PAGE][index]

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        return index in self._pages.get(index // _PAGE, ())

    def __iter__(self) -> Iterator[int]:
        for page in self._pages.values():
            yield from page

    def __len__(self) -> int:
        return self._count
