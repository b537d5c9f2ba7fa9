"""The documents are true of this checkout: links lead somewhere, pages are fresh, both READMEs say the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import grpc
import pytest
from checkout import ROOT, tracked_files
from moltbot import MoltBotClientError
from moltbot_adapters.http.errors import from_core
from moltbot_server.cli.model_check import model_problems
from moltbot_server.config import ConfigError, load_settings
from moltbot_server.errors import every_error, markdown

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUESTIONS = ("你能做什么\uff1f", "What can you do?")
"""The question of the examples: each README asks in its own language."""
DOCUMENTS = [path for path in tracked_files() if path.suffix == ".md"]
BY_NAME = re.compile(r"\b(?:pip[3x]?|uv) +(?:pip +)?(?:install|add)\b[^\n`]*?[ '\"]moltbot(?![\w./-])")
"""How somebody would fetch a package of our name from the index, where it is a stranger's."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_inside_the_repository_leads_to_a_file(document: Path) -> None:
    targets = [target.split("#")[0] for target in LINK.findall(FENCE.sub("", document.read_text("utf-8")))]
    inside = [target for target in targets if target and not re.match(r"[a-z]+:", target)]

    assert [target for target in inside if not (document.parent / target).exists()] == []


def test_nobody_is_told_to_install_a_strangers_package_of_our_name() -> None:
    for wrong in ("pip install moltbot", "python -m pip install 'moltbot[redis]'", "pip3 install -U moltbot==1"):
        assert BY_NAME.search(wrong), wrong
    for right in ("pip install --editable '.[redis]'", "pip install ./moltbot", "pip install openai"):
        assert not BY_NAME.search(right), right
    # What people ask the built-in model, and what this test looks for, tells nobody to do so.
    quoted = {path for path in tracked_files() if path.name.startswith("phrasings_")} | {Path(__file__)}
    texts = {path: path.read_text("utf-8", "replace") for path in set(tracked_files()) - quoted}
    assert [path.relative_to(ROOT).as_posix() for path, text in texts.items() if BY_NAME.search(text)] == []


def test_the_page_of_errors_is_that_of_the_tree() -> None:
    assert (ROOT / "docs" / "errors.md").read_text("utf-8") == markdown(), "type  make docs  and commit what it changes"


def test_the_page_of_the_openai_api_has_every_code_that_its_addresses_answer_with() -> None:
    elsewhere = {"SESSION_NOT_FOUND", "SESSION_BUSY", "TURN_NOT_FOUND", "INVALID_PAGE_TOKEN", "PLUGIN_NOT_FOUND"}
    elsewhere |= {"MODEL_EXISTS", "MODEL_NOT_LOADABLE", "MODEL_IN_USE", "INVALID_CONFIGURATION"}
    elsewhere |= {"DELIVERY_NOT_FOUND", "LEASE_LOST"}
    elsewhere |= {"SLOW_CONSUMER"}  # in the midst of a stream, which the adapter resumes
    refusals = [
        from_core(MoltBotClientError(grpc.StatusCode[error.status.name], "", reason=error.reason))
        for error in every_error()
        if error.reason not in elsewhere
    ]
    answered = {(str(refusal.code), refusal.status) for refusal in refusals}
    answered.add(("core_unavailable", from_core(MoltBotClientError(grpc.StatusCode.UNAVAILABLE, "")).status))
    adapter = ROOT / "adapters" / "moltbot_adapters" / "http"
    for source in (adapter / "body.py", *adapter.glob("openai_*.py")):
        found = re.findall(r'HttpError\(\s*(\d+),\s*"(\w+)"', source.read_text("utf-8"))
        answered |= {(code, int(status)) for status, code in found}
    answered |= {("not_found", 404), ("method_not_allowed", 405), ("host_not_allowed", 403), ("shutting_down", 503)}
    answered.add(("expectation_failed", 417))

    table = (ROOT / "docs" / "openai-api.md").read_text("utf-8").partition("## Errors")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (\d+) \|", table, re.MULTILINE)
    assert {(code, int(status)) for codes, status in rows for code in re.findall(r"`(\w+)`", codes)} == answered


def test_both_readmes_hold_the_same_commands() -> None:
    english, chinese = (FENCE.findall((ROOT / name).read_text("utf-8")) for name in ("README.md", "README.zh-CN.md"))

    in_english = [(language, text.replace(*QUESTIONS)) for language, text in chinese]
    assert [block for block in english if block[0] != "text"] == [block for block in in_english if block[0] != "text"]


def test_the_readme_lists_the_folders_of_the_tests() -> None:
    there = {path.relative_to(ROOT).parts[1] for path in tracked_files() if path.is_relative_to(ROOT / "tests")}
    for name in ("README.md", "README.zh-CN.md"):
        line = re.search(r"^tests/ .*[:\uff1a](.*)$", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        assert line is not None
        assert set(re.findall(r"\w+", line[1], re.ASCII)) == there


def test_the_settings_of_the_readme_can_be_pasted_as_they_are(tmp_path: Path) -> None:
    (pasted,) = (text for language, text in FENCE.findall((ROOT / "README.md").read_text("utf-8")) if language == "ini")
    (tmp_path / ".env").write_text(pasted)
    assert load_settings(tmp_path, {}, check=model_problems).port == 8000
    (tmp_path / ".env").write_text(pasted.replace("#", ""))
    with pytest.raises(ConfigError, match=r"/path/to/model: found nothing"):
        load_settings(tmp_path, {}, check=model_problems)


def test_the_chinese_readme_says_which_pages_are_in_english() -> None:
    text = FENCE.sub("", (ROOT / "README.zh-CN.md").read_text("utf-8"))
    for page in re.findall(r"\]\((?!README)([^)]+\.md)\)", text):
        assert f"]({page})\uff08英文\uff09" in text, page


def test_both_readmes_have_the_same_parts() -> None:
    parts = [
        re.findall(r"^(#+) ", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        for name in ("README.md", "README.zh-CN.md")
    ]

    assert parts[0] == parts[1]


def test_make_alone_lists_every_task_that_the_documents_name() -> None:
    listing = subprocess.run(["make", "--silent"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^ +make ([a-z-]+)", listing, re.MULTILINE))
    named = {task for path in DOCUMENTS for task in re.findall(r"`make ([a-z-]+)", path.read_text("utf-8"))}

    assert named - listed == set()
    assert {
        "help",
        "install",
        "run",
        "test",
        "check",
        "fmt",
        "proto",
        "proto-check",
        "bench",
        "load",
        "clean",
    } <= listed
