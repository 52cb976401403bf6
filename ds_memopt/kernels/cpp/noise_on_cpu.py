"""Noise and the steps of stored weights in C++, see noise.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from ds_memopt.kernels.cpp.build import library
from ds_memopt.kernels.noise_formulas import WORD, NoiseSource
from ds_memopt.kernels.stored_weights import Moved, Step


def add_noise(out: torch.Tensor, weights: torch.Tensor | None, source: NoiseSource, start: int, scale: float) -> None:
    noise = _noises([source])
    library().ds_add_noise(
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(_address(weights)),
        _is_bf16(out),
        ctypes.c_int64(len(out)),
        _pointer(noise),
        ctypes.c_int64(start),
        ctypes.c_float(scale),
        torch.get_num_threads(),
    )


def move(steps: Sequence[Step]) -> Moved:
    parts, scalars, sources, factors = [], [], [], []
    for step in steps:
        terms, tensors = step.sources, (step.weights, step.kept, step.gradient)
        addresses, count = map(_address, tensors), len(step.weights)
        residual = step.kept is not None and step.kept.dtype == torch.int16
        halves = _is_bf16(step.weights), residual, _is_bf16(step.gradient)
        parts.append((*addresses, count, step.start, *halves, len(sources), len(terms)))
        scalars.append([float(scalar) for scalar in (step.decay, step.lr, step.share)])
        sources += [source for source, _ in terms]
        factors += [factor for _, factor in terms]
    moved = np.zeros(2)
    tables = (
        np.array(parts, dtype=np.int64),
        np.array(scalars, dtype=np.float32),
        _noises(sources),
        np.array(factors, dtype=np.float32),
    )
    parts, scalars, noises, factors = map(_pointer, tables)
    count, threads = ctypes.c_int64(len(steps)), torch.get_num_threads()
    library().ds_move(parts, scalars, count, noises, factors, _pointer(moved), threads)
    return Moved(*moved.tolist())


def _noises(sources: Sequence[NoiseSource]) -> np.ndarray:
    """`Noise` of noise.cpp."""
    rows = [(s.per_counter, s.key & WORD, s.key >> 32, s.step, s.probe) for s in sources]
    return np.array(rows, dtype=np.int64)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_bf16(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
