"""`moltbot model …` as people run it: without a core, with one that plays a script, and with a real one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import signal
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from cli_process import Home
from grpc import aio
from model_folders import BUILT_IN, known, twin
from moltbot.v1 import model_pb2, model_pb2_grpc
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.workspace import Workspace

KEY = "mb_test_key"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home folder in which nothing is configured."""
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home", variables={})


def encoder(folder: Path) -> Path:
    """Make a folder that says that it holds an encoder; return it."""
    folder.mkdir()
    name = b"TransformerEncoderSpec\0"
    (folder / "model.bin").write_bytes(struct.pack("<IH", 6, len(name)) + name)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "moltbot.yaml").write_text("family: bert\ncontext_length: 512\n")
    return folder


async def test_help_teaches_every_command_by_example(home: Home) -> None:
    overview = (await home.run("model")).out
    assert overview == (await home.run("model", "--help")).out
    for name in ("list", "show", "add", "pull", "convert", "remove", "switch", "tune", "bench"):
        assert f"\n    {name} " in overview
        told = (await home.run("model", name, "--help")).out
        assert f"\n  moltbot model {name}" in told
        assert "--json" in told


@pytest.mark.parametrize("arguments", [("nope",), ("show",), ("switch",), ("switch", "a", "--configured"), ("pull",)])
async def test_a_wrong_use_ends_with_status_2(home: Home, arguments: tuple[str, ...]) -> None:
    ended = await home.run("model", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err


class TestWithoutACore:
    """Nothing runs: what the commands know, they know from the workspace."""

    async def test_a_fresh_list_has_the_built_in_model_which_answers_at_start(self, home: Home) -> None:
        listed = await home.run("model", "list")
        assert (listed.status, listed.err) == (0, "")
        assert f"{BUILT_IN}  at start" in listed.out
        assert "MoltBot is not running: start it with" in listed.out
        found = (await home.run("model", "list", "--json")).json
        assert (found["running"], found["answers"], found["at_start"]) == (False, None, BUILT_IN)

    async def test_show_tells_what_a_model_is(self, home: Home) -> None:
        shown = (await home.run("model", "show", BUILT_IN)).out
        assert "1024 tokens" in shown
        assert "tokenizer.model" in shown
        assert "<|end|>" in shown
        found = (await home.run("model", "show", BUILT_IN, "--json")).json
        assert found["context_length"] == 1024
        assert {"streaming", "generation", "cancellation"} <= set(found["capabilities"])

    async def test_an_unknown_model_is_told_with_those_that_are_known(self, home: Home) -> None:
        ended = await home.run("model", "show", "nobody")
        assert ended.status == 1
        assert "known are moltbot-demo" in ended.err
        as_json = await home.run("model", "show", "nobody", "--json")
        assert (as_json.status, as_json.json["error"]["status"]) == (1, 1)

    async def test_a_folder_is_added_by_name_and_stays_when_it_is_removed(self, home: Home) -> None:
        folder = twin(home.folder / "My Twin")
        added = await home.run("model", "add", "My Twin")
        assert (added.status, added.err) == (0, "")
        assert "model switch my-twin" in added.out
        assert (await known(home))["my-twin"]["path"] == str(folder)
        assert (await home.run("model", "add", "My Twin", "--name", "other")).status == 0
        removed = await home.run("model", "remove", "my-twin")
        assert "stays as it is" in removed.out
        assert (folder / "model.bin").exists()
        assert set(await known(home)) == {BUILT_IN, "other"}

    async def test_a_folder_that_is_no_model_is_refused_with_what_was_found(self, home: Home) -> None:
        (home.folder / "raw").mkdir()
        (home.folder / "raw" / "model.safetensors").write_bytes(b"")
        ended = await home.run("model", "add", "raw", "--type", "llama2")
        assert ended.status == 1
        assert "model.safetensors" in ended.err
        assert set(await known(home)) == {BUILT_IN}

    async def test_a_family_that_there_is_not_is_refused_with_those_that_are(self, home: Home) -> None:
        twin(home.folder / "twin")
        (twin(home.folder / "bare") / "moltbot.yaml").unlink()
        for folder in ("twin", "bare", str(encoder(home.folder / "embeds"))):
            ended = await home.run("model", "add", folder, "--type", "nonsense")
            assert ended.status == 1
            assert "--type is 'nonsense'" in ended.err
            assert "llama2, llama3" in ended.err
            assert "MODEL_TYPE" not in ended.err
        await home.run("model", "add", "twin")
        retyped = await home.run("model", "add", "twin", "--type", "nonsense")
        assert (retyped.status, "llama2, llama3" in retyped.err) == (1, True)
        assert set(await known(home)) == {BUILT_IN, "twin"}

    async def test_a_folder_that_is_refused_is_not_in_the_list_whatever_it_is_called(self, home: Home) -> None:
        assert (await home.run("model", "add", "nowhere", "--name", "it")).status == 1
        assert set(await known(home)) == {BUILT_IN}

    async def test_a_name_that_another_folder_has_is_refused_and_the_same_folder_may_be_added_again(
        self, home: Home
    ) -> None:
        twin(home.folder / "one")
        twin(home.folder / "two")
        assert (await home.run("model", "add", "one", "--name", "it")).status == 0
        assert (await home.run("model", "add", "one", "--name", "it")).status == 0
        ended = await home.run("model", "add", "two", "--name", "it")
        assert ended.status == 1
        assert "--name" in ended.err

    async def test_a_switch_is_kept_for_the_next_start_and_can_be_taken_back(self, home: Home) -> None:
        twin(home.folder / "twin")
        await home.run("model", "add", "twin")
        switched = await home.run("model", "switch", "twin")
        assert (switched.status, switched.err) == (0, "")
        assert "From the next start on twin answers" in switched.out
        assert (await home.run("model", "list", "--json")).json["at_start"] == "twin"
        refused = await home.run("model", "remove", "twin")
        assert refused.status == 1
        assert "switch --configured" in refused.err
        assert (await home.run("model", "switch", "--configured")).status == 0
        assert (await home.run("model", "list", "--json")).json["at_start"] == BUILT_IN
        assert (await home.run("model", "remove", "twin")).status == 0

    async def test_a_switch_to_what_the_configuration_has_elsewhere_says_where_that_is_chosen(self, home: Home) -> None:
        await home.run("init")
        (home.workspace / "moltbot.yaml").write_text(
            "providers: {office: {base_url: 'http://127.0.0.1:9/v1', models: [team-large]}}\n"
            "routes: {careful: {primary: team-large}}\n"
        )
        for name in ("team-large", "office/other"):
            refused = await home.run("model", "switch", name)
            assert (refused.status, refused.out) == (1, "")
            assert f"write `models: {{primary: {name}}}` into ~/.moltbot/moltbot.yaml" in refused.err
            assert refused.err.endswith(" route reload\n")
        refused = await home.run("model", "switch", "careful")
        assert "careful is a route, which answers who names it" in refused.err
        assert "There is no model 'nobody'" in (await home.run("model", "switch", "nobody")).err

    async def test_what_the_configuration_has_elsewhere_is_told_with_its_place_and_what_to_do_instead(
        self, home: Home
    ) -> None:
        await home.run("init")
        (home.workspace / "moltbot.yaml").write_text(
            "providers: {office: {base_url: 'http://127.0.0.1:9/v1', models: [team-large]}}\n"
            "routes: {careful: {primary: team-large}}\n"
            "models: {primary: moltbot-demo,\n  fallback: [gpt-4o]}\n"
        )
        large = "team-large is a model of the provider office, set up in ~/.moltbot/moltbot.yaml:1"
        careful = "careful is a route, set up in ~/.moltbot/moltbot.yaml:2"
        fallback = "gpt-4o is a model of the provider openai, set up in ~/.moltbot/moltbot.yaml:4"
        default = "default is a route, set up in ~/.moltbot/moltbot.yaml:3"
        instead = {
            "remove": "take it out there, and then: ",
            "tune": "Name a model that lies on this machine",
            "bench": "Name a model that lies on this machine",
            "show": "MoltBot is not running: ",
            "convert": "there is nothing to convert",
        }
        for name, what in (("team-large", large), ("careful", careful), ("gpt-4o", fallback), ("default", default)):
            for command, way in instead.items():
                refused = await home.run("model", command, name)
                assert (refused.status, refused.out) == (1, "")
                assert refused.err.startswith(f"moltbot: {what}")
                assert way in refused.err
        assert default in (await home.run("model", "tune")).err, "what answers at start is the route"
        twin(home.folder / "twin")
        for name, what in (("team-large", large), ("careful", careful), ("gpt-4o", fallback)):
            refused = await home.run("model", "add", "twin", "--name", name)
            assert (refused.status, refused.out) == (1, "")
            assert f"{what}; choose another name with --name." in refused.err
        for command in ("remove", "tune", "show"):
            assert "There is no model 'nobody'" in (await home.run("model", command, "nobody")).err

    async def test_a_choice_that_an_engine_elsewhere_would_never_read_is_refused(self, home: Home) -> None:
        twin(home.folder / "twin")
        await home.run("model", "add", "twin")
        (home.workspace / "moltbot.yaml").write_text("engine: dns:///models.example.com:50061\n")
        for words in (("twin",), ("--configured",)):
            refused = await home.run("model", "switch", *words)
            assert (refused.status, refused.out) == (1, "")
            assert "Switch in the engine's own workspace" in refused.err
        (home.workspace / "moltbot.yaml").write_text(f"engine: unix:{Workspace(folder=home.workspace).engine_socket}\n")
        assert (await home.run("model", "switch", "twin")).status == 0
        assert (await home.run("model", "list", "--json")).json["at_start"] == "twin", "the workspace is the engine's"

    async def test_a_switch_that_the_environment_would_overrule_says_so(self, home: Home) -> None:
        twin(home.folder / "twin")
        await home.run("model", "add", "twin")
        home.variables["MODEL_PATH"] = str(twin(home.folder / "configured"))
        switched = await home.run("model", "switch", "twin")
        assert switched.status == 0
        assert "environment variable MODEL_PATH names another model" in switched.err
        assert "configured answers" in switched.out

    async def test_a_model_whose_folder_is_gone_is_listed_with_what_is_wrong_and_not_switched_to(
        self, home: Home
    ) -> None:
        twin(home.folder / "twin")
        await home.run("model", "add", "twin")
        shutil.rmtree(home.folder / "twin")
        listed = await home.run("model", "list")
        assert "not usable" in listed.out
        assert "found nothing" in listed.out
        refused = await home.run("model", "switch", "twin")
        assert refused.status == 1
        assert "found nothing" in refused.err
        assert (await home.run("model", "list", "--json")).json["at_start"] == BUILT_IN

    async def test_a_model_that_embeds_is_listed_and_never_answers(self, home: Home) -> None:
        encoder(home.folder / "embeds")
        added = await home.run("model", "add", "embeds")
        assert (added.status, added.err) == (0, "")
        assert "switch" not in added.out
        shown = (await home.run("model", "show", "embeds")).out
        assert "embeddings" in shown
        assert "Pooling    mean" in shown
        refused = await home.run("model", "switch", "embeds")
        assert refused.status == 1
        assert "writes no answers" in refused.err

    async def test_convert_tells_what_is_no_source_and_what_it_needs(self, home: Home) -> None:
        ended = await home.run("model", "convert", "nothing-here")
        assert ended.status == 1
        assert "neither a folder nor a model that is known" in ended.err
        (home.folder / "raw").mkdir()
        (home.folder / "raw" / "readme.txt").write_text("no weights")
        assert "found readme.txt" in (await home.run("model", "convert", "raw")).err
        if importlib.util.find_spec("torch") is None:
            (home.folder / "raw" / "model.safetensors").write_bytes(b"")
            (home.folder / "raw" / "config.json").write_text("{}")
            assert "pip install --editable '.[convert]'" in (await home.run("model", "convert", "raw")).err
        assert list((home.workspace / "models").iterdir()) == []
        twin(home.folder / "twin")
        await home.run("model", "add", "twin")
        taken = await home.run("model", "convert", "raw", "--name", "twin")
        assert taken.status == 1
        assert "--name" in taken.err

    async def test_bench_measures_alone_and_together(self, home: Home) -> None:
        ended = await home.run("model", "bench", BUILT_IN, "--streams", "1,4", "--seconds", "1", "--json")
        assert (ended.status, ended.err) == (0, "")
        assert [each["streams"] for each in ended.json["streams"]] == [1, 4]
        assert all(each["tokens_per_s"] > 0 for each in ended.json["streams"])
        assert all(each["first_token_ms"]["p50"] > 0 for each in ended.json["streams"])
        folder = str(twin(home.folder / "Of nobody"))
        ended = await home.run("model", "bench", folder, "--streams", "2", "--seconds", "0.2", "--json")
        assert (ended.json["model"], ended.json["streams"][0]["streams"]) == ("of-nobody", 2)
        wrong = await home.run("model", "bench", "--streams", "1,x")
        assert (wrong.status, wrong.out) == (2, "")

    async def test_tune_measures_and_keeps_what_it_found(self, home: Home) -> None:
        ended = await home.run("model", "tune", BUILT_IN, "--quick", "--json")
        assert (ended.status, ended.err) == (0, "")
        assert ended.json["trials"]
        assert (home.workspace / "tuning.json").exists()
        assert (await home.run("model", "tune", "nobody")).status == 1


@dataclass
class Scripted(model_pb2_grpc.ModelServiceServicer):
    """A core that loads and switches by a script, and remembers what it was asked."""

    default: str = BUILT_IN
    loaded: set[str] = field(default_factory=lambda: {BUILT_IN})
    broken: str = ""
    """The model with this name fails its probe."""
    asked: list[str] = field(default_factory=list)
    loading: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event | None = None
    """A load waits for it in the middle."""

    def model(self, name: str) -> model_pb2.Model:
        """Return how a model is."""
        return model_pb2.Model(
            name=f"models/{name}",
            state=model_pb2.MODEL_STATE_READY,
            is_default=name == self.default,
            memory_bytes=2_400_000,
            parallel=8,
        )

    async def ListModels(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Answer all in one page."""
        assert ("authorization", f"Bearer {KEY}") in context.invocation_metadata()
        return model_pb2.ListModelsResponse(models=[self.model(name) for name in sorted(self.loaded)])

    async def LoadModel(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Load in three steps."""
        name = request.name.removeprefix("models/")
        self.asked.append(f"load {name} {request.path} {request.type}".strip())
        for stage, progress in (("reading", 0.0), ("loading", 0.3)):
            yield model_pb2.LoadModelResponse(stage=stage, progress=progress)
        self.loading.set()
        if self.gate:
            await self.gate.wait()
        if name == self.broken:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "The probe of the model failed: no tokens came.")
        self.loaded.add(name)
        yield model_pb2.LoadModelResponse(stage="ready", progress=1.0, model=self.model(name))

    async def SwitchModel(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Switch."""
        name, previous = request.name.removeprefix("models/"), self.default
        self.asked.append(f"switch {name}")
        self.default = name
        return model_pb2.SwitchModelResponse(model=self.model(name), previous=f"models/{previous}")

    async def UnloadModel(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Unload."""
        name = request.name.removeprefix("models/")
        self.asked.append(f"unload {name}")
        self.loaded.discard(name)
        return model_pb2.UnloadModelResponse()


class TestWithAScriptedCore:
    """A core that plays a script shows what the commands ask for, in which order."""

    @pytest.fixture
    async def core(self, home: Home) -> AsyncIterator[Scripted]:
        """A scripted core that the commands find by the environment, and a model `twin` in the list."""
        script, server = Scripted(), aio.server()
        model_pb2_grpc.add_ModelServiceServicer_to_server(script, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        twin(home.folder / "twin")
        assert (await home.run("model", "add", "twin")).status == 0
        home.variables |= {"MOLTBOT_ADDRESS": f"127.0.0.1:{port}", "MOLTBOT_KEY": KEY}
        yield script
        await server.stop(None)

    async def test_a_switch_loads_switches_and_lets_the_old_one_go(self, home: Home, core: Scripted) -> None:
        ended = await home.run("model", "switch", "twin")
        assert (ended.status, ended.err) == (0, "")
        assert "twin answers. After the next start moltbot-demo does; to keep this one:" in ended.out
        assert core.asked == [f"load twin {home.folder / 'twin'}", "switch twin", f"unload {BUILT_IN}"]
        again = await home.run("model", "switch", BUILT_IN, "--keep", "--default", "--json")
        assert again.json == {"name": BUILT_IN, "running": True, "previous": "twin", "at_start": BUILT_IN}
        assert core.asked[3:] == [f"load {BUILT_IN} {ARTIFACT}", f"switch {BUILT_IN}"]
        assert core.loaded == {BUILT_IN, "twin"}

    async def test_a_model_that_is_loaded_is_not_loaded_again(self, home: Home, core: Scripted) -> None:
        core.loaded.add("twin")
        assert (await home.run("model", "switch", "twin", "--default")).status == 0
        assert core.asked == ["switch twin", f"unload {BUILT_IN}"]
        assert (await home.run("model", "list", "--json")).json["at_start"] == "twin"

    async def test_a_model_that_fails_its_probe_changes_nothing(self, home: Home, core: Scripted) -> None:
        core.broken = "twin"
        ended = await home.run("model", "switch", "twin", "--default")
        assert ended.status == 1
        assert "no tokens came" in ended.err
        assert core.asked == [f"load twin {home.folder / 'twin'}"]
        assert core.default == BUILT_IN
        assert (await home.run("model", "list", "--json")).json["at_start"] == BUILT_IN

    async def test_ctrl_c_while_a_model_is_loaded_switches_nothing(self, home: Home, core: Scripted) -> None:
        core.gate = asyncio.Event()
        process = await home.spawn("model", "switch", "twin")
        await asyncio.wait_for(core.loading.wait(), 30)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 130
        assert b"what answers stays the same" in err
        assert b"Traceback" not in err
        core.gate.set()
        assert (core.default, core.asked) == (BUILT_IN, [f"load twin {home.folder / 'twin'}"])

    async def test_the_list_tells_what_answers_and_what_the_core_has_besides(self, home: Home, core: Scripted) -> None:
        core.loaded |= {"twin", "stranger"}
        core.default = "twin"
        found = (await home.run("model", "list", "--json")).json
        assert (found["running"], found["answers"], found["at_start"]) == (True, "twin", BUILT_IN)
        states = {model["name"]: model["loaded"] for model in found["models"]}
        assert states["twin"]["default"]
        assert states["stranger"]["state"] == "ready"
        assert states["twin"]["memory"] == 2_400_000
        words = (await home.run("model", "list")).out
        assert "answers, 2.4 MB" in words
        assert f"After the next start {BUILT_IN} answers, not twin." in words

    async def test_with_an_engine_elsewhere_what_answers_after_a_start_is_not_guessed(
        self, home: Home, core: Scripted
    ) -> None:
        (home.workspace / "moltbot.yaml").write_text("engine: dns:///models.example.com:50061\n")
        found = (await home.run("model", "list", "--json")).json
        assert (found["answers"], found["at_start"]) == (BUILT_IN, None)
        assert found["engine"] == "dns:///models.example.com:50061"
        words = (await home.run("model", "list")).out
        assert "The engine at dns:///models.example.com:50061 answers; its own workspace says" in words
        assert "at start" not in words
        switched = await home.run("model", "switch", "twin")
        assert switched.status == 0
        assert switched.out.startswith("twin answers. Which model answers after a start is for the engine at dns:///")
        assert (await home.run("model", "switch", "twin", "--default")).status == 1
        assert "name the model" in (await home.run("model", "tune")).err

    async def test_what_answers_is_not_removed_and_what_is_loaded_is_unloaded_first(
        self, home: Home, core: Scripted
    ) -> None:
        core.loaded.add("twin")
        core.default = "twin"
        refused = await home.run("model", "remove", "twin")
        assert refused.status == 1
        assert "answers now" in refused.err
        assert core.asked == []
        core.default = BUILT_IN
        assert (await home.run("model", "remove", "twin")).status == 0
        assert core.asked == ["unload twin"]


async def test_what_was_chosen_answers_from_the_start_on_until_it_cannot(home: Home) -> None:
    twin(home.folder / "twin")
    await home.run("model", "add", "twin")
    await home.run("model", "switch", "twin")
    async with home.started():
        assert (await home.run("chat", "Hello", "--json")).json["model"] == "models/twin"
        assert (await home.run("model", "list", "--json")).json["answers"] == "twin"
    shutil.rmtree(home.folder / "twin")
    refused = await home.run("start", "--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    assert refused.status == 78
    assert "The chosen model twin cannot answer" in refused.out + refused.err
    assert (await home.run("model", "switch", "--configured")).status == 0
    async with home.started():
        assert (await home.run("chat", "Hello", "--json")).json["model"] == f"models/{BUILT_IN}"


async def test_a_model_is_switched_under_a_moltbot_that_runs(home: Home) -> None:
    twin(home.folder / "twin")
    async with home.started():
        assert (await home.run("model", "add", "twin")).status == 0
        switched = await home.run("model", "switch", "twin")
        assert (switched.status, switched.err) == (0, "")
        answer = (await home.run("chat", "Hello", "--json")).json
        assert answer["model"].removeprefix("models/") == "twin"
        found = (await home.run("model", "list", "--json")).json
        assert found["answers"] == "twin"
        assert {model["name"]: bool(model["loaded"]) for model in found["models"]} == {BUILT_IN: False, "twin": True}
        (home.folder / "broken").mkdir()
        for name in ("model.bin", "config.json", "vocabulary.json", "tokenizer.model", "moltbot.yaml"):
            shutil.copy(home.folder / "twin" / name, home.folder / "broken" / name)
        (home.folder / "broken" / "model.bin").write_bytes(b"\0" * 1000)
        await home.run("model", "add", "broken")
        assert (await home.run("model", "switch", "broken")).status == 1
        assert (await home.run("model", "list", "--json")).json["answers"] == "twin"
        assert (await home.run("model", "remove", "twin")).status == 1
        assert (await home.run("model", "switch", BUILT_IN)).status == 0
        assert (await home.run("model", "remove", "twin")).status == 0
        assert json.loads((await home.run("chat", "Hello", "--json")).out)["model"].endswith(BUILT_IN)
