"""Run a NumPy function block by block over an image larger than memory, lazily.

>>> import numpy as np
>>> import cellimg_dask as ci
>>> image = np.arange(16).reshape(4, 4)
>>> lazy = ci.map_cells(np.negative, image, cell_shape=2)
>>> lazy[0, :2]
array([ 0, -1])
"""

from cellimg_dask.bare.arrays import Array
from cellimg_dask.batch.lock import TargetInUseError
from cellimg_dask.batch.report import RunReport
from cellimg_dask.batch.run import run
from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.content import NoContentError
from cellimg_dask.blocks.errors import (
    BlockError,
    BlockTimeoutError,
    CellimgError,
    CycleError,
    EnvError,
    InitError,
    NoWorkersError,
    ParameterError,
    QueueClosedError,
    ReadError,
    RemoteError,
    ResultError,
    SaveError,
    SourceChangedError,
    WorkerDiedError,
)
from cellimg_dask.blocks.functions import BlockCode
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.blocks.worker import Worker, get_worker
from cellimg_dask.geometry import Cell, CellGrid, Halo, Roi, Space
from cellimg_dask.image import shared
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import fill_cells, map_cells
from cellimg_dask.image.input import Input
from cellimg_dask.image.request import Request
from cellimg_dask.image.source import Source
from cellimg_dask.image.stats import stats
from cellimg_dask.io.channels import Channel
from cellimg_dask.io.listing import list_images
from cellimg_dask.io.open_image import open_image
from cellimg_dask.io.opened import ListedArray
from cellimg_dask.io.stored_image import StoredImage
from cellimg_dask.io.write_ome_zarr import OmeZarrReport, write_ome_zarr
from cellimg_dask.loading.watch import Change
from cellimg_dask.ops.blobs import merge_blobs, prune_blobs
from cellimg_dask.ops.detect import blob_dog, blob_log
from cellimg_dask.ops.frames import latest
from cellimg_dask.ops.histograms import histogram, quantiles
from cellimg_dask.ops.label_image import LabelImg
from cellimg_dask.ops.labels import label, map_labels, stitch
from cellimg_dask.ops.meshes import mesh
from cellimg_dask.ops.normalize import normalize
from cellimg_dask.ops.points import map_points
from cellimg_dask.ops.pyramid import Pyramid, pyramid
from cellimg_dask.ops.reduce import Reduced, reduce_cells
from cellimg_dask.ops.segment import segment
from cellimg_dask.ops.stacks import map_stack, merge_stack, split_stack, stack_shape
from cellimg_dask.ops.statistics import Statistics, statistics
from cellimg_dask.ops.surfaces import Mesh
from cellimg_dask.ops.tables import region_table
from cellimg_dask.ops.thin_plate import ThinPlateSpline
from cellimg_dask.ops.transforms import Affine
from cellimg_dask.ops.transpose import transpose
from cellimg_dask.ops.warp import warp
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.queues.environments import Env
from cellimg_dask.queues.rules import BlockUpdate
from cellimg_dask.schemas.block_schema import BlockSchema
from cellimg_dask.schemas.describe import describe
from cellimg_dask.server.layers import Layer
from cellimg_dask.server.serving import Server, asgi_app, serve
from cellimg_dask.state.cache import CacheStats, CellCache, get_cache, set_cache
from cellimg_dask.viewer.landmarks import Landmarks
from cellimg_dask.viewer.painting import Brush
from cellimg_dask.viewer.view import View, view

__all__ = [
    "Affine",
    "Array",
    "Block",
    "BlockCode",
    "BlockError",
    "BlockQueue",
    "BlockSchema",
    "BlockTimeoutError",
    "BlockUpdate",
    "Brush",
    "CacheStats",
    "Cell",
    "CellCache",
    "CellGrid",
    "CellImg",
    "CellimgError",
    "Change",
    "Channel",
    "CycleError",
    "Env",
    "EnvError",
    "Halo",
    "InitError",
    "Input",
    "LabelImg",
    "Landmarks",
    "Layer",
    "ListedArray",
    "Mesh",
    "NamedFunction",
    "NoContentError",
    "NoWorkersError",
    "OmeZarrReport",
    "ParameterError",
    "Pyramid",
    "QueueClosedError",
    "ReadError",
    "Reduced",
    "RemoteError",
    "Request",
    "ResultError",
    "Roi",
    "RunReport",
    "SaveError",
    "Server",
    "Source",
    "SourceChangedError",
    "Space",
    "Statistics",
    "StoredImage",
    "TargetInUseError",
    "ThinPlateSpline",
    "View",
    "Worker",
    "WorkerDiedError",
    "asgi_app",
    "blob_dog",
    "blob_log",
    "describe",
    "fill_cells",
    "get_cache",
    "get_worker",
    "histogram",
    "label",
    "latest",
    "list_images",
    "map_cells",
    "map_labels",
    "map_points",
    "map_stack",
    "merge_blobs",
    "merge_stack",
    "mesh",
    "normalize",
    "open_image",
    "prune_blobs",
    "pyramid",
    "quantiles",
    "reduce_cells",
    "region_table",
    "run",
    "segment",
    "serve",
    "set_cache",
    "shared",
    "split_stack",
    "stack_shape",
    "statistics",
    "stats",
    "stitch",
    "transpose",
    "view",
    "warp",
    "write_ome_zarr",
]
