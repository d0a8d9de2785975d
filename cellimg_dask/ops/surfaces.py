"""Surfaces of objects as triangles, and the files that other programs read them from."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mesh"]

_NANOMETERS = {
    "picometer": 1e-3,
    "angstrom": 0.1,
    "nanometer": 1.0,
    "micrometer": 1e3,
    "millimeter": 1e6,
    "centimeter": 1e7,
    "meter": 1e9,
}

_File: TypeAlias = "str | PathLike[str]"


@dataclass(frozen=True, eq=False)
class Mesh:
    """The closed surface of an object, made of triangles.

    Made by `mesh`.
    """

    vertices: NDArray[np.float32]
    """Corners, one row each: a place along each axis of the image, in ``units``."""
    faces: NDArray[np.uint32]
    """Triangles, one row each: numbers of three vertices, anticlockwise as seen from outside where
    the axes are right-handed in their order."""
    axes: tuple[str, str, str] = ("z", "y", "x")
    """Names of the image's axes."""
    units: tuple[str | None, str | None, str | None] = (None, None, None)
    """Unit of each axis."""

    def __repr__(self) -> str:
        return f"Mesh({len(self.vertices)} vertices, {len(self.faces)} faces)"

    @property
    def area(self) -> float:
        """Area of the surface, in units squared."""
        first, second, third = self._corners()
        return float(np.linalg.norm(np.cross(second - first, third - first), axis=1).sum() / 2)

    @property
    def volume(self) -> float:
        """Volume that the surface encloses, in units cubed."""
        first, second, third = self._corners()
        return float((first * np.cross(second, third)).sum() / 6)

    def _corners(self) -> NDArray[np.float64]:
        origin = self.vertices[0] if len(self.vertices) else 0
        vertices = self.vertices.astype(np.float64) - origin
        corners: NDArray[np.float64] = vertices[self.faces.T.astype(np.intp)]
        return corners

    def to_neuroglancer(self) -> bytes:
        """Return a fragment of neuroglancer's single-resolution precomputed meshes.

        The number of vertices as uint32, then x, y and z of each as float32 in nanometers, then
        the triangles as uint32, all little-endian. An axis without a unit keeps its numbers.

        Raises
        ------
        ValueError
            If a unit is not one of length.
        """
        sizes = []
        for unit in self.units:
            if unit is not None and unit not in _NANOMETERS:
                raise ValueError(f"nothing is known of {unit!r} in nanometers; give lengths")
            sizes.append(1.0 if unit is None else _NANOMETERS[unit])
        vertices, faces = self._in_xyz(np.array(sizes))
        parts = np.uint32(len(vertices)).astype("<u4"), vertices.astype("<f4"), faces.astype("<u4")
        return b"".join(part.tobytes() for part in parts)

    def to_ply(self, path: _File) -> None:
        """Write the mesh as binary PLY, with x, y and z in ``units``.

        Parameters
        ----------
        path : path-like
            A file, which is replaced.
        """
        vertices, faces = self._in_xyz()
        triangles = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", (3,))])
        triangles["count"], triangles["corners"] = 3, faces
        header = (
            "ply\nformat binary_little_endian 1.0\n"
            f"element vertex {len(vertices)}\n"
            "property float x\nproperty float y\nproperty float z\n"
            f"element face {len(faces)}\n"
            "property list uchar int vertex_indices\nend_header\n"
        )
        Path(path).write_bytes(
            header.encode() + vertices.astype("<f4").tobytes() + triangles.tobytes()
        )

    def to_obj(self, path: _File) -> None:
        """Write the mesh as Wavefront OBJ, a text, with x, y and z in ``units``.

        Parameters
        ----------
        path : path-like
            A file, which is replaced.
        """
        vertices, faces = self._in_xyz()
        with Path(path).open("w", encoding="ascii") as file:
            # Nine digits tell all floats of 32 bits apart.
            file.writelines("v {:.9g} {:.9g} {:.9g}\n".format(*row) for row in vertices.tolist())
            file.writelines("f {} {} {}\n".format(*row) for row in (faces + 1).tolist())

    def _in_xyz(
        self, sizes: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
        """Return vertices as x, y, z, and faces that are seen from outside all the same.

        Axes without these names come in reverse order, as NumPy's z, y, x.
        """
        order = [2, 1, 0]
        if set(self.axes) == {"x", "y", "z"}:
            order = [self.axes.index(name) for name in "xyz"]
        vertices = self.vertices
        if sizes is not None:
            vertices = (vertices * sizes).astype(np.float32)
        # An odd change of axes is a mirror.
        odd = np.linalg.det(np.eye(3)[order]) < 0
        return vertices[:, order], self.faces[:, ::-1] if odd else self.faces
