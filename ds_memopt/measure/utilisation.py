"""Model FLOPs utilisation: the share of a GPU's peak that the model's own arithmetic makes use of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Dense bf16 and fp16 with sums in fp32, in FLOP/s, by the names that PyTorch tells, whole: a MIG slice has another one.
# From the data sheets of NVIDIA and AMD, halved where these count with sparsity: HGX B200 and HGX B300 have 36 PFLOP/s
# in eight GPUs, GB200 NVL72 and GB300 NVL72 360 in 72. GeForce: the tables of NVIDIA's white papers on Ada and on RTX
# Blackwell. NVIDIA has no public sheet for the H20: its figure is that of server makers.
PEAK_FLOPS = {
    **dict.fromkeys(
        (
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-PCIE-40GB",
            "NVIDIA A100 80GB PCIe",
            "NVIDIA A800-SXM4-80GB",
            "NVIDIA A800 80GB PCIe",
        ),
        312e12,
    ),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H800", "NVIDIA H200"), 989.4e12),
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA GH200 480GB": 989.4e12,
    **dict.fromkeys(("NVIDIA H20", "NVIDIA H20-3e"), 148e12),
    **dict.fromkeys(("NVIDIA B200", "NVIDIA B300 SXM6 AC"), 2250e12),
    **dict.fromkeys(("NVIDIA GB200", "NVIDIA GB300"), 2500e12),
    "NVIDIA L40S": 362.05e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    **dict.fromkeys(("AMD Instinct MI300X", "AMD Instinct MI325X", "AMD Instinct MI325 OAM"), 1307.4e12),
    "AMD Instinct MI350X": 2306.9e12,
    **dict.fromkeys(("AMD Instinct MI355X", "AMD Instinct MI355 OAM"), 2516.6e12),
}

MEMORY_BANDWIDTH = {
    "A100-40GB": 1555e9, "A100-80GB": 2039e9, "A800-80GB": 2039e9, "H100": 3350e9, "H100-PCIe": 2000e9,
    "H200": 4800e9, "H20": 4000e9, "B200": 8000e9, "L40S": 864e9, "RTX-4090": 1008e9, "RTX-5090": 1792e9,
    "MI300X": 5300e9,
}  # fmt: skip
"""Bytes a second of a GPU's own memory as NVIDIA and AMD state it; SXM where nothing else is said. A
B200's is an eighth of the DGX B200's. NVIDIA has no public sheet for the H20: its figure is that of server makers."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of matrix products on this device; None for one that is not known, and for fp32.

    dtype: "bf16", "fp16" or "fp32", that the model computes in.
    """
    if device.type != "cuda" or dtype not in ("bf16", "fp16"):
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class ModelFlops:
    """The arithmetic of a decoder-only transformer for a token of training (PaLM, arXiv 2204.02311, appendix B).

    parameters: N, those that multiply: all but an input embedding that is not the output's as well. layers: L. heads: H
    of attention. head_dim: Q. seq_length: T, tokens. passes: forward and backward passes of a token in a step, where a
    forward alone is a third; recomputation of activations counts nothing.
    """

    parameters: int
    layers: int
    heads: int
    head_dim: int
    seq_length: int
    passes: float = 1.0

    @property
    def per_token(self) -> float:
        """FLOP for a token."""
        attention = 12 * self.layers * self.heads * self.head_dim * self.seq_length
        return self.passes * (6 * self.parameters + attention)

    def utilisation(self, tokens_per_s_per_gpu: float, peak: float | None) -> float | None:
        """MFU, from 0 to 1; None if the device's peak FLOP/s is not known."""
        return None if peak is None else tokens_per_s_per_gpu * self.per_token / peak

    def formula(self, peak: float | None) -> str:
        """How MFU is computed, with its numbers."""
        against = "unknown, so MFU is null" if peak is None else f"{peak / 1e12:.1f} TFLOP/s"
        return (
            f"MFU = tokens/s of a GPU x {self.passes:.3g} x (6 N + 12 L H Q T) / peak; N = {self.parameters:,}, "
            f"L = {self.layers}, H = {self.heads}, Q = {self.head_dim}, T = {self.seq_length}: "
            f"{self.per_token / 1e9:.4g} GFLOP a token; peak of the device: {against}"
        )
