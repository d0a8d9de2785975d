"""Image files of every format, written by the libraries of these formats."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
import tensorstore
import tifffile
import zarr


def fingerprint(path: Path):
    """Return names, contents and times of change of everything at and below a path."""
    every = [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]
    return [
        (
            str(item.relative_to(path)),
            item.stat().st_mtime_ns,
            item.stat().st_mode,
            hashlib.sha256(item.read_bytes()).hexdigest() if item.is_file() else "folder",
        )
        for item in every
    ]


def write_n5(path: Path, data, block=None, compression="gzip", **attributes):
    """Write an array, whose axes are in NumPy order, as a data set of N5."""
    block = block or tuple(min(16, n) for n in data.shape)
    spec = {
        "driver": "n5",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "dimensions": data.shape[::-1],
            "blockSize": block[::-1],
            "dataType": str(data.dtype),
            "compression": {"type": compression},
        },
    }
    store = tensorstore.open(spec, create=True).result()
    store.write(np.ascontiguousarray(data).T).result()
    add_attributes(path, **attributes)


def add_attributes(folder: Path, **attributes):
    file = folder / "attributes.json"
    said = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(said | attributes))


def write_ome(path, data, version, *, num_levels=1, labels=None, **more):
    """Write an OME-Zarr image whose level k takes every 2**k-th voxel of y and x."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    _fill_ome(group, data, version, num_levels, more)
    if labels is not None:
        inside = group.create_group("labels")
        _set_ome(inside, version, {"labels": list(labels)})
        for name, values in labels.items():
            inner = inside.create_group(name)
            _fill_ome(inner, values, version, num_levels, {"image-label": {}})
    return group


def _set_ome(group, version, said):
    group.attrs.update({"ome": {"version": version, **said}} if version == "0.5" else said)


def _fill_ome(group, data, version, num_levels, more):
    datasets = []
    for level in range(num_levels):
        step = 2**level
        more_v3 = {"dimension_names": tuple("zyx"[-data.ndim :])} if version == "0.5" else {}
        group.create_array(
            f"s{level}",
            data=data[..., ::step, ::step],
            chunks=(2, 16, 16)[-data.ndim :],
            **more_v3,
        )
        scale = [1.0] * (data.ndim - 2) + [float(step)] * 2
        shift = [0.0] * (data.ndim - 2) + [(step - 1) / 2] * 2
        datasets.append(
            {
                "path": f"s{level}",
                "coordinateTransformations": [
                    {"type": "scale", "scale": scale},
                    {"type": "translation", "translation": shift},
                ],
            }
        )
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"[-data.ndim :]]
    common = [
        {"type": "scale", "scale": [4.0, 0.5, 0.25][-data.ndim :]},
        {"type": "translation", "translation": [100.0, 20.0, 3.0][-data.ndim :]},
    ]
    scales = {"axes": axes, "datasets": datasets, "coordinateTransformations": common}
    if version != "0.5":
        scales["version"] = version
    _set_ome(group, version, {"multiscales": [scales], **more})


def write_everything(folder: Path, volume) -> None:
    zarr.create_array(folder / "v2.zarr", data=volume, chunks=(2, 16, 16), zarr_format=2)
    zarr.create_array(folder / "v3.zarr", data=volume, chunks=(2, 16, 16))
    zarr.create_array(
        folder / "sharded.zarr",
        data=volume,
        chunks=(2, 16, 16),
        shards=(4, 32, 32),
        dimension_names=("z", "y", "x"),
    )
    labels = {"nuclei": (volume // 700).astype(np.uint32)}
    for version in ("0.4", "0.5"):
        path = folder / f"ome-{version}.zarr"
        write_ome(path, volume, version, num_levels=3, labels=labels)
    write_n5(folder / "bare.n5", volume)
    write_n5(folder / "pyramid.n5" / "raw" / "s0", volume)
    write_n5(
        folder / "pyramid.n5" / "raw" / "s1", volume[:, ::2, ::2], downsamplingFactors=[2, 2, 1]
    )
    add_attributes(folder / "pyramid.n5", n5="2.5.1")
    resolution = {"unit": "nm", "dimensions": [4.0, 4.0, 40.0]}
    add_attributes(folder / "pyramid.n5" / "raw", pixelResolution=resolution)
    with h5py.File(folder / "image.h5", "w") as file:
        file["exposure"] = 0.25
        file["names"] = "text"
        item = file.create_dataset("raw/volume", data=volume, chunks=(1, 20, 25))
        item.attrs["element_size_um"] = np.array([2.0, 0.5, 0.25])
    with h5py.File(folder / "contiguous.h5", "w") as file:
        file["volume"] = volume
    tifffile.imwrite(folder / "plain.tif", volume, photometric="minisblack")
    tifffile.imwrite(
        folder / "tiled.tif", volume[0], tile=(16, 16), compression="zlib", predictor=True
    )
    tifffile.imwrite(
        folder / "imagej.tif",
        volume,
        imagej=True,
        resolution=(4, 2),
        metadata={"axes": "ZYX", "spacing": 3.5, "unit": "um"},
    )
    tifffile.imwrite(
        folder / "image.ome.tif",
        volume,
        tile=(16, 32),
        metadata={
            "axes": "ZYX",
            "PhysicalSizeX": 0.5,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 0.25,
            "PhysicalSizeZ": 2,
            "PhysicalSizeZUnit": "mm",
        },
    )
    options = {"photometric": "minisblack", "tile": (16, 16), "compression": "zlib"}
    with tifffile.TiffWriter(folder / "pyramid.ome.tif") as writer:
        metadata = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
        writer.write(volume, subifds=2, metadata=metadata, **options)
        writer.write(volume[:, ::2, ::2], subfiletype=1, **options)
        writer.write(volume[:, ::4, ::4], subfiletype=1, **options)
    np.save(folder / "array.npy", volume)
    np.save(folder / "turned.npy", np.asfortranarray(volume))
    iio.imwrite(folder / "picture.png", (volume[0] % 256).astype(np.uint8))
