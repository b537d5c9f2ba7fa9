"""The configuration: what it accepts word for word, which source wins, what it says of mistakes, what it refuses."""

import os
import re
from pathlib import Path

import pytest
from moltbot_server.config import (
    Autoscaling,
    Cache,
    ConfigError,
    ModelRoute,
    Settings,
    is_loopback,
    load_settings,
    misspelled,
    overlooked,
)
from moltbot_server.config_keys import ENV_NAMES, KEYS, SECTIONS
from moltbot_server.models.tokenizer_config import LONGEST_CONTEXT

ENV_FILE = """\
PORT=8000
WORKERS=4
MODEL_TYPE=llama2
MODEL_PATH=/path/to/model
CONTEXT_LENGTH=2048
"""
MODELS = """\
models:
  primary: "anthropic-pro-200"
  fallback:
    - "opus-4.5"
    - "gpt-4-turbo"
  threshold:
    latency: 3000ms
    error_rate: 5%
"""
CACHE = """\
cache:
  type: redis
  host: cache.example.com
  port: 6379
  ttl: 3600
"""
AUTOSCALING = """\
autoscaling:
  min_replicas: 2
  max_replicas: 10
  metrics:
    - type: cpu
      target: 70%
    - type: memory
      target: 80%
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty workspace folder, in a folder of its own."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A current folder without an environment file."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def problems(workspace: Path, elsewhere: Path, yaml: str, environ: dict[str, str] | None = None) -> list[str]:
    """Return what is said of a configuration, with the file's name alone."""
    (workspace / "moltbot.yaml").write_text(yaml)
    with pytest.raises(ConfigError) as caught:
        load_settings(workspace, environ or {}, current=elsewhere)
    return [str(problem).replace(f"{workspace}/", "") for problem in caught.value.problems]


def test_without_any_source_the_defaults_hold(workspace: Path, elsewhere: Path) -> None:
    settings = load_settings(workspace, {}, current=elsewhere)
    assert settings == Settings(workspace=workspace)
    assert (settings.host, settings.port, settings.grpc_port, settings.metrics_port) == (
        "127.0.0.1",
        8000,
        50051,
        9464,
    )
    assert settings.notices == ()


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_environment_file_is_read_as_documented(workspace: Path, elsewhere: Path, line_end: str) -> None:
    (workspace / ".env").write_bytes(ENV_FILE.replace("\n", line_end).encode())
    assert load_settings(workspace, {}, current=elsewhere) == Settings(
        workspace=workspace,
        port=8000,
        workers=4,
        model_type="llama2",
        model_path=Path("/path/to/model"),
        context_length=2048,
    )


@pytest.mark.parametrize("yaml", [MODELS, CACHE, AUTOSCALING, MODELS + CACHE + AUTOSCALING])
def test_the_yaml_forms_are_accepted_alone_and_together(workspace: Path, elsewhere: Path, yaml: str) -> None:
    (workspace / "moltbot.yaml").write_text(yaml)
    route = ModelRoute(primary="anthropic-pro-200", fallback=("opus-4.5", "gpt-4-turbo"), latency=3.0, error_rate=0.05)
    scaling = Autoscaling(min_replicas=2, max_replicas=10, metrics=(("cpu", 0.7), ("memory", 0.8)))
    assert load_settings(workspace, {}, current=elsewhere) == Settings(
        workspace=workspace,
        models=route if "models:" in yaml else ModelRoute(),
        cache=Cache(type="redis", host="cache.example.com", port=6379, ttl=3600.0) if "cache:" in yaml else Cache(),
        autoscaling=scaling if "autoscaling:" in yaml else None,
    )


def test_only_what_this_release_does_not_act_on_is_told(workspace: Path, elsewhere: Path) -> None:
    (workspace / "moltbot.yaml").write_text(MODELS + CACHE + "workers: 4\n")
    assert load_settings(workspace, {}, current=elsewhere).notices == ()
    (workspace / "moltbot.yaml").write_text(MODELS + CACHE + AUTOSCALING)
    [notice] = load_settings(workspace, {}, current=elsewhere).notices
    assert notice.startswith("autoscaling: this release does not")


