"""The arithmetic of whole optimizer calls, and what is compiled, each held to the plain-PyTorch formula."""

from ds_memopt.kernels.back_ends import chosen_kernels
from ds_memopt.kernels.calls import adam_by_element, adam_mini, gwt
from ds_memopt.kernels.codes import CODES, GROUP, join
from ds_memopt.kernels.compiled import compile_exactly
from ds_memopt.kernels.descriptors import ColumnPiece, Piece, RowPiece, Table
from ds_memopt.kernels.noise_formulas import NOISE_KINDS, NoiseSource
from ds_memopt.kernels.packed import STATE_PROBE, Packing, Segment, Segments, Storage
from ds_memopt.kernels.plain import (
    AdamScalars,
    adam_by_block,
    add_mean_squares,
    add_means,
    multiply_elements,
)
from ds_memopt.kernels.plain_gwt import GWTRule, GWTScalars
from ds_memopt.kernels.residual import add_residual_, residual_of
from ds_memopt.kernels.stored_weights import Moved, Step, add_noise, move
from ds_memopt.kernels.work import Runs, Work, row_of

__all__ = [
    "AdamScalars",
    "CODES",
    "ColumnPiece",
    "GROUP",
    "GWTRule",
    "GWTScalars",
    "Moved",
    "NOISE_KINDS",
    "NoiseSource",
    "Packing",
    "Piece",
    "STATE_PROBE",
    "RowPiece",
    "Runs",
    "Segment",
    "Segments",
    "Step",
    "Storage",
    "Table",
    "Work",
    "adam_by_block",
    "adam_by_element",
    "adam_mini",
    "add_mean_squares",
    "add_means",
    "add_noise",
    "add_residual_",
    "chosen_kernels",
    "compile_exactly",
    "gwt",
    "join",
    "move",
    "multiply_elements",
    "residual_of",
    "row_of",
]
