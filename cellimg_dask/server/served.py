"""All that is said of a layer: its arrays and its documents."""

from __future__ import annotations

import hashlib
from typing import Any

from cellimg_dask.server.answers import (
    JSON,
    RANGES,
    REVALIDATE,
    Answer,
    Headers,
    matches,
    ranged,
)
from cellimg_dask.server.chunks import ServedArray, position_of
from cellimg_dask.server.documents import Codec, as_bytes, image_documents
from cellimg_dask.server.layers import Layer
from cellimg_dask.server.work import Work

__all__ = ["Document", "ServedLayer"]


class Document:
    """A document as it is sent."""

    def __init__(self, document: Any) -> None:
        self.body = as_bytes(document)
        self._tag = b'"d-%s"' % hashlib.sha256(self.body).hexdigest()[:24].encode()

    def answer(self, headers: Headers) -> Answer:
        """Return the document, or that it is still the same."""
        own: Headers = [JSON, (b"etag", self._tag), REVALIDATE, RANGES]
        asked = dict(headers)
        known = asked.get(b"if-none-match")
        if known is not None and matches(self._tag, known):
            return Answer(304, own[1:])
        return ranged(self.body, own, asked.get(b"range"), asked.get(b"if-range"))


class ServedLayer:
    """A layer with all that is said of it."""

    def __init__(self, name: str, layer: Layer, codec: Codec | None) -> None:
        self.name = name
        self.layer = layer
        self.arrays = [ServedArray(image, layer.fill_value, codec) for image in layer.images]
        self.described: dict[str, dict[str, Any]] = {}
        self.documents: dict[str, dict[str, Document]] = {}
        for version in ("0.4", "0.5"):
            self.described[version] = image_documents(
                name,
                [array.grid for array in self.arrays],
                layer.spaces,
                layer.dtype,
                layer.fill_value,
                codec,
                version,
                is_labels=layer.kind == "labels",
                channels=layer.channels,
            )
            self.documents[version] = {
                path: Document(document) for path, document in self.described[version].items()
            }
        self.work_documents = {
            path: Document(document)
            for path, document in Work.documents(name, layer.spaces, self.arrays).items()
        }

    def level(self, part: str) -> ServedArray | None:
        """Return the array of a level by its name."""
        known = len(self.arrays)
        number = position_of([part], [known])
        return None if number is None else self.arrays[number]
