"""Reading model folders: what is missing or wrong is said with what was found and what was expected."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.folder import families, read_folder
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
        f"MODEL_PATH {tmp_path / 'no'}: found nothing; expected the folder of a CTranslate2 model."
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


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.model").rename(folder / "spm.model")
    assert read_folder(folder).tokenizer.name == "spm.model"
    shutil.copy(folder / "spm.model", folder / "other.model")
    assert "found other.model, spm.model; expected one of them to be named tokenizer.model" in problem(folder)
    (folder / "spm.model").unlink()
    (folder / "other.model").unlink()
    assert problem(folder).endswith("expected tokenizer.model, a sentencepiece model.")
    (folder / "tokenizer.json").write_text("{}")
    assert "found tokenizer.json, another kind; expected tokenizer.model" in problem(folder)


def test_an_unknown_family_names_the_nearest_one(folder: Path) -> None:
    (folder / "moltbot.yaml").unlink()
    assert problem(folder, "lama2") == (
        "MODEL_TYPE is 'lama2'; expected one of chatml, llama-2, llama2, mistral, mistral-instruct, mixtral, qwen, "
        "tinyllama, zephyr. Did you mean llama2?"
    )
    assert "so MODEL_TYPE must name its family: one of chatml" in problem(folder)


def test_a_family_that_the_folder_denies_is_refused(folder: Path) -> None:
    assert re.search(r"MODEL_TYPE is 'llama2', but .*moltbot\.yaml says 'tiny'", problem(folder, "llama2"))
    describe(folder, family="zephyr")
    assert read_folder(folder, "tinyllama").family == "zephyr", "two names of one family"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chat_template": None}, "missing required field `chat_template`"),
        ({"chat_template": TEMPLATE | {"sytem": {}}}, "unknown field `sytem`"),
        ({"chat_template": TEMPLATE | {"user": {"prefix": 1}}}, "Expected `str`, got `int`"),
        ({"context_length": "long"}, "Expected `int`, got `str`"),
        ({"context_length": 4}, "context_length is 4; expected 16 or more"),
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
