"""Who serves a model, and what is known of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from moltbot_server.config_models import Price, Provider, ProviderModel
from moltbot_server.errors import InvalidConfiguration, ModelNotFound
from moltbot_server.models.providers import ProviderEngine, presets, resolve
from moltbot_server.models.providers.presets import terms


@pytest.mark.parametrize(
    ("name", "provider", "id"),
    [
        ("anthropic-pro-200", "anthropic", "anthropic-pro-200"),
        ("opus-4.5", "anthropic", "claude-opus-4-5"),
        ("claude-opus-4.5", "anthropic", "claude-opus-4-5"),
        ("sonnet-5", "anthropic", "claude-sonnet-5"),
        ("claude-sonnet-4-5-20250929", "anthropic", "claude-sonnet-4-5-20250929"),
        ("gpt-4-turbo", "openai", "gpt-4-turbo"),
        ("o3-mini", "openai", "o3-mini"),
        ("deepseek-chat", "deepseek", "deepseek-chat"),
        ("qwen-plus", "qwen", "qwen-plus"),
        ("qwen3-max", "qwen", "qwen3-max"),
        ("moonshot-v1-8k", "moonshot", "moonshot-v1-8k"),
        ("kimi-k2", "moonshot", "kimi-k2"),
        ("glm-4.6", "zhipu", "glm-4.6"),
        ("doubao-pro-32k", "volcengine", "doubao-pro-32k"),
        ("openrouter/qwen/qwen3-max", "openrouter", "qwen/qwen3-max"),
        ("ollama/llama3.2:3b", "ollama", "llama3.2:3b"),
        ("anthropic/opus-4.5", "anthropic", "claude-opus-4-5"),
    ],
)
def test_a_name_alone_says_who_serves_it(name: str, provider: str, id: str) -> None:
    owner, model = resolve(name, ())
    assert (owner.name, model.name, terms(owner, model).id) == (provider, name, id)


def test_what_is_configured_goes_before_what_is_known() -> None:
    mirror = Provider(name="mirror", preset="openai", base_url="https://mirror.example.com/v1")
    own = Provider(
        name="own",
        base_url="http://gpu.lan:8000",
        models=(ProviderModel(name="gpt-mine", id="llama", context_length=4096),),
    )
    providers = (own, mirror)
    assert resolve("gpt-4o", providers) == (mirror, ProviderModel(name="gpt-4o"))
    assert terms(mirror, ProviderModel(name="gpt-4o")).title == "mirror", "it is not OpenAI that answers there"
    assert resolve("gpt-mine", providers)[0] is own
    owner, model = resolve("own/gpt-mine", providers)
    assert (owner, model.name, model.id, model.context_length) == (own, "own/gpt-mine", "llama", 4096)
    owner, model = resolve("own/other", providers)
    assert (owner, model.name, terms(owner, model).id) == (own, "own/other", "other")
    assert resolve("claude-opus-4-5", providers)[0].name == "anthropic"


def test_a_preset_that_is_configured_under_its_own_name_is_the_configured_one() -> None:
    mine = Provider(name="openai", base_url="https://relay.example.com/v1")
    assert resolve("gpt-4o", (mine,))[0] is mine
    assert resolve("openai/gpt-4o", (mine,))[0] is mine


@pytest.mark.parametrize("name", ["llama-local", "nobody/model", "", "/", "gpt"])
def test_a_name_that_nobody_serves_is_told_with_the_way_out(name: str) -> None:
    with pytest.raises(ModelNotFound, match="provider/model"):
        resolve(name, ())


@pytest.mark.parametrize(
    ("name", "meant"), [("opnai/gpt-4o", "openai/gpt-4o"), ("ofice/m", "office/m"), ("team-lrge", "team-large")]
)
def test_a_name_that_is_nearly_one_that_is_known_is_told_with_that(name: str, meant: str) -> None:
    office = Provider(name="office", base_url="http://localhost/v1", models=(ProviderModel(name="team-large"),))
    with pytest.raises(ModelNotFound, match=f"did you mean '{meant}'\\? Otherwise write `provider/model`"):
        resolve(name, (office,))


def test_a_preset_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(
        InvalidConfiguration, match=r"providers\.x\.preset: there is no 'opneai'; known: anthropic, azure"
    ):
        resolve("gpt-4o", (Provider(name="x", preset="opneai"),))


def test_what_the_configuration_says_replaces_what_is_known() -> None:
    model = ProviderModel(
        name="gpt-4o",
        context_length=1000,
        max_output_tokens=50,
        vision=False,
        tools=False,
        price=Price(input=1, output=2),
    )
    found = terms(Provider(name="openai"), model)
    assert (found.context_length, found.max_output_tokens, found.vision, found.tools) == (1000, 50, False, False)
    assert found.price == Price(input=1, output=2)
    assert not ProviderEngine(Provider(name="openai"), model).capabilities.image_input


def test_of_an_unknown_provider_little_is_taken_for_granted() -> None:
    found = terms(Provider(name="x", base_url="http://127.0.0.1:5000"), ProviderModel(name="m"))
    assert found.url == "http://127.0.0.1:5000/v1/chat/completions"
    assert (found.dialect, found.needs_key, found.vision, found.reasoning, found.price) == (
        "openai",
        False,
        False,
        False,
        None,
    )
    assert found.context_length == 32_768
    assert not found.takes("top_k")


@pytest.mark.parametrize(
    ("base", "dialect", "url"),
    [
        ("https://h", "openai", "https://h/v1/chat/completions"),
        ("https://h/", "openai", "https://h/v1/chat/completions"),
        ("https://h/api/v3", "openai", "https://h/api/v3/chat/completions"),
        ("https://h/v1/chat/completions", "openai", "https://h/v1/chat/completions"),
        ("https://h", "anthropic", "https://h/v1/messages"),
        ("https://h/v1", "anthropic", "https://h/v1/messages"),
        ("https://h/relay/anthropic", "anthropic", "https://h/relay/anthropic/v1/messages"),
        ("https://h/v1/messages", "anthropic", "https://h/v1/messages"),
        ("https://[::1]:8443/v1", "openai", "https://[::1]:8443/v1/chat/completions"),
    ],
)
def test_an_address_may_be_written_as_people_write_it(base: str, dialect: str, url: str) -> None:
    assert terms(Provider(name="x", dialect=dialect, base_url=base), ProviderModel(name="m")).url == url  # type: ignore[arg-type]


def test_azure_has_no_address_of_its_own() -> None:
    with pytest.raises(InvalidConfiguration, match=r"providers\.azure\.base_url"):
        terms(Provider(name="azure"), ProviderModel(name="gpt"))


def test_sampling_is_not_offered_where_the_interface_has_none() -> None:
    newer = Provider(name="anthropic", api_version="2026-10-21")
    model = ProviderModel(name="claude-sonnet-4-6")
    assert not ProviderEngine(newer, model).capabilities.sampling
    assert ProviderEngine(Provider(name="anthropic"), model).capabilities.sampling


@pytest.mark.parametrize("name", sorted(presets()))
def test_each_preset_can_be_used_and_makes_sense(name: str) -> None:
    preset = presets()[name]
    owner = Provider(name=name, base_url="" if preset.base_url else "https://h.example.com")
    ProviderEngine(owner, ProviderModel(name="some-model"))
    assert preset.needs_key == bool(preset.key_env)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]+_API_KEY", each) for each in preset.key_env)
    assert all("max_output_tokens" not in facts.options for facts in preset.models.values())
    for facts in (preset.default, *preset.models.values()):
        if facts.price is not None:
            assert 2 <= len(facts.price) <= 3
            assert all(0 <= each <= 1000 for each in facts.price)
            assert facts.price[2:] <= facts.price[:1]  # what was kept there costs less
        assert not facts.max_output_tokens or facts.max_output_tokens <= (facts.context_length or 10**9)


def test_the_model_of_a_pattern_is_the_first_that_fits() -> None:
    assert terms(*resolve("gpt-4o-mini-2024-07-18", ())).price == Price(input=0.15, output=0.6, cached_input=0.075)
    assert terms(*resolve("gpt-4o-2024-08-06", ())).price == Price(input=2.5, output=10, cached_input=1.25)
    assert terms(*resolve("claude-opus-5-5", ())).price == Price(input=4, output=20, cached_input=0.2)
    assert terms(*resolve("claude-opus-5", ())).price == Price(input=5, output=25, cached_input=0.5)
    assert terms(*resolve("gpt-9-unheard-of", ())).price is None


def test_the_guide_lists_each_preset_with_its_keys_and_the_names_that_it_knows() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "providers.md").read_text("utf-8")
    rows = [line for line in guide.splitlines() if line.startswith("| `")]
    for name, preset in presets().items():
        row = next((line for line in rows if f"`{name}`" in line.split("|")[1]), "")
        assert row, f"{name} is missing"
        known = [pattern.replace("-*", "*") for pattern in preset.patterns]
        for each in (*preset.key_env, *known):
            assert f"`{each}" in row.replace("-*`", "*`"), f"{each} of {name} is missing"
