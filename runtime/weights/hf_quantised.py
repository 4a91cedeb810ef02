"""Quantised Hugging Face folders: plain formats, which are numbers times scales, are read as what they stand for.

A scale belongs to a block of a matrix: `fp8` of DeepSeek and Qwen has blocks of `weight_block_size`, `fbgemm_fp8` and
`compressed-tensors` (float-quantized, int-quantized) one row or the whole matrix. Other formats are refused by name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import torch
from torch import Tensor

from plans.documents import BadText, locate, parse_json, read_text, refuse
from plans.errors import RealplanError
from plans.problems import Problem, shortened
from runtime.weights.hf_names import Sliceable

SCALES = (".weight_scale_inv", ".weight_scale")
_PLAIN = ("F64", "F32", "F16", "BF16")
_METHODS = {"fp8": (None,), "fbgemm_fp8": (None,), "compressed-tensors": ("float-quantized", "int-quantized")}
_BLOCK = (128, 128)


@dataclass(frozen=True)
class Format:
    """How the matrices of a folder are written. `block`: rows and columns that share a scale, where they are tiles."""

    block: tuple[int, int] = _BLOCK

    def scales(self, name: str) -> tuple[str, ...]:
        """Names under which the scales of a tensor may stand."""
        stem = name.removesuffix(".weight")
        return tuple(stem + ending for ending in SCALES) if stem != name else ()

    def is_plain(self, dtype: str) -> bool:
        """Whether a safetensors type holds the numbers themselves."""
        return dtype in _PLAIN


def quantisation(folder: Path, error: type[RealplanError]) -> Format:
    """The format that the folder's config.json announces; raises `error` for one that is not plain."""
    path = folder / "config.json"
    if not os.path.isfile(path):
        return Format()
    text = read_text(path, error, "config")
    try:
        config = parse_json(text)
    except BadText as bad:
        refuse(error, path, [bad.problem])

    def fault(message: str, hint: str, *key: str) -> Never:
        refuse(error, path, locate(text, [Problem("quantised", message, hint, ("quantization_config", *key))]))

    found = config.get("quantization_config") if isinstance(config, dict) else None
    if found is None:
        return Format()
    method = found.get("quant_method") if isinstance(found, dict) else found
    kind = found.get("format") if isinstance(found, dict) and method == "compressed-tensors" else None
    hint = f"a folder in bf16, or one quantised by {', '.join(_METHODS)} (float-quantized, int-quantized)"
    if not isinstance(method, str) or kind not in _METHODS.get(method, ()):
        name = shortened(f"{method}, {kind}" if kind else method)
        fault(f"the folder is quantised by `{name}`, which this runtime does not read", hint)
    block = found.get("weight_block_size") or list(_BLOCK)
    whole = isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= 10**6 for n in block)
    if not whole:
        rule = f"weight_block_size is {shortened(block)}; it must be two whole numbers"
        fault(rule, '"weight_block_size": [128, 128]', "weight_block_size")
    return Format((block[0], block[1]))


@dataclass(frozen=True)
class Scaled:
    """A quantised matrix to take slices of, float32: element (i, j) times scale (i // rows, j // columns)."""

    part: Sliceable
    scale: Tensor
    shape: tuple[int, int]
    rows: int
    columns: int

    @classmethod
    def of(
        cls, part: Any, scale: Tensor, shape: tuple[int, ...], form: Format, name: str, error: type[RealplanError]
    ) -> Scaled:
        """The matrix with its scales: one, one per row, or one per block; raises `error` for any other number."""
        table = scale.float()
        table = table.reshape(-1, 1) if table.dim() < 2 else table
        height, width = shape if len(shape) == 2 else (shape[0], 1)
        for rows, columns in ((height, width), (1, width), form.block):
            if tuple(table.shape) == (-(-height // rows), -(-width // columns)):
                return cls(part, table, (height, width), rows, columns)
        raise error(
            f"tensor `{name}` of shape {list(shape)} has scales of shape {list(scale.shape)}",
            f"one scale, one per row, or one per block of {form.block[0]} x {form.block[1]}",
        )

    def __getitem__(self, index: tuple[slice, ...] | slice) -> Tensor:
        cuts = index if isinstance(index, tuple) else (index,)
        cuts = (*cuts, *(slice(None) for _ in range(2 - len(cuts))))
        row, column = (torch.arange(extent)[cut] for extent, cut in zip(self.shape, cuts, strict=True))
        scale = self.scale[row // self.rows][:, column // self.columns]
        return self.part[cuts].float() * scale
