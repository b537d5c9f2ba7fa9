"""Reading the configuration again: what a running core makes of its file when that has changed, or was lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from moltbot_server.app import Core
from moltbot_server.cli.route_check import check_routes
from moltbot_server.config import Autoscaling, ConfigError, Settings, load_settings
from moltbot_server.config_keys import KEYS
from moltbot_server.errors import InvalidConfiguration
from moltbot_server.models.catalog import Catalog
from moltbot_server.reloading import LIVE
from moltbot_server.testing import ScriptedEngine
from moltbot_server.workspace import Workspace

ROUTE = "models: {primary: scripted}\n"
FLAGS = {"port": 0, "grpc_port": 0, "metrics_port": 0}


@asynccontextmanager
async def running(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> AsyncIterator[Core]:
    """Run a core by a `moltbot.yaml`, and by flags such as `moltbot start` gives to its core."""
    workspace = Workspace(folder=folder)
    workspace.create()
    workspace.config_file.write_text(text)
    reread = partial(load_settings, folder, environ or {}, FLAGS, current=folder)
    core = Core(reread(), key=workspace.read_key(), catalog=Catalog([ScriptedEngine()]), reread=reread)
    await core.start()
    try:
        yield core
    finally:
        await core.stop(1.0)


async def test_an_emptied_file_is_refused_and_what_it_said_holds_on(tmp_path: Path) -> None:
    async with running(tmp_path, ROUTE) as core:
        for text in ("", " \n\n"):
            (tmp_path / "moltbot.yaml").write_text(text)
            with pytest.raises(InvalidConfiguration, match=r"moltbot\.yaml is empty, .* holds on"):
                await core.reloading.reload()
        assert [route.id for route in core.reloading.routes] == ["default"]


async def test_a_file_that_is_gone_is_refused_and_what_it_said_holds_on(tmp_path: Path) -> None:
    async with running(tmp_path, ROUTE) as core:
        (tmp_path / "moltbot.yaml").unlink()
        with pytest.raises(InvalidConfiguration, match="is gone"):
            await core.reloading.reload()
        assert [route.id for route in core.reloading.routes] == ["default"]


async def test_a_file_of_comments_asks_for_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, ROUTE) as core:
        (tmp_path / "moltbot.yaml").write_text("# nothing for now\n")
        assert await core.reloading.reload() == []
        assert not core.reloading.routes


async def test_a_file_that_never_said_anything_may_be_empty_or_missing(tmp_path: Path) -> None:
    async with running(tmp_path, "", {"MOLTBOT_SYSTEM_PROMPT": "Be brief."}) as core:
        assert await core.reloading.reload() == []
        (tmp_path / "moltbot.yaml").unlink()
        assert await core.reloading.reload() == []


PLAIN = "providers:\n  office: {base_url: 'https://llm.example.com/v1', models: [team-large]}\n"
WRONG = [
    (
        "providers:\n  openai: {}\n  opnai: {}\n",
        3,
        r"providers\.opnai: no provider of this name .*; did you mean `openai`\? One of your own needs a `base_url`",
    ),
    (
        "providers:\n  office: {preset: opneai}\n",
        2,
        r"providers\.office\.preset: .* no preset `opneai`; did you mean `openai`\?",
    ),
    ("providers:\n  zzqqk: {models: [a]}\n", 2, r"providers\.zzqqk: no provider of .*; known are anthropic, azure, "),
    ("models:\n  primary: opnai/gpt-4o\n", 2, r"models\.primary: .* did you mean 'openai/gpt-4o'\?"),
    (
        "models:\n  primary: scripted\n  fallback:\n    - scriptd\n",
        4,
        r"models\.fallback: .* Did you mean 'scripted'\?",
    ),
    (
        f"{PLAIN}routes:\n  careful:\n    primary: team-lrge\n",
        5,
        r"routes\.careful\.primary: .* did you mean 'team-large'\?",
    ),
]
"""Configurations, the line of what is wrong in each, and what is said of it."""


@pytest.mark.parametrize(("text", "line", "said"), WRONG)
async def test_a_name_that_nobody_has_is_refused_by_a_core_at_its_line(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    async with running(tmp_path / "well", ROUTE) as core:
        (tmp_path / "well" / "moltbot.yaml").write_text(text)
        with pytest.raises(InvalidConfiguration, match=rf"moltbot\.yaml:{line}: {said}"):
            await core.reloading.reload()
        assert [route.id for route in core.reloading.routes] == ["default"]
    with pytest.raises(InvalidConfiguration, match=rf"moltbot\.yaml:{line}: {said}"):
        async with running(tmp_path / "wrong", text):
            pytest.fail("it serves")


@pytest.mark.parametrize(("text", "line", "said"), WRONG)
def test_a_name_that_nobody_has_is_refused_before_anything_starts(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    (tmp_path / "moltbot.yaml").write_text(f"{text}model_type: scripted\n")
    with pytest.raises(ConfigError, match=rf"moltbot\.yaml:{line}: {said}"):
        check_routes(load_settings(tmp_path, {}, current=tmp_path))


def test_what_an_engine_that_runs_may_have_by_now_is_left_to_the_cores(tmp_path: Path) -> None:
    (tmp_path / "moltbot.yaml").write_text("models: {primary: loaded-by-a-program}\n")
    check_routes(load_settings(tmp_path, {}, current=tmp_path), engine_runs=True)
    (tmp_path / "moltbot.yaml").write_text("providers: {opnai: {}}\nmodels: {primary: loaded-by-a-program}\n")
    with pytest.raises(ConfigError, match=r"providers\.opnai"):
        check_routes(load_settings(tmp_path, {}, current=tmp_path), engine_runs=True)


@pytest.mark.parametrize(
    "text",
    [
        f"{PLAIN}models: {{primary: team-large, fallback: [local, moltbot-demo, gpt-4o, groq/any, office/other]}}\n",
        "providers: {office: {preset: openai}, openai: }\nmodel_type: scripted\nmodels: {primary: scripted}\n",
        "engine: 127.0.0.1:50061\nmodels: {primary: what-only-the-engine-knows}\n",
        "model_type: scripted\nmodel_path: nowhere.yaml\nmodels: {primary: what-only-the-script-knows}\n",
    ],
)
def test_names_that_somebody_may_have_are_left_to_the_core(tmp_path: Path, text: str) -> None:
    (tmp_path / "moltbot.yaml").write_text(text)
    check_routes(load_settings(tmp_path, {}, current=tmp_path))


async def test_a_budget_for_a_model_that_is_not_there_is_told_at_its_line_and_for_one_that_is_not(
    tmp_path: Path,
) -> None:
    there, routed = (
        f"  - {{scope: model, model: {name}, period: day, max_tokens: 5}}\n" for name in ("scripted", "default")
    )
    away = "  - {scope: model, model: scriptd, period: day, max_tokens: 5}\n"
    async with running(tmp_path, f"{ROUTE}budgets:\n{there}{away}") as core:
        before = core.reloading.notices
        (tmp_path / "moltbot.yaml").write_text(f"{ROUTE}budgets:\n{routed}")
        await core.reloading.reload()
        after = core.reloading.notices
    assert before == (
        f"{tmp_path}/moltbot.yaml:4: a budget is for the model `scriptd`, which is not here now: "
        "nothing counts for it; did you mean `scripted`?",
    )
    assert [notice.partition(": ")[2] for notice in after] == [
        "a budget is for the model `default`, which is not here now: nothing counts for it."
    ]


async def test_what_holds_from_the_next_start_is_told_by_key_even_where_a_flag_hides_it(tmp_path: Path) -> None:
    async with running(tmp_path, f"{ROUTE}grpc_port: 50051\n") as core:
        (tmp_path / "moltbot.yaml").write_text(
            "models: {primary: scripted, cooldown: 2s}\ncurrency: EUR\n"
            "grpc_port: 50060\nmetrics_port: 9464\ncache: {ttl: 60}\noutbox: {lease: 20s}\n"
        )
        told = await core.reloading.reload()
    # 9464 is what holds without a word as well.
    assert told == ["cache.ttl", "grpc_port", "outbox.lease"]


def test_every_setting_is_told_by_a_key() -> None:
    settings = replace(Settings(workspace=Path()), autoscaling=Autoscaling())
    named = {key.partition(".")[0] for key in KEYS}
    assert named == {item.name for item in fields(Settings)} - {"workspace", "origins", "beneath"}
    for key in KEYS:
        section, _, name = key.partition(".")
        if section not in LIVE and name:
            held = getattr(settings, section)
            assert is_dataclass(held)
            assert hasattr(held, name), key
