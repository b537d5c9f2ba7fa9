"""The sections `outbox` and `sessions`: how answers are handed to adapters, and what busy sessions do with turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from moltbot_server.config import ConfigError, Settings, load_settings


def loaded(folder: Path, yaml: str = "", **environ: str) -> Settings:
    (folder / "moltbot.yaml").write_text(yaml)
    return load_settings(folder, environ, current=folder)


def test_without_a_word_turns_wait_and_a_lease_lasts_fifteen_seconds(tmp_path: Path) -> None:
    settings = loaded(tmp_path)

    assert (settings.outbox.lease, settings.outbox.max_attempts, settings.outbox.keep) == (15.0, 10, 604800.0)
    assert settings.sessions.busy("slack") == "queue"


def test_the_outbox_is_set_in_the_file_or_the_environment(tmp_path: Path) -> None:
    yaml = "outbox: {lease: 30s, max_attempts: 3, keep: 2d}"
    settings = loaded(tmp_path, yaml, MOLTBOT_OUTBOX_LEASE="1m")

    assert (settings.outbox.lease, settings.outbox.max_attempts, settings.outbox.keep) == (60.0, 3, 172800.0)


@pytest.mark.parametrize(
    ("yaml", "environ"),
    [
        ("sessions: {when_busy: {slack: join, '*': interrupt}}", ""),
        ("", "slack=join, *=interrupt"),
    ],
)
def test_channels_have_rules_of_their_own(tmp_path: Path, yaml: str, environ: str) -> None:
    settings = loaded(tmp_path, yaml, **({"MOLTBOT_SESSIONS_WHEN_BUSY": environ} if environ else {}))

    assert [settings.sessions.busy(channel) for channel in ("slack", "web", "")] == ["join", "interrupt", "interrupt"]


def test_one_word_is_for_all_channels(tmp_path: Path) -> None:
    assert loaded(tmp_path, "sessions: {when_busy: join}").sessions.busy("web") == "join"


@pytest.mark.parametrize(
    "yaml",
    [
        "sessions: {when_busy: never}",
        "sessions: {when_busy: {slack: never}}",
        "sessions: {when_busy: {Slack: join}}",
        "sessions: {when_busy: 'slack=join,web'}",
        "sessions: {when_busy: [join]}",
        "outbox: {lease: 0}",
        "outbox: {max_attempts: 0}",
        "outbox: {keep: 1s}",
        "outbox: {lifetime: 1s}",
    ],
)
def test_what_makes_no_sense_is_told_with_its_line(tmp_path: Path, yaml: str) -> None:
    with pytest.raises(ConfigError, match=r"moltbot\.yaml:1"):
        loaded(tmp_path, yaml)


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        (
            "sessions:\n  when_busy:\n    slack: joined\n",
            "moltbot.yaml:3: sessions.when_busy.slack: found 'joined', expected one of queue, interrupt, join",
        ),
        (
            "sessions: {when_busy: 'web=queue, slack=joined'}",
            "moltbot.yaml:1: sessions.when_busy.slack: found 'joined', expected one of queue, interrupt, join",
        ),
        (
            "sessions:\n  when_busy:\n    web: queue\n    Slack: join\n",
            "moltbot.yaml:4: sessions.when_busy: found 'Slack', expected channels of a-z 0-9 _ -, or * for all others",
        ),
    ],
)
def test_a_wrong_word_for_a_busy_channel_is_told_where_it_stands(tmp_path: Path, yaml: str, told: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        loaded(tmp_path, yaml)
    assert str(wrong.value).endswith(told)
