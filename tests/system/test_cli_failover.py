"""`moltbot failover test` and `moltbot route` as people run them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from cli_process import Home
from moltbot_server.testing_provider import MockProvider, Script

SCENARIOS = {"S19", "S20", "S21", "S22", "S23", "S24", "S25"}
QUICK = "threshold: {latency: 300ms}, timeout: 1s, cooldown: 2s"
"""Times of a route that a test can wait for."""


@pytest.fixture
async def home(tmp_path: Path) -> Home:
    """A home folder with an empty workspace."""
    (tmp_path / "home").mkdir()
    home = Home(tmp_path / "home", variables={"MODEL_TYPE": "scripted"})
    await home.run("init")
    return home


def configure(home: Home, text: str) -> None:
    (home.workspace / "moltbot.yaml").write_text(text)


def rows(report: Any, scenario: str) -> list[Any]:
    return [row for row in report["scenarios"] if row["scenario"] == scenario]


class TestFailoverTest:
    async def test_a_route_as_configured_is_proved_against_every_scenario(self, home: Home) -> None:
        configure(
            home,
            f"providers: {{azure: {{base_url: 'https://unreachable.test', models: [my-gpt]}}}}\n"
            f"models: {{primary: my-gpt, fallback: [opus-4.5, local], {QUICK}}}\n",
        )
        home.variables["ANTHROPIC_API_KEY"] = "sk-ant-a-real-key-0123456789"
        before = {path.name: path.stat().st_mtime_ns for path in home.workspace.iterdir()}

        ended = await home.run("failover", "test", "--json")

        report = ended.json
        assert [row for row in report["scenarios"] if row["result"] != "pass"] == []
        assert ended.status == 0
        assert (report["route"], report["sample"]) == ("default", False)
        assert report["models"] == ["my-gpt", "opus-4.5", "local"]
        assert {row["scenario"] for row in report["scenarios"]} == SCENARIOS
        assert report["seconds"] < 60
        first_words = {row["fault"]: row["first_token_ms"] for row in report["scenarios"]}
        assert first_words["500 before the first word"] < 1000
        assert 300 <= first_words["it hangs before the first word"] <= 800
        assert rows(report, "S22")[0]["seen"] == "an answer begun anew by opus-4.5"
        assert rows(report, "S19")[0]["asked"] == ["my-gpt", "opus-4.5"]
        # Nothing of the real workspace was touched, and nothing of its keys told.
        assert {path.name: path.stat().st_mtime_ns for path in home.workspace.iterdir()} == before
        assert "sk-ant" not in ended.out + ended.err

    async def test_what_a_route_cannot_bear_fails_with_the_reason(self, home: Home) -> None:
        configure(home, f"routes: {{alone: {{primary: gpt-4o, on_failure: stop, {QUICK}}}}}\n")

        ended = await home.run("failover", "test")

        assert ended.status == 1
        lines = ended.out.splitlines()
        assert lines[0] == "Faults of gpt-4o, the first model of the route alone: gpt-4o"
        assert "The route has one model only: nobody can stand in for it." in lines
        assert any(line.startswith("S19") and "FAIL: the user saw an error" in line for line in lines)
        assert any(line.startswith("S21") and "FAIL: the user saw an error" in line for line in lines)
        assert any(line.startswith("S25") and line.endswith("pass") for line in lines)
        assert "Playing faults" not in ended.out
        assert "Traceback" not in ended.err

    async def test_a_local_model_stays_local_and_faults_that_it_cannot_have_are_skipped(self, home: Home) -> None:
        configure(home, f"routes: {{home: {{primary: local, fallback: [deepseek-chat], on_failure: stop, {QUICK}}}}}\n")

        report = (await home.run("failover", "test", "--route", "home", "--json")).json

        assert (report["failed"], report["skipped"] > 0) == (0, True)
        assert {row["result"] for row in rows(report, "S24")} == {"skipped"}
        assert rows(report, "S22")[0]["seen"] == "the beginning of an answer by local"
        assert "A scripted model stands in for each local one." in report["notes"]

    async def test_without_a_route_a_sample_is_proved_and_that_is_said(self, home: Home) -> None:
        from moltbot_server.cli.failover_plan import plan
        from moltbot_server.config import Settings

        drill = plan(Settings(workspace=home.workspace), "", ())

        assert drill.is_sample
        assert [candidate.name for candidate in drill.candidates] == ["sample-first", "sample-second"]
        assert "No route is configured" in drill.notes[0]

    async def test_a_workspace_that_is_named_and_not_there_is_told(self, home: Home) -> None:
        by_option = await home.run("failover", "test", "--workspace", str(home.folder / "nowhere"))
        home.variables["MOLTBOT_WORKSPACE"] = str(home.folder / "nothing")
        by_variable = await home.run("failover", "test")
        as_json = await home.run("failover", "test", "--json")

        assert (by_option.status, by_option.out) == (78, "")
        assert f"there is no workspace in {home.folder}/nowhere: make one with `" in by_option.err
        assert (by_variable.status, f"no workspace in {home.folder}/nothing" in by_variable.err) == (78, True)
        assert (as_json.status, as_json.json["error"]["status"]) == (78, 78)

    async def test_a_provider_that_nobody_knows_is_told_and_not_tried(self, home: Home) -> None:
        configure(home, "providers:\n  opnai: {models: [m]}\nmodels: {primary: m}\n")
        ended = await home.run("failover", "test")
        assert ended.status == 78
        assert "moltbot.yaml:2: providers.opnai: no provider of this name is known; did you mean `openai`?" in ended.err

    async def test_a_route_that_is_not_there_is_told_with_those_that_are(self, home: Home) -> None:
        nothing = await home.run("failover", "test", "--route", "careful")
        configure(home, "routes: {a: {primary: gpt-4o}, b: {primary: gpt-4o}}\n")
        none_by_default = await home.run("failover", "test")
        configure(home, "routes: {a: {primary: nobody-knows-this, fallback: [gpt-4o, nor-this]}}\n")
        nowhere = await home.run("failover", "test", "--json")

        assert (nothing.status, "there is no route 'careful'" in nothing.err) == (2, True)
        assert (none_by_default.status, "choose one with --route: a, b" in none_by_default.err) == (2, True)
        assert nowhere.status == 78
        assert all(name in nowhere.json["error"]["message"] for name in ("nobody-knows-this", "nor-this"))

    async def test_help_teaches_the_commands_by_example(self, home: Home) -> None:
        assert "moltbot failover test" in (await home.run("failover")).out
        assert "--route NAME" in (await home.run("failover", "test", "--help")).out
        for name in ("list", "reload"):
            assert f"\n    {name} " in (await home.run("route")).out
            assert f"moltbot route {name} --json" in (await home.run("route", name, "--help")).out


class TestRoutes:
    @pytest.fixture
    async def mocks(self) -> AsyncIterator[list[MockProvider]]:
        """A provider that always fails, and one that is well."""
        async with AsyncExitStack() as stack:
            scripts = ({"faults": ["error status=503"]}, {"text": "I am well."})
            yield [await stack.enter_async_context(MockProvider(Script.read(each)).running()) for each in scripts]

    async def test_routes_are_listed_with_how_their_models_are_and_read_again(
        self, home: Home, mocks: list[MockProvider]
    ) -> None:
        providers = "".join(
            f"  {name}: {{base_url: '{mock.address}/v1', models: [{name}-model]}}\n"
            for name, mock in zip(("sick", "well"), mocks, strict=True)
        )
        configure(home, f"providers:\n{providers}models: {{primary: sick-model, fallback: [well-model]}}\n")
        home.variables |= {"SICK_API_KEY": "a-key-0123456789", "WELL_API_KEY": "a-key-0123456789"}
        async with home.started():
            before = (await home.run("route", "list")).out.splitlines()
            told = [(await home.run("chat", "--json", "Hello")).json["text"] for _ in range(6)]
            (route,) = (await home.run("route", "list", "--json")).json["routes"]
            table = (await home.run("route", "list")).out.splitlines()
            shown = (await home.run("model", "show", "well-model")).out
            configure(home, f"providers:\n{providers}models: {{primary: nobody-knows-this}}\nport: 1234\n")
            refused = await home.run("route", "reload")
            configure(home, f"providers:\n{providers}models: {{primary: well-model}}\nsystem_prompt: Be brief.\n")
            reloaded = await home.run("route", "reload")
            now = (await home.run("chat", "--json", "Hello")).json
            again = (await home.run("route", "reload", "--json")).json

        assert told == ["I am well."] * 6
        sick, well = route["models"]
        assert (route["name"], route["default"]) == ("default", True)
        assert (sick["model"], sick["error_rate"]) == ("sick-model", 1.0)
        assert sick["recent_attempts"] >= 5  # on a slow machine it was tried again meanwhile
        assert sick["state"] in ("open", "half_open")
        assert "503" in sick["reason"]
        assert (well["state"], well["error_rate"], well["rest_ms"], well["reason"]) == ("closed", 0.0, 0.0, "")
        assert well["first_token_ms"] > 0
        assert well["attempts"] == 6
        assert "Runs       ready" in shown
        assert "Let it answer" not in shown  # a switch takes models of the workspace alone
        assert table[0].split()[:3] == ["ROUTE", "MODEL", "STATE"]
        assert table[1].startswith("default *  sick-model")
        assert [" ".join(line.split()[-7:]) for line in before[1:]] == ["not asked yet - 0 - -"] * 2
        assert " in use " in table[2]
        assert (refused.status, refused.out) == (78, "")
        assert "nothing was changed" in refused.err
        assert "nobody-knows-this" in refused.err
        assert reloaded.status == 0
        assert "1 route is in use." in reloaded.out
        assert "A restart is needed for what else was changed: system_prompt." in reloaded.out
        assert now["model"] == "models/well-model"
        assert again["needs_restart"] == ["system_prompt"]

    async def test_a_route_is_named_as_one_and_a_provider_that_is_gone_by_the_log_once(self, home: Home) -> None:
        configure(
            home,
            "providers: {gone: {base_url: 'http://127.0.0.1:9/v1', models: [anything]}}\n"
            "models: {primary: gone/anything}\n",
        )
        home.variables["GONE_API_KEY"] = "a-key-0123456789"
        async with home.started() as started:
            status, found = (await home.run("status")).out, (await home.run("status", "--json")).json
            ended = [(await home.run("chat", "Hello you")) for _ in range(2)]
        assert ". Route: default (gone/anything)." in started.said
        assert "\n  Route   default (gone/anything)\n" in status
        assert (found["model"], found["route"]) == ("default", ["gone/anything"])
        assert [(each.status != 0, "cannot be reached" in each.err) for each in ended] == [(True, True)] * 2
        (line,) = (line for line in started.seen if "a model fails" in line)
        assert " warning " in line
        assert all(
            part in line for part in ("model=anything", "provider=gone", "it cannot be reached (Connection refused)")
        )
        assert "a-key" not in started.said
        assert "Hello you" not in started.said

    async def test_without_a_core_it_says_how_to_start_one(self, home: Home) -> None:
        for name in ("list", "reload"):
            ended = await home.run("route", name)
            assert (ended.status, ended.out) == (69, "")
            assert "start it with `" in ended.err
