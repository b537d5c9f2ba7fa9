"""Reading model folders: what is missing or wrong is said with what was found and what was expected."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.folder import families, is_encoder, read_folder
from moltbot_server.models.tuning import Tuning
from tiny_model import TEMPLATE, describe, make_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "My Model"))


def problem(folder: Path, model_type: str = "") -> str:
    with pytest.raises(ModelUnavailable) as caught:
        read_folder(folder, model_type)
    return caught.value.message


def test_a_described_folder_says_all_of_itself(folder: Path) -> None:
    read = read_folder(folder)
    assert (read.id, read.display_name, read.family, read.context_length) == ("tiny", "Tiny random model", "tiny", 256)
    assert read.template.user.prefix == "<|user|>"
    assert read.template.stop == ("<|end|>",)
    assert (read.tokenizer, len(read.vocabulary), read.eos_token) == (folder / "tokenizer.model", 420, "<|end|>")


def test_a_folder_without_a_name_is_called_as_it_is_called(folder: Path) -> None:
    describe(folder, id=None, display_name=None)
    read = read_folder(folder)
    assert (read.id, read.display_name) == ("my-model", "My Model")


def test_a_family_stands_in_for_a_missing_description(folder: Path) -> None:
    (folder / "moltbot.yaml").unlink()
    read = read_folder(folder, "Llama2")
    assert (read.family, read.context_length, read.template) == ("llama2", 4096, families()["llama2"].chat_template)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert problem(tmp_path / "no") == (
        f"{tmp_path / 'no'}: found nothing; expected the folder of a CTranslate2 model."
    )
    (tmp_path / "file").write_text("x")
    assert "found a file; expected the folder" in problem(tmp_path / "file")


def test_missing_weights_are_named_with_what_is_there_instead(folder: Path) -> None:
    (folder / "model.bin").unlink()
    assert problem(folder) == (
        f"{folder}: found config.json, moltbot.yaml, tokenizer.model, vocabulary.json; "
        "expected model.bin, a CTranslate2 model."
    )
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "found model-00001-of-00002.safetensors, weights for Transformers (convert them with" in problem(folder)


def test_weights_that_are_not_whole_are_named(folder: Path) -> None:
    (folder / "config.json").rename(folder / "away.json")
    assert "found no config.json beside model.bin" in problem(folder)
    (folder / "away.json").rename(folder / "config.json")
    (folder / "model.bin").write_bytes(b"")
    assert "found an empty model.bin" in problem(folder)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.model").rename(folder / "spm.model")
    assert read_folder(folder).tokenizer.name == "spm.model"
    shutil.copy(folder / "spm.model", folder / "other.model")
    assert "found other.model, spm.model; expected one of them to be named tokenizer.model" in problem(folder)
    (folder / "spm.model").unlink()
    (folder / "other.model").unlink()
    assert problem(folder).endswith("expected tokenizer.json, or tokenizer.model for sentencepiece.")
    (folder / "tokenizer.json").write_text("{}")
    assert read_folder(folder).tokenizer.name == "tokenizer.json"


def test_an_unknown_family_names_the_nearest_one(folder: Path) -> None:
    (folder / "moltbot.yaml").unlink()
    assert problem(folder, "lama2") == (
        "MODEL_TYPE is 'lama2'; expected one of chatml, gemma, gemma2, gemma3, llama-2, llama-3, llama2, llama3, "
        "llama3.1, llama3.2, llama3.3, mistral, mistral-instruct, phi-3, phi3, qwen, qwen2, qwen2.5, qwen3, tinyllama, "
        "zephyr. Did you mean llama2?"
    )
    assert "neither a moltbot.yaml nor a chat template, so MODEL_TYPE must name its family: one of chatml" in problem(
        folder
    )


def test_a_family_that_the_folder_denies_is_refused(folder: Path) -> None:
    assert re.search(r"MODEL_TYPE is 'llama2', but .*moltbot\.yaml says 'tiny'", problem(folder, "llama2"))
    describe(folder, family="zephyr")
    assert read_folder(folder, "tinyllama").family == "zephyr", "two names of one family"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_length": None}, "missing required field `context_length`"),
        ({"chat_template": TEMPLATE | {"sytem": {}}}, "unknown field `sytem`"),
        ({"chat_template": TEMPLATE | {"user": {"prefix": 1}}}, "Expected `str`, got `int`"),
        ({"context_length": "long"}, "Expected `int`, got `str`"),
        ({"context_length": 4}, "context_length is 4; expected 16 to 16777216"),
    ],
)
def test_a_wrong_description_says_which_field(folder: Path, changes: dict[str, object], words: str) -> None:
    describe(folder, **changes)
    assert words in problem(folder)


def test_a_missing_or_broken_vocabulary_is_named(folder: Path) -> None:
    (folder / "vocabulary.json").write_text("[oh")
    assert "vocabulary.json cannot be read" in problem(folder)
    (folder / "vocabulary.json").unlink()
    assert "expected vocabulary.json, the list of tokens" in problem(folder)


def test_a_folder_without_any_template_says_where_one_may_stand(folder: Path) -> None:
    describe(folder, chat_template=None)
    assert (
        "found no chat template; expected chat_template in moltbot.yaml, chat_template.jinja, or as family one of"
        in (problem(folder))
    )


def test_a_family_whose_end_token_the_model_lacks_is_refused_with_those_that_fit(folder: Path) -> None:
    (folder / "moltbot.yaml").unlink()
    assert problem(folder, "qwen3") == (
        "MODEL_TYPE is qwen3, whose answers end with '<|im_end|>', but the model in "
        f"{folder} has no such token; its tokens would suit llama-2, llama2, mistral, mistral-instruct, phi-3, phi3, "
        "tinyllama, zephyr."
    )


JINJA = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def test_the_template_that_a_model_came_with_goes_before_its_familys(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(JINJA)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "other", "bos_token": {"content": "<s>"}}')
    (folder / "moltbot.yaml").unlink()
    read = read_folder(folder, "llama2")
    assert (read.jinja, read.template_options, read.context_length) == (JINJA, {"bos_token": "<s>"}, 4096)
    assert read.template.stop == ("<|end|>",), "what the template writes after an answer"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_a_model_came_with_needs_no_family_beside_it(folder: Path, place: str) -> None:
    (folder / "moltbot.yaml").unlink()
    (folder / place).write_text(json.dumps({"chat_template": JINJA}) if place.endswith("json") else JINJA)
    read = read_folder(folder)
    assert (read.jinja, read.family, read.template.stop) == (JINJA, "", ("<|end|>",))
    assert read.context_length == 2048, "the least of the families that end answers with these tokens"


async def test_a_model_with_a_template_alone_answers(folder: Path) -> None:
    (folder / "moltbot.yaml").unlink()
    (folder / "chat_template.jinja").write_text(JINJA)
    engine = LocalEngine(read_folder(folder), tuning=Tuning())
    await engine.start()
    assert engine.healthy
    await engine.close()


@pytest.mark.parametrize(("written", "expected"), [(300, 300), (10**30, 2048), (4, 2048), ("long", 2048), (None, 2048)])
def test_the_context_length_of_a_model_without_a_family_is_that_of_its_tokenizer_where_it_has_one(
    folder: Path, written: object, expected: int
) -> None:
    (folder / "moltbot.yaml").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": JINJA, "model_max_length": written}))
    assert read_folder(folder).context_length == expected
    assert read_folder(folder, "llama2").context_length == 4096, "a family that was named goes before it"


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_template_is_refused_unless_the_description_has_one(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)
    assert read_folder(folder).template.user.prefix == "<|user|>"
    for model_type in ("llama2", ""):
        (folder / "moltbot.yaml").unlink(missing_ok=True)
        assert "chat_template.jinja: found an empty file; expected a chat template in Jinja." in problem(
            folder, model_type
        )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (JINJA, JINJA),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": JINJA}], JINJA),
        ([{"name": "rag", "template": JINJA}], JINJA),
        (None, ""),
    ],
)
def test_a_template_stands_in_the_tokenizers_configuration_alone_or_by_name(
    folder: Path, written: object, expected: str
) -> None:
    describe(folder, chat_template=None, family="llama2")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": written}))
    assert read_folder(folder).jinja == expected


def test_a_template_of_the_description_goes_before_the_one_that_the_model_came_with(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ oh")
    read = read_folder(folder)
    assert (read.jinja, read.template.user.prefix) == ("", "<|user|>")


def test_a_broken_template_of_the_model_is_named_with_what_helps(folder: Path) -> None:
    describe(folder, chat_template=None)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    assert re.search(r"cannot be used: it cannot be read: .*; a chat_template in moltbot\.yaml goes", problem(folder))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('nobody may speak') }}")
    assert "cannot be used: nobody may speak;" in problem(folder)


def test_all_that_may_end_an_answer_is_gathered(folder: Path) -> None:
    words = list(read_folder(folder).vocabulary)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [words.index("</s>"), 99999, -1]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|user|>"}))
    assert read_folder(folder).template.stop == ("<|end|>", "<|user|>", "</s>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": words.index("<|bot|>")}))
    assert read_folder(folder).template.stop == ("<|end|>", "<|user|>", "<|bot|>")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", "[1]", "found a list; expected an object with names"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template is 7; expected a text"),
        ("generation_config.json", "oh", "generation_config.json cannot be read"),
    ],
)
def test_a_broken_file_of_the_model_is_named(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    assert words in problem(folder)


def test_every_family_lays_a_conversation_out(folder: Path) -> None:
    for name, family in families().items():
        assert family.context_length >= 512, name
        assert family.chat_template.stop, name
        assert family.chat_template.user.prefix, name


@pytest.mark.parametrize("name", ["model.bin", "config.json", "tokenizer.model", "moltbot.yaml", "notes"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is no plain file" in problem(folder)
    assert not is_encoder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "moltbot.yaml"])
def test_what_is_nested_too_deeply_is_told(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 200_000 + "]" * 200_000)
    assert f"{name}" in (told := problem(folder))
    assert "nested too deeply" in told


@pytest.mark.parametrize("length", [15, 99_999_999_999_999])
def test_a_context_that_no_model_has_is_refused(folder: Path, length: int) -> None:
    describe(folder, context_length=length)
    assert f"context_length is {length}; expected 16 to" in problem(folder)