def test_connections_end_now_and_then_where_several_cores_share_them(workspace: Path, elsewhere: Path) -> None:
    def age(yaml: str) -> float:
        (workspace / "moltbot.yaml").write_text(yaml)
        return load_settings(workspace, {}, current=elsewhere).connection_age

    assert age("") == 0
    assert age("workers: 2") == age("store: {type: redis}") == 600
    assert age("workers: 2\nmax_connection_age: 0") == 0
    assert age("max_connection_age: 90s") == 90
    with pytest.raises(ConfigError, match=r"found '0\.1ms', expected .* from 1 to 604800 seconds, or 0 for never"):
        age("max_connection_age: 0.1ms")  # no call would come to its end


def test_a_core_that_leaves_goes_on_for_a_moment_where_others_can_be_called_in_its_place(
    workspace: Path, elsewhere: Path
) -> None:
    def leaving(yaml: str) -> tuple[float, float]:
        (workspace / "moltbot.yaml").write_text(yaml)
        settings = load_settings(workspace, {}, current=elsewhere)
        return settings.lame_duck_time, settings.leaving_time

    assert leaving("") == leaving("workers: 4") == (0, 10)
    assert leaving("store: {type: redis}") == (2, 12)
    assert leaving("store: {type: redis}\nlame_duck: 0") == (0, 10)
    assert leaving("lame_duck: 15s\ndrain_grace: 30s") == (15, 45)


def test_a_later_source_wins_over_an_earlier_one(workspace: Path, elsewhere: Path) -> None:
    (workspace / "moltbot.yaml").write_text("port: 1001\n")

    def port(environ: dict[str, str] | None = None, flag: int | None = None) -> tuple[int, str]:
        settings = load_settings(workspace, environ or {}, {"port": flag}, current=elsewhere)
        return settings.port, settings.origin("port").replace(f"{workspace.parent}/", "")

    assert port() == (1001, "workspace/moltbot.yaml:1")
    (elsewhere / ".env").write_text("\nPORT=1002\n")
    assert port() == (1002, "elsewhere/.env:2")
    (workspace / ".env").write_text("PORT=1003\n")
    assert port() == (1003, "workspace/.env:1")
    (workspace / ".env").write_text("MOLTBOT_PORT=1004\nPORT=1003\n")
    assert port() == (1004, "workspace/.env:1")
    assert port({"PORT": "1005"}) == (1005, "environment variable PORT")
    assert port({"MOLTBOT_PORT": "1006", "PORT": "1005"}) == (1006, "environment variable MOLTBOT_PORT")
    assert port({"PORT": "1005"}, 1007) == (1007, "--port")


def test_the_current_folder_gives_the_five_plain_names_and_nothing_else(workspace: Path, elsewhere: Path) -> None:
    (elsewhere / ".env").write_text("WORKERS=3\nMOLTBOT_GRPC_HOST=0.0.0.0\nSOME_TOKEN=x\nnot a line of ours\n")
    settings = load_settings(workspace, {}, current=elsewhere)
    assert (settings.workers, settings.grpc_host) == (3, "127.0.0.1")


def test_environment_files_know_comments_quotes_export_and_blank_values(workspace: Path, elsewhere: Path) -> None:
    (workspace / ".env").write_text(
        "# a comment\nexport PORT=9000 # web\nMODEL_PATH='/a b#c' # quoted\nWORKERS=\n"
        'MOLTBOT_SYSTEM_PROMPT="Be brief."\n'
    )
    settings = load_settings(workspace, {}, current=elsewhere)
    assert settings.port == 9000
    assert settings.model_path == Path("/a b#c")
    assert settings.workers == 1
    assert settings.system_prompt == "Be brief."


def test_a_relative_path_counts_from_the_file_that_names_it(workspace: Path, elsewhere: Path) -> None:
    (workspace / "moltbot.yaml").write_text("model_path: models/one\n")
    assert load_settings(workspace, {}, current=elsewhere).model_path == workspace / "models/one"
    environ = {"MODEL_PATH": "~/two"}
    assert load_settings(workspace, environ, current=elsewhere).model_path == Path("~/two").expanduser()


