"""The tokenizer against transformers, and where the special ids come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models
from transformers import AutoTokenizer

from runtime.batches.tokenizer import Tokenizer, TokenizerError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama"


def test_equals_transformers() -> None:
    ours, theirs = Tokenizer.of_folder(FIXTURE), AutoTokenizer.from_pretrained(FIXTURE)
    for text in ("The movie was great, wasn't it?", "zxqv is unknown", ""):
        assert ours.encode(text) == theirs(text, add_special_tokens=True).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert (ours.eos_ids, ours.pad_id, ours.size) == ((theirs.eos_token_id,), theirs.pad_token_id, 2048)


def _folder(path: Path, **files: dict[str, object]) -> Path:
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).save(
        str(path / "tokenizer.json")
    )
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("files", "eos", "pad"),
    [
        ({}, (), 0),
        ({"tokenizer_config": {"eos_token": "</s>"}}, (2,), 2),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}, "pad_token": "b"}}, (2,), 1),
        ({"config": {"eos_token_id": 1}, "tokenizer_config": {"eos_token": "</s>"}}, (1,), 1),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [2, 1], "pad_token_id": 0}}, (2, 1), 0),
    ],
)
def test_special_ids(tmp_path: Path, files: dict[str, dict[str, object]], eos: tuple[int, ...], pad: int) -> None:
    tokenizer = Tokenizer.of_folder(_folder(tmp_path, **files))
    assert (tokenizer.eos_ids, tokenizer.pad_id) == (eos, pad)


def test_saved_folder_reads_back(tmp_path: Path) -> None:
    Tokenizer.of_folder(FIXTURE).save(tmp_path)
    again = Tokenizer.of_folder(tmp_path)
    assert (again.encode("the movie"), again.eos_ids, again.pad_id) == (
        Tokenizer.of_folder(FIXTURE).encode("the movie"),
        (1,),
        0,
    )


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        Tokenizer.of_folder(tmp_path)
    (_folder(tmp_path) / "config.json").write_text("{\n  oops")
    with pytest.raises(TokenizerError, match=r"config\.json:2:3: not JSON"):
        Tokenizer.of_folder(tmp_path)


def bos_folder(folder: Path, **config: object) -> Path:
    """A word-level tokenizer that begins every text with <s>, and a config."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_begin_of_text_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = Tokenizer.of_folder(bos_folder(tmp_path))
    assert tokenizer.encode("a b") == tokenizer.encode("<s>a b") == [0, 2, 3]
    assert tokenizer.encode_batch(["<s>b", "b"]) == [[0, 3], [0, 3]]
    assert tokenizer.encode_batch(["<s>b"], special=False) == [[0, 3]]
    assert tokenizer.size == 4


def test_ids_of_a_config(tmp_path: Path) -> None:
    assert Tokenizer.of_folder(bos_folder(tmp_path, eos_token_id=1, pad_token_id=-1)).pad_id == 1
    assert Tokenizer.of_folder(bos_folder(tmp_path, eos_token_id=[1, 3], pad_token_id=None)).eos_ids == (1, 3)
    for wrong in ("1", -5, True, [1, "x"]):
        with pytest.raises(TokenizerError, match="eos_token_id is"):
            Tokenizer.of_folder(bos_folder(tmp_path, eos_token_id=wrong))


@pytest.mark.parametrize("content", ["", "{}", "[1]", "version https://git-lfs.github.com/spec/v1\n", '{"model": 3}'])
def test_files_that_are_no_tokenizer(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.of_folder(tmp_path)


def test_tokens_that_are_no_texts_and_texts_that_have_no_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.of_folder(_folder(tmp_path, tokenizer_config={"eos_token": "</s>", "pad_token": "\ud83d"}))
    assert tokenizer.pad_id == tokenizer.eos_ids[0], "half of a surrogate pair names no token"
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="gone"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json:1:1: no tokenizer: WordLevel error: Missing"):
        Tokenizer.of_folder(tmp_path)
    with pytest.raises(TokenizerError, match="the tokenizer cannot encode a text: WordLevel error: Missing"):
        Tokenizer(backend, (), 0).encode("b")
