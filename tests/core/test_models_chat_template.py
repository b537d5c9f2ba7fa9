"""Chat templates of model folders: laid out as their authors mean them, and harmless when their authors mean harm."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import ctranslate2
import pytest
import tiny_tokenizers
from moltbot_server.errors import InvalidField, ModelUnavailable
from moltbot_server.models.chat_template import JinjaLayout, Said, TemplateRefused, end_of_answer
from moltbot_server.models.chat_template_sandbox import compile_template
from moltbot_server.models.engine import Chunk, stream
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.folder import read_folder
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.models.tuning import Tuning
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart
from tiny_model import describe, make_tiny_model
from tokenizers import Tokenizer as Library

U, A, S = Role.USER, Role.ASSISTANT, Role.SYSTEM
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{%- for m in messages -%}\n"
    "    {{ '<|im_start|>' ~ m['role'] + '\n' + m.content | trim }}{{ '<|im_end|>\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def laid_out(source: str, *turns: tuple[Role, str]) -> str:
    layout = JinjaLayout(source, compile_template(source, NAMES))
    return layout.prompt([Said(role, text) for role, text in turns])


def test_a_template_lays_a_conversation_out_up_to_the_answer() -> None:
    text = laid_out(CHATML, (S, "Be brief."), (U, " hi "), (A, "yes"), (U, "and?"))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_has_what_hugging_face_gives_it() -> None:
    source = (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') | length }}{% endif %} {{ tools is none }} "
        "{{ {'a': 'é<'} | tojson }} {{ [1, 2] | tojson(indent=1) | length }}\n"
        "  {% for m in messages %}\n"
        "    {% if loop.first and not loop.last %}{% continue %}{% endif %}\n"
        "{{ m.role }}{% generation %}:{{ m.content }}{% endgeneration %} {{ loop.index }}/{{ loop.length }} "
        "{{ loop.previtem.content if loop.previtem else '-' }}|\n"
        "    {% if loop.index == 9 %}{% break %}{% endif %}\n"
        "  {% endfor %}\n"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('+') }}"
        "{{ messages[::-1][0].content }}{{ messages[-1].content.split('h')[-1].strip().upper().startswith('I') }}"
    )
    assert laid_out(source, (U, "hi")) == '4 True {"a": "é<"} 10\nuser:hi 1/1 -|\nhihiTrue'
    assert laid_out(source, (U, "hi"), (A, "yo")).startswith('4 True {"a": "é<"} 10\nassistant:yo 2/2 hi|\n')


def test_a_template_without_a_system_message_gets_it_in_the_first_question() -> None:
    assert laid_out(STRICT, (S, "Be brief."), (U, "hi"), (A, "yes"), (U, "and?")) == (
        "<s>[user]Be brief.\n\nhi[assistant]yes</s>[user]and?"
    )
    silent = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert laid_out(silent, (S, "Be brief."), (U, "hi")) == "<user>Be brief.\n\nhi"
    assert laid_out(STRICT, (S, "Only this.")) == "<s>[user]Only this."


def test_a_template_that_wants_turns_gets_them() -> None:
    assert laid_out(STRICT, (A, "old"), (U, "one"), (U, "two")) == "<s>[user]one\ufdd0\n\ntwo"
    assert laid_out(STRICT, (U, "q"), (A, "a"), (A, "b"), (U, "c")).startswith("<s>[user]q[assistant]a\ufdd0\n\nb</s>")


def test_what_no_rearrangement_makes_right_is_refused_by_field() -> None:
    source = "{% if messages | length > 6 %}{{ raise_exception('too many') }}{% endif %}" + STRICT
    with pytest.raises(InvalidField, match="the model's chat template refuses them: too many") as caught:
        laid_out(source, *[(U, "q"), (A, "a")] * 4)
    assert list(caught.value.fields) == ["messages"]


def test_options_of_the_folder_reach_the_template() -> None:
    source = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %} quietly{% endif %}"
    render = compile_template(source, {"enable_thinking": False})
    assert render([{"role": "user", "content": "hi"}], opened=True) == "hi quietly"


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }} </s>\n{% endfor %}", "</s>"),
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }}<|no token|>{% endfor %}", ""),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
    ],
)
def test_what_a_template_writes_after_an_answer_ends_one(source: str, end: str) -> None:
    assert end_of_answer(compile_template(source, NAMES), frozenset({"</s>", "<|im_end|>"})) == end


GROW = "{% set ns = namespace(x='ab' * 1000, l=[1], m=[1]) %}{% for i in range(1000) %}"
NEST = (
    GROW + "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% if i > 60 %}{% break %}{% endif %}{% endfor %}"
)
LONG = "{% set x = 'a' * 4000 %}{% set x = x" + "~ x" * 40 + " %}"
HOSTILE = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in range(1000) recursive %}{{ loop(range(1000)) }}{% endfor %}",
    GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    GROW + "{% set ns.x = ns.x | replace('a', 'aaaaaaaa') %}{% endfor %}",
    GROW + "{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}{% endfor %}",
    GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    NEST + "{{ ns.l }}",
    NEST + "{{ ns.l == ns.m }}",
    NEST + "{{ ns.l is eq(ns.m) }}",
    NEST + "{{ ns.l | string | length }}",
    NEST + "{{ ns.l | tojson | length }}",
    LONG + "{% for i in range(19000) %}{% set y = x | upper %}{% endfor %}",
    LONG + "{% for i in range(19000) %}{% set y = x.upper() %}{% endfor %}",
    LONG + "{% for i in range(19000) %}{% set y = x[::-1] %}{% endfor %}",
    LONG + "{% for i in range(19000) %}{% if x == 'b' %}{% endif %}{% endfor %}",
    "{% for a in range(100000) %}{{ 'a' * 4096 }}{% endfor %}",
    "{% set x %}{% for a in range(100000) %}{{ 'a' * 4096 }}{% endfor %}{% endset %}",
    "{{ 10 ** 10 ** 9 }}",
    "{% set ns = namespace(x=9) %}{% for a in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ [0] * 1000000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ range(100000) | list | join('a' * 4096) }}",
    "{{ ('a' * 4096).join(range(100000)) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "x" * 300_000,
    "{{ messages.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(content='x') }}",
    "{% include 'secrets' %}",
    "{{ lipsum(100) }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:70])
def test_a_hostile_template_is_refused_soon_and_small(source: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(TemplateRefused):
            compile_template(source, {})([{"role": "user", "content": "hi"}], opened=True)
        assert time.process_time() - began < 6.0  # a second by itself
        assert tracemalloc.get_traced_memory()[1] < 32_000_000
    finally:
        tracemalloc.stop()


def test_a_long_conversation_is_laid_out_within_the_bounds() -> None:
    turns = [(role, "word " * 400) for _ in range(500) for role in (U, A)]
    text = laid_out(CHATML, *turns, (U, "x" * 1_000_000))
    assert text.count("<|im_start|>") == 1002


def said(role: Role, text: str) -> Message:
    return Message(role=role, parts=(TextPart(text=text),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Qwen's kind: a byte-level tokenizer.json, a template in Jinja, end tokens in several files."""
    library = tiny_tokenizers.byte_level()
    folder = make_tiny_model(
        tmp_path_factory.mktemp("models") / "tiny", words=tiny_tokenizers.vocabulary(library), layers=1
    )
    tiny_tokenizers.write(library, folder)
    describe(folder, chat_template=None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|endoftext|>"}))
    return folder


async def test_a_model_with_a_template_and_a_tokenizer_of_its_own_answers(folder: Path) -> None:
    read = read_folder(folder)
    assert read.template.stop == ("<|im_end|>", "<|endoftext|>")
    messages = [said(S, "Be brief."), said(U, "hello 你好 🎉")]
    library = Library.from_file(str(folder / "tokenizer.json"))
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello 你好 🎉<|im_end|>\n<|im_start|>assistant\n"
    prompt = [library.id_to_token(index) for index in library.encode(text, add_special_tokens=False).ids]
    assert Tokenizer(read).prompt(messages) == prompt
    engine = LocalEngine(read, tuning=Tuning(replicas=1))
    await engine.start()
    try:
        chunks = [item async for item in stream(engine, messages, GenerationOptions(max_output_tokens=40))]
    finally:
        await engine.close()
    generator = ctranslate2.Generator(str(folder), intra_threads=1)
    ends = [library.token_to_id(token) for token in (*read.template.stop, read.eos_token)]
    offline = generator.generate_batch([prompt], max_length=40, end_token=ends, include_prompt_in_result=False)[0]
    ids = [index for index in offline.sequences_ids[0] if index not in ends]
    assert "".join(item.text for item in chunks if isinstance(item, Chunk)) == library.decode(ids)


def test_a_template_that_cannot_be_used_is_told_by_the_tokenizer_too(folder: Path) -> None:
    read = read_folder(folder)
    broken = type(read)(**{name: getattr(read, name) for name in read.__struct_fields__} | {"jinja": "{% oh %}"})
    with pytest.raises(ModelUnavailable, match="its chat template cannot be used: it cannot be read"):
        Tokenizer(broken)