def test_every_mistake_is_told_at_once_with_its_line_and_the_nearest_key(workspace: Path, elsewhere: Path) -> None:
    yaml = "prot: 1\nport: many\nmodels:\n  primry: a\n  threshold: {latency: 3000}\ncache: redis\nhost: '0.0.0.0'\n"
    assert problems(workspace, elsewhere, yaml, {"WORKERS": "0"}) == [
        "moltbot.yaml:1: unknown key `prot`; did you mean `port`?",
        "moltbot.yaml:2: port: found 'many', expected a port (0 takes any free one) from 0 to 65535",
        "moltbot.yaml:4: unknown key `primry` in `models`; did you mean `primary`?",
        "moltbot.yaml:5: models.threshold.latency: found '3000', expected a duration with its unit, such as 3000ms "
        "or 3s, from 0.001 to 3600 seconds",
        "moltbot.yaml:6: cache: found 'redis', expected the keys answers, host, max_bytes, password, port, ttl, type",
        "moltbot.yaml:7: host 0.0.0.0 can be reached from other machines and nothing would encrypt what passes; "
        "name the proxy that ends TLS in `trusted_proxies`, or use 127.0.0.1",
        "environment variable WORKERS: workers: found '0', expected a whole number from 1 to 64",
    ]


def test_an_unknown_name_in_the_workspaces_environment_file_is_a_mistake(workspace: Path, elsewhere: Path) -> None:
    (workspace / ".env").write_text("PORT=8000\nMODEL_PAHT=/m\n")
    assert problems(workspace, elsewhere, "") == [".env:2: unknown key `MODEL_PAHT`; did you mean `MODEL_PATH`?"]


def test_an_unknown_name_is_told_the_one_with_the_prefix_or_the_page_that_has_them_all(
    workspace: Path, elsewhere: Path
) -> None:
    (workspace / ".env").write_text("HOST=127.0.0.1\nQUUX=1\n")
    assert problems(workspace, elsewhere, "") == [
        ".env:1: unknown key `HOST`; did you mean `MOLTBOT_HOST`?",
        ".env:2: unknown key `QUUX`; docs/configuration.md has all that are known",
    ]


