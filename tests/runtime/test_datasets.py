"""Data sets: columns by name, conversations, kinds of files, mixtures; rewards that check answers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plan_cases import TINY
from transformers import AutoTokenizer

from plans.runfile import Data
from runtime.batches.chat import ChatError, ChatTemplate
from runtime.batches.data import PromptSet
from runtime.batches.datasets import DataSet, read_data
from runtime.batches.files import DataError
from runtime.batches.reward_functions import BUILT_IN, bind, call
from runtime.batches.sources import TextPrompts
from runtime.batches.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{%- for message in messages %}\n"
    "  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}\n"
    "  {%- if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]\n"
    "  {%- else %}{{ message | tojson }}{{ eos_token }}{% endif %}\n{%- endfor %}"
)
TALK = [
    {"role": "user", "content": "How much is 2 + 3? "},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "Sure? Ünï < >"},
]


def folder_with(template: str, folder: Path, **config: Any) -> Path:
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer_config.json"
    held = json.loads(path.read_text()) | {"bos_token": "<s>", "eos_token": "</s>"} | config
    path.write_text(json.dumps(held))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def data_of(data: Data, responses: tuple[str, ...] = (), folder: Path = TINY, batch: int = 2) -> DataSet:
    tokenizer = Tokenizer.of_folder(TINY)
    return read_data(data, responses, tokenizer, folder, prompt_tokens=10**6, batch_size=batch, seed=3)[0]


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("template", [CHATML, STRICT])
@pytest.mark.parametrize("switches", [{}, {"enable_thinking": False}])
def test_templates_give_what_transformers_gives(template: str, switches: dict[str, bool], tmp_path: Path) -> None:
    folder = folder_with(template, tmp_path / "model")
    reference = AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate.of_folder(folder, switches)
    for messages in (TALK, TALK[:1]):
        wanted = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)
        assert ours.render(messages, generation=True) == wanted


def test_templates_in_the_config_and_faults(tmp_path: Path) -> None:
    folder = folder_with(
        CHATML, tmp_path / "model", chat_template=[{"name": "default", "template": "{{ bos_token }}!"}]
    )
    (folder / "chat_template.jinja").unlink()
    assert ChatTemplate.of_folder(folder).render(TALK, generation=True) == "<s>!"
    with pytest.raises(ChatError, match=r"has no chat template\nhint: data.chat=false"):
        ChatTemplate.of_folder(TINY)
    (folder / "chat_template.jinja").write_text("{% for x in %}")
    with pytest.raises(ChatError, match=r"chat_template.jinja:1:1: the chat template cannot be read"):
        ChatTemplate.of_folder(folder)
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ChatError, match="unsafe"):
        ChatTemplate.of_folder(folder).render(TALK, generation=True)


def test_prompts_of_other_names_and_what_rewards_see(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"question": f"q{i}", "solution": i, "level": [i]} for i in range(5)))
    data = data_of(Data(source=path, prompt="question", answer="solution"))
    assert data.prompts.prompts == data.asked == tuple(f"q{i}" for i in range(5))
    source = TextPrompts(data, Tokenizer.of_folder(TINY), 100)
    asked, columns = source.asked(1, [1, 0]), source.columns(1, [1, 0])
    numbers = [int(text[1:]) for text in asked]
    assert numbers == [data.prompts.batch(1)[1], data.prompts.batch(1)[0]]
    assert columns == {"question": asked, "solution": numbers, "answer": numbers, "level": [[i] for i in numbers]}
    with pytest.raises(DataError, match=r"a.jsonl:1:1: no column `solved`\nhint: data.answer, one of question"):
        data_of(Data(source=path, prompt="question", answer="solved"))


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    folder = folder_with(CHATML, tmp_path / "model")
    path = lines(tmp_path / "a.jsonl", {"messages": TALK[:1]}, {"messages": TALK})
    data = data_of(Data(source=path, system="Be brief."), folder=folder)
    reference = AutoTokenizer.from_pretrained(folder)
    for prompt, messages in zip(data.prompts.prompts, (TALK[:1], TALK), strict=True):
        told = [{"role": "system", "content": "Be brief."}, *messages]
        assert prompt == reference.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert data.asked == ("How much is 2 + 3? ", "Sure? Ünï < >") and not data.special
    texts = lines(tmp_path / "b.jsonl", {"prompt": "good"})
    chat = data_of(Data(source=texts, chat=True, template={"enable_thinking": False}), folder=folder)
    assert chat.prompts.prompts[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and chat.asked == (
        "good",
    )
    plain = data_of(Data(source=texts), folder=folder)
    assert plain.prompts.prompts == ("good",) and plain.special


def test_a_conversation_that_ends_with_the_assistant_is_continued(tmp_path: Path) -> None:
    begun = [*TALK[:1], {"role": "assistant", "content": "2 + 3 ="}]
    for template in (CHATML, STRICT):
        folder = folder_with(template, tmp_path / f"model{len(template)}")
        data = data_of(Data(source=lines(tmp_path / "a.jsonl", {"messages": begun})), folder=folder)
        reference = AutoTokenizer.from_pretrained(folder)
        wanted = reference.apply_chat_template(begun, tokenize=False, continue_final_message=True)
        assert data.prompts.prompts == (wanted,) and wanted.endswith("2 + 3 =")
    folder = folder_with("{% for message in messages %}{{ message['role'] }}{% endfor %}", tmp_path / "model")
    with pytest.raises(DataError, match=r"a.jsonl:1:\d+: the chat template of .* changes the last message"):
        data_of(Data(source=str(tmp_path / "a.jsonl")), folder=folder)


def test_given_answers_of_conversations(tmp_path: Path) -> None:
    folder = folder_with(CHATML, tmp_path / "model")
    path = lines(tmp_path / "a.jsonl", {"messages": TALK[:2]})
    data = data_of(Data(source=path), ("response",), folder)
    assert data.responses == (("5",),) and data.prompts.prompts[0].endswith("assistant\n")
    pairs = lines(tmp_path / "b.jsonl", {"prompt": TALK[:1], "chosen": TALK[:2], "rejected": "6"})
    assert data_of(Data(source=pairs), ("chosen", "rejected"), folder).responses == (("5", "6"),)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "a.jsonl:1:2: `messages`: it is []"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "`messages`: message 0 is"),
        ({"messages": [{"role": "user", "content": None}]}, "needs a role of system"),
        ({"messages": TALK[1:2]}, "roles must alternate"),
        ({"text": "x"}, "`prompt` is None"),
    ],
)
def test_faulty_conversations_are_located(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = folder_with(STRICT, tmp_path / "model")
    with pytest.raises(DataError) as caught:
        data_of(Data(source=lines(tmp_path / "a.jsonl", row)), folder=folder)
    assert words in str(caught.value) and "a.jsonl:1:" in str(caught.value) and "hint:" in str(caught.value)


def test_parquet_folders_and_saved_data_sets(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(6)]
    table = pa.Table.from_pylist(rows)
    (tmp_path / "many").mkdir()
    pq.write_table(table.slice(0, 3), tmp_path / "many" / "a.parquet")
    lines(tmp_path / "many" / "b.jsonl", *rows[3:])
    (tmp_path / "many" / "README.md").write_text("not data")
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for place in ("many", "saved"):
        data = data_of(Data(source=str(tmp_path / place)))
        assert data.prompts.prompts == tuple(f"p{i}" for i in range(6)), place
        assert data.columns["answer"] == tuple("012345"), place
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="no Parquet"):
        data_of(Data(source=str(tmp_path / "c.parquet")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file of a known kind\nhint: files that end in .jsonl"):
        data_of(Data(source=str(tmp_path / "empty")))


def test_a_mixture_uses_rows_by_weight(tmp_path: Path) -> None:
    one = lines(tmp_path / "a.jsonl", *({"prompt": f"a{i}"} for i in range(4)))
    two = lines(tmp_path / "b.jsonl", *({"prompt": f"b{i}"} for i in range(10)))
    parts = [{"path": one, "weight": 2.0}, {"path": two, "weight": 0.5}]
    prompts = data_of(Data.model_validate({"source": parts}), batch=13).prompts
    assert prompts.epoch_size == 13
    first, second = Counter(prompts.texts(0)), Counter(prompts.texts(1))
    for epoch in (first, second):
        assert all(epoch[f"a{i}"] == 2 for i in range(4)) and sum(epoch[f"b{i}"] for i in range(10)) == 5
    assert first != second, "another half of the second file in each epoch"
    ordered = PromptSet(tuple("abcde"), 5, shuffle=False)
    assert ordered.texts(3) == list("abcde")


def score(name: str, **values: Any) -> float:
    function = BUILT_IN[name]
    lists = {"prompts": ["p"], "responses": [""], "completions": [""]} | {key: [value] for key, value in values.items()}
    (found,) = call(function, bind(name, function, [*values]), lists)
    return float(found)


@pytest.mark.parametrize(
    ("name", "response", "answer", "wanted"),
    [
        ("exact", " 42\n", "42", 1), ("exact", "so it is\n#### 42", "reasons\n#### 42", 1), ("exact", "43", "42", 0),
        ("exact", r"thus \boxed{\frac{1}{2}}.", r"\boxed{\frac{1}{2}}", 1), ("exact", "42 apples", "42", 0),
        ("math", r"the answer is $\frac{1}{2}$", "0.5", 1), ("math", r"\boxed{x^2 + 2x + 1}", "$(x+1)^2$", 1),
        ("math", "I think it is 7", "8", 0), ("math", "#### 1,000", "1000", 1), ("math", "no idea", "3", 0),
    ],
)  # fmt: skip
def test_answers_that_are_checked(name: str, response: str, answer: str, wanted: int) -> None:
    assert score(name, responses=response, answer=answer) == wanted


def test_form_and_code() -> None:
    assert score("format", responses="<think>2 + 2</think> 4") == 1
    assert score("format", responses="<think></think>4") == score("format", responses="4") == 0
    assert score("format", responses="<think>a</think>") == 0
    tests = "assert add(2, 3) == 5"
    block = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert score("code", responses=block, tests=tests) == 1
    assert score("code", responses=block.replace("+", "-"), tests=tests) == 0
    assert score("code", responses="```\nimport sys; sys.exit(0)\n```", tests="raise SystemExit(1)") == 1
    assert score("code", responses="x = bytearray(4 * 2**30)", tests="") == 0
    signalled = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"  # as slurm does to all processes of a job
    assert score("code", responses=signalled, tests="") == 1


def test_functions_of_one_sample() -> None:
    def reward(response: str, answer: str, prompt: str = "") -> float:
        return float(answer in response) + 2 * (prompt == "q1")

    values = {"prompts": ["q0", "q1"], "responses": ["a 1", "b"], "completions": ["a 1", "b"], "answer": ["1", "2"]}
    assert call(reward, bind("mine", reward, ["answer"]), values) == [1.0, 2.0]
