"""The scripted engine: what it says, how fast, and how it breaks on request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
from moltbot_server.errors import ContentTooLarge, ModelUnavailable, QueueFull
from moltbot_server.models.engine import Chunk, Finished
from moltbot_server.models.engine import stream as streamed
from moltbot_server.models.engines.scripted import Failure, Rule, Script, ScriptedEngine, Tokens, load_script
from moltbot_server.turns import FinishReason, GenerationOptions, Message, Role, TextPart, Usage

ASK = GenerationOptions()


def said(text: str, role: Role = Role.USER) -> Message:
    return Message(role=role, parts=(TextPart(text=text),))


async def ask(
    text: str, script: Script | None = None, options: GenerationOptions = ASK, before: Sequence[Message] = ()
) -> tuple[list[str], Finished]:
    engine = ScriptedEngine(script)
    await engine.start()
    async with aclosing(streamed(engine, [*before, said(text)], options)) as stream:
        items = [item async for item in stream]
    finished = items.pop()
    assert isinstance(finished, Finished)
    return [item.text for item in items if isinstance(item, Chunk)], finished


async def test_without_a_script_it_repeats_what_it_was_told() -> None:
    deltas, finished = await ask("hello  你好\nworld ")
    assert deltas == ["You", " said:", " hello", "  你好", "\nworld", " "]
    assert finished.usage == Usage(output_tokens=6)
    assert finished.finish_reason is FinishReason.STOP


async def test_the_first_rule_that_matches_answers() -> None:
    script = Script(
        rules=(
            Rule(match="^hi", deltas=("Hey", "!"), usage=Tokens(input_tokens=70, output_tokens=7)),
            Rule(match=r"(\w+) plus (\w+)", template="{2} and {1} of {messages} in {system}{other}"),
            Rule(match="limit", deltas=("cut",), finish_reason=FinishReason.LENGTH),
        )
    )
    deltas, finished = await ask("hi there", script)
    assert (deltas, finished.usage) == (["Hey", "!"], Usage(input_tokens=70, output_tokens=7))
    before = (said("S", Role.SYSTEM), said("one"), said("two", Role.ASSISTANT))
    assert "".join((await ask("a plus b", script, before=before))[0]) == "b and a of 4 in S{other}"
    assert (await ask("limit", script))[1].finish_reason is FinishReason.LENGTH
    assert "".join((await ask("else", script))[0]) == "You said: else"


async def test_a_directive_sets_the_number_of_deltas() -> None:
    deltas, finished = await ask("#32")
    assert len(deltas) == finished.usage.output_tokens == 32
    assert "".join(deltas[:4]) == "one two three four"
    assert "".join((await ask("#32 apples"))[0]) == "You said: #32 apples"
    assert (await ask("#0"))[0] == []


async def test_a_directive_sets_the_pace() -> None:
    engine = ScriptedEngine()
    await engine.start()
    loop = asyncio.get_running_loop()
    began = loop.time()
    times = [loop.time() - began async for _ in streamed(engine, [said("#5 wait=0.2 pace=0.05")], ASK)]
    due = [0.2, 0.25, 0.3, 0.35, 0.4]
    assert all(planned - 0.01 <= at < planned + 1 for at, planned in zip(times, due, strict=False))


async def test_without_pauses_it_never_gives_way_to_the_loop() -> None:
    engine = ScriptedEngine()
    await engine.start()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert len([item async for item in streamed(engine, [said("#1000")], ASK)]) == 1001
    assert turns == 0
    task.cancel()


async def test_it_breaks_where_it_is_told_to() -> None:
    engine = ScriptedEngine(Script(rules=(Rule(match="full", deltas=("a",), fail=Failure(reason="QUEUE_FULL")),)))
    await engine.start()
    async with aclosing(streamed(engine, [said("#9 fail=3")], ASK)) as stream:
        seen = [await anext(stream) for _ in range(3)]
        with pytest.raises(ModelUnavailable):
            await anext(stream)
    assert all(isinstance(item, Chunk) for item in seen)
    with pytest.raises(QueueFull):
        await anext(streamed(engine, [said("full")], ASK))
    with pytest.raises(QueueFull):
        await anext(streamed(engine, [said("#1 fail=0:QUEUE_FULL")], ASK))


async def test_limits_and_stop_texts_are_kept() -> None:
    deltas, finished = await ask("#32", options=GenerationOptions(max_output_tokens=3))
    assert ("".join(deltas), finished.finish_reason) == ("one two three", FinishReason.LENGTH)
    deltas, finished = await ask("#32", options=GenerationOptions(stop=("o three",)))
    assert ("".join(deltas), finished.finish_reason) == ("one tw", FinishReason.STOP_TEXT)
    deltas, finished = await ask("#2", options=GenerationOptions(stop=("two!",), max_output_tokens=2))
    assert ("".join(deltas), finished.finish_reason) == ("one two", FinishReason.STOP)


async def test_it_answers_only_between_start_and_close() -> None:
    engine = ScriptedEngine()
    with pytest.raises(ModelUnavailable):
        await anext(streamed(engine, [said("x")], ASK))
    await engine.start()
    await engine.close()
    assert not engine.healthy
    with pytest.raises(ModelUnavailable):
        await anext(streamed(engine, [said("x")], ASK))


def test_a_script_is_read_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "script.yaml"
    file.write_text(
        "id: bench\ncontext_length: 512\nrules:\n"
        "  - {match: ^hi, deltas: [Hey, '!'], first_delay: 0.1, pace: 1, fail: {after: 1, reason: QUEUE_FULL}}\n"
        "  - {match: you, template: 'me, {text}', usage: {input_tokens: 3, output_tokens: 4}}\n"
    )
    assert load_script(file) == Script(
        id="bench",
        context_length=512,
        rules=(
            Rule(
                match="^hi",
                deltas=("Hey", "!"),
                first_delay=0.1,
                pace=1,
                fail=Failure(after=1, reason="QUEUE_FULL"),
            ),
            Rule(match="you", template="me, {text}", usage=Tokens(input_tokens=3, output_tokens=4)),
        ),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: [{match: '(', template: x}]", r"'\(' is no regular expression"),
        ("rules: [{mach: x}]", r"unknown field `mach` - at `\$\.rules\[0\]`"),
        ("rules: [{pace: -1}]", "cannot be negative"),
        ("rules: [{fail: {reason: NOPE}}]", "no failure has the reason 'NOPE'; one of .*QUEUE_FULL"),
        (f"rules: [{{fail: {{reason: {ContentTooLarge.reason}}}}}]", "no failure has the reason"),
        ("]", "is not a script"),
    ],
)
def test_a_wrong_script_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "script.yaml"
    file.write_text(text)
    with pytest.raises(ModelUnavailable, match=words):
        load_script(file)
    with pytest.raises(ModelUnavailable, match="expected a YAML file with a script"):
        load_script(tmp_path / "none.yaml")