def test_a_name_that_the_workspaces_environment_file_gives_twice_is_told(workspace: Path, elsewhere: Path) -> None:
    (workspace / ".env").write_text("PORT=1\n# PORT=2\nOPENAI_API_KEY=\nexport PORT=3\nOPENAI_API_KEY=x\n")
    (elsewhere / ".env").write_text("OTHERS=1\nOTHERS=2\n")
    assert problems(workspace, elsewhere, "") == [
        ".env:4: `PORT` is given twice, first on line 1; keep one",
        ".env:5: `OPENAI_API_KEY` is given twice, first on line 3; keep one",
    ]


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("port: 1\nport: 2\n", "moltbot.yaml:2: `port` is given twice, first on line 1; keep one"),
        ("a: [1,\n", "moltbot.yaml:2: not valid YAML: "),
        ("- port\n", "moltbot.yaml:1: found a list, expected keys"),
        ("port:\n", "moltbot.yaml:1: port: found nothing, expected a port"),
        ("port: [1]\n", "moltbot.yaml:1: port: found a list, expected a port"),
        ("context_length: 1e3\n", "moltbot.yaml:1: context_length: found '1e3', expected a number of tokens"),
        (
            "context_length: 15\n",
            f"context_length: found '15', expected a number of tokens from 16 to {LONGEST_CONTEXT}",
        ),
        ("log_json: maybe\n", "moltbot.yaml:1: log_json: found 'maybe', expected true or false"),
        ("models: {threshold: {error_rate: 5}}\n", "models.threshold.error_rate: found '5', expected a percentage"),
        ("autoscaling: {min_replicas: 5, max_replicas: 2}\n", "min_replicas 5 is above max_replicas 2"),
        ("autoscaling: {metrics: [{type: gpu, target: 7%}]}\n", "expected a list of mappings with exactly `type`"),
        ("trusted_proxies: 0.0.0.0/0\n", "expected a list, each item an address or network"),
        ("model_type: llama2\n", "no model_path says where that model is"),
        ("tls_cert: missing.pem\n", "tls_cert is set and tls_key is not; set both"),
        ("grpc_port: 8000\nmetrics_port: 8000\n", "moltbot.yaml:2: metrics_port and grpc_port are both 8000"),
        (
            "workers: 2\nstore: {type: memory}\n",
            "moltbot.yaml:2: store.type is memory, which is that of one core alone",
        ),
        ("max_inline_bytes: 8MiB\n", "max_inline_bytes must be below max_message_bytes"),
        ("a: &a [*a]\n", "unknown key `a`"),
        ("!!python/object/apply:os.system ['true']: 1\n", "a key must be a plain word"),
        ("x: " + "[" * 40 + "]" * 40, "nested too deeply"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_what_is_expected(
    workspace: Path, elsewhere: Path, yaml: str, told: str
) -> None:
    assert told in "\n".join(problems(workspace, elsewhere, yaml))


def test_a_file_that_is_not_text_or_far_too_long_is_refused(workspace: Path, elsewhere: Path) -> None:
    file = workspace / "moltbot.yaml"
    for content, told in ((b"port: 1\nx: \xff", ":2: the file is not UTF-8"), (b"#" * (2 << 20), "over 1 MiB")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=told):
            load_settings(workspace, {}, current=elsewhere)


@pytest.mark.parametrize("name", ["moltbot.yaml", ".env"])
def test_a_file_that_is_no_regular_one_is_refused_at_once(workspace: Path, elsewhere: Path, name: str) -> None:
    os.mkfifo(workspace / name)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: this is no regular file, such as a pipe"):
        load_settings(workspace, {}, current=elsewhere)
    (workspace / name).unlink()
    (workspace / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="this is no regular file"):
        load_settings(workspace, {}, current=elsewhere)
    (workspace / name).unlink()
    (workspace / name).symlink_to(os.devnull)
    assert load_settings(workspace, {}, current=elsewhere) == Settings(workspace=workspace)


@pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0", "192.0.2.7"])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("proxy", [False, True])
@pytest.mark.parametrize("key", ["grpc_host", "metrics_host", "host"])
def test_a_bind_that_others_reach_needs_tls_or_a_declared_proxy(
    tmp_path: Path, key: str, bind: str, tls: bool, proxy: bool
) -> None:
    pem = tmp_path / "pem"
    pem.touch()
    safe = bind == "127.0.0.1" or proxy or (tls and key != "host")  # the HTTP adapter speaks no TLS itself
    values = {
        key: bind,
        "tls_cert": pem if tls else None,
        "tls_key": pem if tls else None,
        "trusted_proxies": ("10.0.0.1/32",) if proxy else (),
    }
    if safe:
        assert getattr(Settings(workspace=tmp_path, **values), key) == bind
    else:
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            Settings(workspace=tmp_path, **values)


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_only_what_is_certainly_loopback_counts_as_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


def test_secrets_stay_out_of_the_settings_text_and_of_messages(workspace: Path, elsewhere: Path) -> None:
    settings = load_settings(workspace, {"MOLTBOT_CACHE_PASSWORD": "hunter2"}, current=elsewhere)
    assert settings.cache.password == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in "".join(problems(workspace, elsewhere, "cache: {password: [hunter2]}\n"))


def test_a_misspelled_variable_of_ours_is_told_and_others_are_left_alone() -> None:
    assert misspelled({"MOLTBOT_GRPC_PROT": "1", "MOLTBOT_WORKSPACE": "x", "MOLTBOT_ZZZ": "", "PATH": "/bin"}) == (
        "environment variable MOLTBOT_GRPC_PROT is not known and not used; did you mean MOLTBOT_GRPC_PORT?",
    )


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("PROT=8000", "PORT"),
        ("PRT=8000", "PORT"),
        ("Port=8000", "PORT"),
        ("WORKRES=2", "WORKERS"),
        ("MODLE_PATH=", "MODEL_PATH"),
        ("MODELPATH=/m", "MODEL_PATH"),
        ("MODEL-TYPE=llama2", None),
        ("CONTEXT_LENGHT=5", "CONTEXT_LENGTH"),
        ("CONTXT_LENGHT=5", "CONTEXT_LENGTH"),
        *((f"{name}=1", None) for name in ("HOST", "PORTS", "POST", "WORKER", "PATH", "ROOT", "MODEL", "MODEL_NAME")),
        *((f"{name}=1", None) for name in ("MODEL_DATA", "DB_PORT", "PORT", "CONTEXT", "MAX_LENGTH", "LENGTH")),
    ],
)
def test_a_slip_in_one_of_the_five_names_in_the_current_folder_is_told_and_names_of_others_are_not(
    workspace: Path, elsewhere: Path, line: str, meant: str | None
) -> None:
    (elsewhere / ".env").write_text(f"A=1\n{line}\n")

    told = overlooked(workspace, {}, current=elsewhere)

    name = line.partition("=")[0]
    wanted = (f"{elsewhere}/.env:2: {name} is not known and not used; did you mean {meant}?",)
    assert told == (wanted if meant else ())


