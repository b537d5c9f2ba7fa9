"""What conversion refuses before it reads any weights; no extra is needed for it."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path

import pytest
from moltbot_server.errors import ModelExists, ModelUnavailable
from moltbot_server.models.convert import _told, convert


def source(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="the extra is installed here")
def test_without_the_extra_its_name_and_the_command_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        convert(source(tmp_path / "model"), tmp_path / "out")
    assert caught.value.message == (
        "Converting needs torch and transformers, which the extra `convert` brings: "
        "type  .venv/bin/python -m pip install --editable '.[convert]'  in MoltBot's folder and repeat the command."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_is_no_model_of_transformers_is_told_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"nothing: found no folder; expected config\.json and"):
        convert(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable, match="empty: found an empty folder; expected"):
        convert(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match=r"empty: found model\.gguf; expected"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_a_place_that_is_taken_and_an_unknown_number_type_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelExists, match="out exists already; choose another name or remove it first"):
        convert(source(tmp_path / "model"), tmp_path / "out")
    with pytest.raises(ModelUnavailable, match="'int4' is no number type; expected one of int8, int8_float32,"):
        convert(tmp_path / "model", tmp_path / "other", "int4")


def test_an_encoder_with_further_layers_is_refused(tmp_path: Path) -> None:
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Dense")]
    (source(tmp_path / "model") / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelUnavailable, match=r"modules\.json has a Dense; expected Transformer, Pooling, Normalize"):
        convert(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (ValueError("Couldn't make it from one of: \n(1) a file, \n(2) a word.\n"), "one of: (1) a file, (2) a word."),
        (RuntimeError("Error(s) in loading:\n\tsize mismatch for x\n"), "Error(s) in loading: size mismatch for x"),
        (ValueError("No conversion is registered for X\nSupported are:\n- Y"), "No conversion is registered for X"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "Permission denied (/x)"),
        (KeyError("a:"), "'a:'"),
        (ValueError("Missing:"), "Missing"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_a_library_says_of_a_model_is_told_to_its_end(problem: Exception, told: str) -> None:
    with pytest.raises(ModelUnavailable) as caught, _told(Path("/model")):
        raise problem
    assert caught.value.message.startswith("/model cannot be converted: ")
    assert caught.value.message.endswith(told)
