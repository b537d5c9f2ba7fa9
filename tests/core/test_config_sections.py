"""The sections in which people choose names: what they accept, and what is said of each mistake in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from moltbot_server.config import (
    Budget,
    Cache,
    ConfigError,
    ModelRoute,
    Price,
    Provider,
    ProviderModel,
    Retention,
    Settings,
    Storage,
    load_settings,
)
from moltbot_server.models.providers import resolve
from moltbot_server.workspace import Workspace


def settings(folder: Path, yaml: str, environ: dict[str, str] | None = None) -> Settings:
    """Return the settings that a file and an environment give."""
    (folder / "moltbot.yaml").write_text(yaml)
    return load_settings(folder, environ or {}, current=folder / "nowhere")


def told(folder: Path, yaml: str) -> list[str]:
    """Return what is said of a file, with its name alone."""
    with pytest.raises(ConfigError) as caught:
        settings(folder, yaml)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize("off", ["# ", "#"])
def test_the_samples_of_a_new_workspace_hold_when_they_are_uncommented(tmp_path: Path, off: str) -> None:
    workspace = Workspace(folder=tmp_path / "new")
    workspace.create()
    written = workspace.config_file.read_text()
    assert load_settings(workspace.folder, {}) == Settings(workspace=workspace.folder)
    samples = re.findall(r"^# (?:providers|models):\n(?:#   .*\n)+", written, re.MULTILINE)
    assert len(samples) == 2

    found = settings(tmp_path, "".join(sample.replace(f"\n{off}", "\n").removeprefix(off) for sample in samples))

    assert [provider.name for provider in found.providers] == ["openai", "office"]
    route = found.models
    assert (route.primary, route.fallback, route.latency) == ("gpt-4o", ("team-large", "local"), 3.0)
    assert [resolve(name, found.providers)[0].name for name in ("gpt-4o", "team-large")] == ["openai", "office"]


def test_a_provider_of_a_preset_needs_nothing_but_its_name(tmp_path: Path) -> None:
    assert settings(tmp_path, "providers: {openai: {}, anthropic: }\n").providers == (
        Provider(name="openai"),
        Provider(name="anthropic"),
    )
    assert settings(tmp_path, "providers:\n").providers == ()


@pytest.mark.parametrize(
    "models",
    [
        "[small, {name: large, id: up/large-1, context_length: 128000, price: {input: 2.5, output: 10}}]",
        "{small: , large: {id: up/large-1, context_length: 128000, price: {input: 2.5, output: 10}}}",
    ],
)
def test_a_provider_is_read_whole_and_its_models_as_a_list_or_a_mapping(tmp_path: Path, models: str) -> None:
    yaml = (
        "providers:\n  office:\n    preset: azure\n    dialect: anthropic\n"
        "    base_url: https://llm.example.com/v1/\n"
        "    headers: {X-Team: support}\n    api_version: 2024-10-21\n"
        "    connect_timeout: 500ms\n    idle_timeout: 2m\n    answer_timeout: 10m\n"
        f"    models: {models}\n"
    )
    large = ProviderModel(
        name="large", id="up/large-1", context_length=128_000, price=Price(input=2.5, output=10.0, cached_input=None)
    )
    assert settings(tmp_path, yaml).providers == (
        Provider(
            name="office",
            preset="azure",
            dialect="anthropic",
            base_url="https://llm.example.com/v1",
            headers=(("X-Team", "support"),),
            api_version="2024-10-21",
            connect_timeout=0.5,
            idle_timeout=120.0,
            answer_timeout=600.0,
            models=(ProviderModel(name="small"), large),
        ),
    )


def test_abilities_of_a_model_are_known_unknown_or_denied(tmp_path: Path) -> None:
    yaml = "providers: {x: {models: {m: {vision: true, tools: no, max_output_tokens: 4096}}}}\n"
    [model] = settings(tmp_path, yaml).providers[0].models
    assert (model.vision, model.tools, model.reasoning, model.max_output_tokens) == (True, False, None, 4096)


def test_a_route_is_read_whole_below_models_and_below_its_name(tmp_path: Path) -> None:
    keys = (
        "primary: a\n    fallback: [b, c]\n    threshold: {latency: 300ms, error_rate: 50%}\n    timeout: 1m\n"
        "    cooldown: 2s\n    window: 30s\n    min_attempts: 5\n    retry_budget: 0%\n    on_failure: stop\n"
        "    weights: {a: 3, b: 1}\n"
    )
    whole = {
        "primary": "a",
        "fallback": ("b", "c"),
        "latency": 0.3,
        "error_rate": 0.5,
        "timeout": 60.0,
        "cooldown": 2.0,
        "window": 30.0,
        "min_attempts": 5,
        "retry_budget": 0.0,
        "on_failure": "stop",
        "weights": (("a", 3), ("b", 1)),
    }
    assert settings(tmp_path, f"routes:\n  fast:\n    {keys}").routes == (ModelRoute(name="fast", **whole),)
    assert settings(tmp_path, f"models:\n    {keys}").models == ModelRoute(**whole)


def test_the_default_route_can_be_told_by_the_environment(tmp_path: Path) -> None:
    environ = {
        "MOLTBOT_MODELS_PRIMARY": "a",
        "MOLTBOT_MODELS_FALLBACK": "b,c",
        "MOLTBOT_MODELS_ON_FAILURE": "continue",
        "MOLTBOT_MODELS_RETRY_BUDGET": "10%",
        "MOLTBOT_CURRENCY": "CNY",
        "MOLTBOT_CACHE_ANSWERS": "off",
    }
    found = settings(tmp_path, "", environ)
    assert found.models == ModelRoute(primary="a", fallback=("b", "c"), on_failure="continue", retry_budget=0.1)
    assert (found.currency, found.cache.answers) == ("CNY", "off")


def test_a_store_and_how_long_it_keeps_sessions_are_read_whole(tmp_path: Path) -> None:
    yaml = (
        "store: {type: redis, host: db, port: 6380, password: s, database: 2, prefix: a.b, tls: yes}\n"
        "retention: {days: 30}\n"
    )
    found = settings(tmp_path, yaml)
    assert found.store == Storage(type="redis", host="db", port=6380, password="s", database=2, prefix="a.b", tls=True)
    assert found.retention == Retention(days=30)
    assert "password" not in repr(found.store)
    assert (settings(tmp_path, "").store.type, settings(tmp_path, "").retention.days) == ("sqlite", 0)
    (line,) = told(tmp_path, "store: {prefix: 'a b'}\n")
    assert line == "moltbot.yaml:1: store.prefix: found 'a b', expected 1 to 64 of A-Z a-z 0-9 . _ -"


def test_a_cache_says_what_it_keeps_and_how_much(tmp_path: Path) -> None:
    found = settings(tmp_path, "cache: {type: memory, max_bytes: 128MiB, answers: always}\n").cache
    assert found == Cache(max_bytes=128 << 20, answers="always")


def test_budgets_are_a_list(tmp_path: Path) -> None:
    yaml = (
        "budgets:\n  - {scope: workspace, period: month, max_cost: 200.5}\n"
        "  - {scope: user, period: day, max_tokens: 5000, soft: true}\n"
        "  - {scope: model, model: gpt-4o, period: day, max_tokens: 7}\n"
    )
    assert settings(tmp_path, yaml).budgets == (
        Budget(scope="workspace", period="month", max_cost=200.5),
        Budget(scope="user", period="day", max_tokens=5000, soft=True),
        Budget(scope="model", model="gpt-4o", period="day", max_tokens=7),
    )


def test_every_mistake_in_a_section_is_told_at_its_own_line(tmp_path: Path) -> None:
    yaml = (
        "providers:\n  openai:\n    base_ulr: x\n    dialect: cohere\n    models:\n      - {name: m, visoin: yes}\n"
        "routes:\n  fast:\n    primary: a\n    treshold: {latency: 3}\n    threshold: {latency: 3}\n"
        "  slow: {fallback: [b]}\n"
        "budgets:\n  - {scope: user, period: day}\n  - {scope: team, period: day, max_tokens: 5}\n"
    )
    assert told(tmp_path, yaml) == [
        "moltbot.yaml:3: unknown key `base_ulr` in `providers.openai`; did you mean `base_url`?",
        "moltbot.yaml:4: providers.openai.dialect: found 'cohere', expected one of openai, anthropic",
        "moltbot.yaml:6: unknown key `visoin` in `providers.openai.models.m`; did you mean `vision`?",
        "moltbot.yaml:10: unknown key `treshold` in `routes.fast`; did you mean `threshold`?",
        "moltbot.yaml:11: routes.fast.threshold.latency: found '3', expected a duration with its unit, such as 3000ms "
        "or 3s, from 0.001 to 3600 seconds",
        "moltbot.yaml:12: routes.slow: it needs a `primary`, the model that is asked first",
        "moltbot.yaml:14: budgets: it limits nothing; set `max_tokens` or `max_cost`",
        "moltbot.yaml:15: budgets.scope: found 'team', expected one of workspace, user, model",
    ]


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        (
            "port: 8001\nmodels: {fallback: [b]}\n",
            "moltbot.yaml:2: models: `fallback` is for a route, which needs a `primary`: name the model that is asked",
        ),
        ("providers: [openai]\n", "providers: found a list, expected names, and under each what it is"),
        ("providers: {Open AI: {}}\n", "providers: found 'Open AI' as a name, expected 1 to 63 of"),
        ("providers: {x: gpt-4}\n", "providers.x: found 'gpt-4', expected the keys answer_timeout, api_version, "),
        ("providers: {x: {models: gpt-4}}\n", "providers.x.models: found 'gpt-4', expected a list or a mapping"),
        ("providers: {x: {models: [a, a]}}\n", "providers.x.models: `a` is given twice; keep one"),
        ("providers: {x: {models: [{id: a}]}}\n", "providers.x.models: found '', expected a model's name"),
        ("providers: {x: {models: {a: {name: b}}}}\n", "providers.x.models.a: take `name` out; `id` says"),
        ("providers: {x: {models: {a: {price: {input: 1}}}}}\n", "models.a.price: `input` and `output` are needed"),
        ("providers: {x: {models: {a: {price: {input: -1, output: 1}}}}}\n", "price.input: found '-1', expected a num"),
        ("providers: {x: {base_url: 'ftp://a/b'}}\n", "base_url: found 'ftp://a/b', expected an address such as"),
        ("providers: {x: {base_url: 'https://a:b/'}}\n", "base_url: found 'https://a:b/', expected an address"),
        ("providers: {x: {base_url: 'https://a/?k=v'}}\n", "base_url: found 'https://a/?…', expected an address"),
        ("providers: {x: {headers: {a: [b]}}}\n", "headers: `a` and its value must be what HTTP allows"),
        ("routes: {fast: {primary: a, fallback: [a]}}\n", "routes.fast: `a` is named twice; keep one"),
        ("routes: {fast: {primary: a, weights: {b: 1}}}\n", "weights: `b` is neither `primary` nor in `fallback`"),
        ("routes: {fast: {primary: a, weights: {a: 0}}}\n", "weights: one of them must be above 0"),
        ("routes: {fast: {primary: a, weights: {a: -1}}}\n", "weights: found a mapping, expected a mapping of models"),
        ("routes: {f: {primary: a}, g: {primary: f}}\n", "routes.g: `f` is a route; a route names models"),
        ("routes: {f: {primary: a}}\nmodels: {primary: f}\n", "yaml:2: models: `f` is a route; a route names models"),
        (
            "routes: {f: {primary: a, cooldown: 0}}\n",
            "cooldown: found '0', expected a duration such as 20ms, 3s or 5m, ",
        ),
        ("models: {primary: a, fallback: [b, a]}\n", "models: `a` is named twice; keep one"),
        ("budgets: {scope: user}\n", "budgets: found a mapping, expected a list of mappings"),
        ("budgets: [{scope: model, period: day, max_tokens: 5}]\n", "budgets: `model` is missing: the model that"),
        ("budgets: [{scope: user, model: m, period: day, max_tokens: 5}]\n", "`model` goes with `scope: model` alone"),
        ("budgets: [{max_tokens: 5, scope: user}]\n", "budgets: `period` is missing, expected one of day, month"),
        ("currency: dollars\n", "currency: found 'dollars', expected three capitals such as USD or CNY"),
    ],
)
def test_a_wrong_section_is_told_with_what_is_expected(tmp_path: Path, yaml: str, said: str) -> None:
    assert said in "\n".join(told(tmp_path, yaml))


@pytest.mark.parametrize(
    "yaml",
    [
        "providers: {x: {api_key: PLANTED}}\n",
        "providers: {x: {Token: PLANTED}}\n",
        "providers: {x: {headers: {Authorization: Bearer PLANTED}}}\n",
        "providers: {x: {headers: {x-API-key: PLANTED}}}\n",
        "providers: {x: {headers: [PLANTED]}}\n",
        "providers: {x: {base_url: 'https://me:PLANTED@llm.example.com/v1'}}\n",
        "providers: {x: {base_url: 'https://me:PLANTED@llm.example.com/?a=PLANTED'}}\n",
    ],
)
def test_a_key_in_the_file_is_refused_and_not_repeated(tmp_path: Path, yaml: str) -> None:
    said = "\n".join(told(tmp_path, yaml))
    assert "PLANTED" not in said
    assert "moltbot key add" in said or "a secret that does not fit" in said or "//…@llm.example.com" in said


def test_headers_of_a_provider_stay_out_of_its_text(tmp_path: Path) -> None:
    found = settings(tmp_path, "providers: {x: {headers: {X-Gateway: PLANTED}}}\n")
    assert found.providers[0].headers == (("X-Gateway", "PLANTED"),)
    assert "PLANTED" not in repr(found)


@pytest.mark.parametrize(
    ("url", "accepted"),
    [
        ("https://api.example.com/v1", True),
        ("http://127.0.0.1:9090/v1", True),
        ("http://[::1]:9090", True),
        ("http://localhost:11434/v1", True),
        ("http://ollama:11434/v1", True),
        ("http://192.168.1.5/v1", True),
        ("http://vllm.models.svc", True),
        ("http://api.example.com/v1", False),
        ("http://8.8.8.8/v1", False),
        ("http://localhost.example.com", False),
    ],
)
def test_only_this_machine_and_ones_own_network_are_asked_without_encryption(
    tmp_path: Path, url: str, accepted: bool
) -> None:
    yaml = f"providers: {{x: {{base_url: '{url}'}}}}\n"
    if accepted:
        assert settings(tmp_path, yaml).providers[0].base_url == url
    else:
        assert "would travel unencrypted" in "\n".join(told(tmp_path, yaml))


def test_a_provider_key_may_stand_in_the_workspaces_environment_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OPENAI_API_KEY=planted\nOPENAI_API_KEZ=planted\n")
    assert told(tmp_path, "") == [".env:2: unknown key `OPENAI_API_KEZ`; docs/configuration.md has all that are known"]