def test_a_name_of_ours_in_the_current_folder_is_told_the_file_that_it_belongs_in(
    workspace: Path, elsewhere: Path
) -> None:
    five = "only PORT, WORKERS, MODEL_TYPE, MODEL_PATH, CONTEXT_LENGTH are read from this file"
    (elsewhere / ".env").write_text("MOLTBOT_GRPC_HOST=0.0.0.0\nMOLTBOT_KEY=x\nMOLTBOT_PROT=1\nMOLTBOT_ZZZ=1\n")

    assert [notice.removeprefix(f"{elsewhere}/") for notice in overlooked(workspace, {}, current=elsewhere)] == [
        f".env:1: MOLTBOT_GRPC_HOST is not used: {five}; put it into {workspace}/.env",
        f".env:2: MOLTBOT_KEY is not used: {five}; put it into the environment",
        ".env:3: MOLTBOT_PROT is not known and not used; did you mean MOLTBOT_PORT?",
        ".env:4: MOLTBOT_ZZZ is not known and not used; docs/configuration.md has all that are known",
    ]


def test_nothing_is_overlooked_that_the_environment_gives_too_or_that_lies_in_the_workspace(
    workspace: Path, elsewhere: Path
) -> None:
    (elsewhere / ".env").write_text("MOLTBOT_GRPC_PORT=5000\n")
    assert overlooked(workspace, {"MOLTBOT_GRPC_PORT": "5000"}, current=elsewhere) == ()
    (workspace / ".env").write_text("MOLTBOT_GRPC_PORT=5000\n")
    assert overlooked(workspace, {}, current=workspace) == ()
    assert overlooked(workspace, {}, current=elsewhere / "nowhere") == ()


def test_every_key_is_documented_with_its_environment_name() -> None:
    document = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text("utf-8")
    missing = [key for key in KEYS if f"`{key}`" not in document]
    names = [name for name in ENV_NAMES if f"`{name}`" not in document]
    assert (missing, names) == ([], [])
    sections = {"models", "models.threshold", "cache", "store", "outbox", "sessions", "retention", "autoscaling"}
    assert sections == SECTIONS


def test_sizes_durations_and_words_are_read_in_the_forms_that_people_write(workspace: Path, elsewhere: Path) -> None:
    (workspace / "moltbot.yaml").write_text(
        "max_message_bytes: 8 MiB\nmax_inline_bytes: 512KiB\nflush_interval: 50ms\ndrain_grace: 2m\n"
        "log_json: Yes\nlog_level: DEBUG\ntrusted_proxies: [10.0.0.5, 192.168.0.0/16]\n"
    )
    settings = load_settings(workspace, {}, current=elsewhere)
    assert (settings.max_message_bytes, settings.max_inline_bytes) == (8 << 20, 512 << 10)
    assert (settings.flush_interval, settings.drain_grace) == (0.05, 120.0)
    assert (settings.log_json, settings.log_level) == (True, "debug")
    assert settings.trusted_proxies == ("10.0.0.5/32", "192.168.0.0/16")


def test_a_flag_is_named_once_in_what_is_wrong_with_it(workspace: Path, elsewhere: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(workspace, {}, {"port": 80000}, current=elsewhere)
    assert str(caught.value) == "--port: found '80000', expected a port (0 takes any free one) from 0 to 65535"


def test_what_a_check_of_files_finds_is_told_with_the_rest_at_its_place(workspace: Path, elsewhere: Path) -> None:
    (workspace / ".env").write_text("WORKERS=many\nMODEL_PATH=/nope\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(
            workspace, {}, current=elsewhere, check=lambda values: [("model_path", f"{values['model_path']}?")]
        )
    assert [str(problem).replace(f"{workspace}/", "") for problem in caught.value.problems] == [
        ".env:1: workers: found 'many', expected a whole number from 1 to 64",
        ".env:2: /nope?",
    ]


@pytest.mark.parametrize("key", ["engine_ca", "advertise_ca"])
def test_a_file_that_is_to_prove_certificates_holds_some(workspace: Path, elsewhere: Path, key: str) -> None:
    file = workspace / "ca.pem"
    (workspace / "moltbot.yaml").write_text(f"{key}: {file}\n")
    for content, told in (
        (None, "there is no file"),
        ("", "holds no certificates"),
        ("junk é", "holds no certificates"),
    ):
        if content is not None:
            file.write_text(content, "utf-8")
        with pytest.raises(ConfigError) as caught:
            load_settings(workspace, {}, current=elsewhere)
        assert str(caught.value).startswith(f"{workspace}/moltbot.yaml:1: {key}: ")
        assert told in str(caught.value)
