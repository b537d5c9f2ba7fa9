"""Conversion of small models made on the spot: what the result says is what Transformers itself says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import yaml
from moltbot_server.errors import ModelExists, ModelUnavailable
from moltbot_server.models.convert import convert
from moltbot_server.models.detokenizer import Detokenizer
from moltbot_server.models.engine import Chunk, stream
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.folder import read_folder
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.models.tuning import Tuning
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart
from transformers_models import MODELS, make, torch, transformers

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch", "ignore::DeprecationWarning")
CONVERSATION = (("user", "hello, how do I install the server 你好"), ("assistant", "pack my box"), ("user", "why 🎉"))


def messages() -> list[Message]:
    return [Message(role=Role(role), parts=(TextPart(text=text),)) for role, text in CONVERSATION]


def plain() -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in CONVERSATION]


def generated(model: Any, ids: list[int], most: int) -> list[int]:
    with torch.no_grad():
        whole = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)
    return [int(index) for index in whole[0][len(ids) :]]


@pytest.mark.parametrize("name", MODELS)
async def test_a_converted_model_reads_and_writes_as_transformers_does(name: str, tmp_path: Path) -> None:
    model, tokenizer = make(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "target", "float32")
    folder = read_folder(tmp_path / "target")
    prompt = Tokenizer(folder).prompt(messages())
    reference = tokenizer.apply_chat_template(plain(), add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = [int(index) for index in reference["input_ids"]]
    assert [folder.vocabulary.index(token) for token in prompt] == ids
    answer = generated(model, ids, min(40, folder.context_length - len(ids)))
    assert len(set(answer)) > 5, "an answer that could not be wrong proves nothing"
    ends = {folder.vocabulary.index(token) for token in folder.template.stop}
    answer = list(itertools.takewhile(lambda index: index not in ends, answer))
    engine = LocalEngine(folder, tuning=Tuning(replicas=1))
    await engine.start()
    try:
        options = GenerationOptions(max_output_tokens=40)
        said = [item async for item in stream(engine, messages(), options)]
    finally:
        await engine.close()
    text = Detokenizer(Tokenizer(folder).surfaces)
    assert "".join(item.text for item in said if isinstance(item, Chunk)) == text.feed(answer) + text.flush()


def test_the_result_describes_itself(tmp_path: Path) -> None:
    make("qwen 3", tmp_path / "Qwen-Tiny-Instruct")
    (tmp_path / "Qwen-Tiny-Instruct" / "LICENSE").write_text("as you like")
    heard: list[tuple[str, float]] = []
    convert(tmp_path / "Qwen-Tiny-Instruct", tmp_path / "out", progress=lambda *stage: heard.append(stage))
    written = yaml.safe_load((tmp_path / "out" / "moltbot.yaml").read_text())
    assert written["provenance"].startswith("Converted from Qwen-Tiny-Instruct, a qwen3 of Transformers, to int8 with")
    described = {name: written[name] for name in ("family", "display_name", "context_length")}
    assert described == {"family": "qwen", "display_name": "Qwen-Tiny-Instruct", "context_length": 512}
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    assert [share for _, share in heard] == sorted(share for _, share in heard)
    assert [stage for stage, _ in heard] == ["reading", "reading", "converting", "writing", "checking", "finished"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Qwen-Tiny-Instruct", "out"]


def test_a_model_that_reasons_is_asked_not_to(tmp_path: Path) -> None:
    _, tokenizer = make("qwen 3", tmp_path / "source")
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    tokenizer.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    assert Tokenizer(read_folder(tmp_path / "out")).prompt(messages())[-2:] == ["<think>", "</think>"]


@pytest.mark.parametrize(("name", "tokens"), [("mistral with a window", 96), ("gemma 3", 96), ("llama 3.1", 131072)])
def test_a_model_reads_as_far_as_it_is_computed_right(name: str, tokens: int, tmp_path: Path) -> None:
    make(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    assert read_folder(tmp_path / "out").context_length == tokens


def test_several_end_tokens_are_taken_over(tmp_path: Path) -> None:
    _, tokenizer = make("qwen 2", tmp_path / "source")
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    convert(tmp_path / "source", tmp_path / "out")
    assert set(read_folder(tmp_path / "out").template.stop) == {"<|im_end|>", "<|endoftext|>", "<|end|>"}


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    make("llama 3", tmp_path / "source")
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelExists, match="there exists already"):
        convert(tmp_path / "source", tmp_path / "there")
    with pytest.raises(ModelUnavailable, match="'int3' is no number type; expected one of int8,"):
        convert(tmp_path / "source", tmp_path / "out", "int3")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match="source cannot be converted: RoPE scaling type 'yarn' is not yet"):
        convert(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelUnavailable, match="source cannot be converted"):
        convert(tmp_path / "source", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "there"]


def test_a_model_for_something_else_is_refused(tmp_path: Path) -> None:
    config = transformers.MarianConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_start_token_id=0,
    )  # fmt: skip
    transformers.MarianMTModel(config).save_pretrained(tmp_path / "source")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.llama()).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelUnavailable, match="source cannot be converted"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_model_without_a_template_and_family_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.byte_level(), eos_token="<|end|>")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "eos_token_id": 1, "bos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(ModelUnavailable, match="no chat template, and its kind, gpt2, is no family that is known"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
