"""Quantised Hugging Face folders: plain formats, which are numbers times scales, are read as what they stand for.

A scale belongs to a block of a matrix: `fp8` of DeepSeek and Qwen has blocks of `weight_block_size`, `fbgemm_fp8` and
`compressed-tensors` (float-quantized, int-quantized) one row or the whole matrix. Other formats are refused by name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Never

from plans.documents import BadText, locate, parse_json, read_text, refuse
from plans.errors import RealplanError
from plans.problems import Problem, shortened

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

    def shared(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of a matrix that share a scale, by the shape of its scales: one for all, one per row or one
        per block; None for any other number of them, and for what is no matrix."""
        if len(shape) != 2:
            return None
        height, width = shape
        found = scales if len(scales) > 1 else (prod(scales), 1)
        choices = ((height, width), (1, width), self.block)
        return next((c for c in choices if found == (-(-height // c[0]), -(-width // c[1]))), None)


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
