"""The key ring: whose keys it holds, in which order, from where, and that it changes in one step."""

from __future__ import annotations

from pathlib import Path

import pytest
from moltbot_server.auth.provider_keys import ProviderKeys, variables_of
from moltbot_server.auth.vault import Vault, VaultError
from moltbot_server.config import Provider
from moltbot_server.models.providers.keys import KeyRing, ProviderKey
from moltbot_server.models.providers.presets import Preset
from moltbot_server.workspace import Workspace

STORED, SECOND, TOLD = (f"sk-{name}-0123456789abcdef" for name in ("stored", "second", "told"))
PRESETS = {
    "openai": Preset(title="OpenAI", key_env=("OPENAI_API_KEY",), base_url="https://api.openai.com/v1"),
    "zhipu": Preset(
        title="Zhipu", key_env=("ZHIPUAI_API_KEY", "ZAI_API_KEY"), base_url="https://open.bigmodel.cn/api/paas/v4"
    ),
    "azure": Preset(title="Azure OpenAI", key_env=("AZURE_OPENAI_API_KEY",)),
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace folder."""
    return Workspace(folder=tmp_path)


def ring(workspace: Workspace, environ: dict[str, str], *providers: Provider) -> ProviderKeys[ProviderKey]:
    """Return a ring that has read its keys."""
    keys = ProviderKeys(workspace, environ, make=ProviderKey)
    keys.use(keys.read(variables_of(providers, PRESETS)))
    return keys


def test_engines_take_it_for_their_key_ring(workspace: Workspace) -> None:
    Vault(workspace, {}).add("openai", STORED)
    taken: KeyRing = ring(workspace, {})
    [key] = taken.keys("openai")
    assert (type(key), key.text) == (ProviderKey, STORED)
    assert taken.keys("anthropic") == ()


def test_keys_of_the_vault_go_before_those_of_the_environment_and_none_is_there_twice(workspace: Workspace) -> None:
    vault = Vault(workspace, {})
    first, second = vault.add("openai", STORED), vault.add("openai", SECOND)
    keys = ring(workspace, {"OPENAI_API_KEY": TOLD})
    assert [key.id for key in keys.keys("openai")] == [first.id, second.id, "env:OPENAI_API_KEY"]
    assert [key.source for key in keys.held.all] == ["vault", "vault", "environment"]
    assert len(ring(workspace, {"OPENAI_API_KEY": STORED}).keys("openai")) == 2


def test_the_workspaces_environment_file_has_keys_too_and_the_environment_goes_before_it(workspace: Workspace) -> None:
    (workspace.folder / ".env").write_text(f"ZAI_API_KEY={STORED}\nOPENAI_API_KEY={STORED}\n")
    keys = ring(workspace, {"OPENAI_API_KEY": TOLD, "ZAI_API_KEY": ""})
    found = {key.provider: (key.text, key.source) for key in keys.held.all}
    assert found == {"openai": (TOLD, "environment"), "zhipu": (STORED, ".env")}


@pytest.mark.parametrize("word", ["off", "OFF", "no", "0"])
def test_the_environment_can_be_left_out(workspace: Workspace, word: str) -> None:
    (workspace.folder / ".env").write_text(f"ZAI_API_KEY={STORED}\n")
    assert ring(workspace, {"OPENAI_API_KEY": TOLD, "MOLTBOT_PROVIDER_ENV": word}).held.all == ()
    (workspace.folder / ".env").write_text(f"ZAI_API_KEY={STORED}\nMOLTBOT_PROVIDER_ENV={word}\n")
    assert ring(workspace, {"OPENAI_API_KEY": TOLD}).held.all == ()


def test_a_variable_that_holds_no_key_is_told_without_its_value(workspace: Workspace) -> None:
    keys = ring(workspace, {"OPENAI_API_KEY": "planted key with blanks"})
    assert keys.held.all == ()
    [problem] = keys.held.problems
    assert problem.startswith("the variable OPENAI_API_KEY is not used: this is no key")
    assert "planted" not in problem


def test_a_key_of_a_preset_is_not_told_to_another_address(workspace: Workspace) -> None:
    office = Provider(name="office-eu", preset="openai", base_url="https://llm.example.com/v1")
    plain = Provider(name="second", preset="openai")
    azure = Provider(name="azure", base_url="https://acme.openai.azure.com")
    assert variables_of((office, plain, azure), PRESETS) == {
        "openai": ("OPENAI_API_KEY",),
        "zhipu": ("ZHIPUAI_API_KEY", "ZAI_API_KEY"),
        "azure": ("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
        "office-eu": ("OFFICE_EU_API_KEY",),
        "second": ("OPENAI_API_KEY", "SECOND_API_KEY"),
    }
    keys = ring(workspace, {"OPENAI_API_KEY": TOLD, "OFFICE_EU_API_KEY": STORED}, office)
    assert [key.text for key in keys.keys("office-eu")] == [STORED]


def test_nor_is_it_where_the_provider_has_the_presets_own_name(workspace: Workspace) -> None:
    elsewhere = Provider(name="openai", base_url="http://127.0.0.1:9390")
    zai = Provider(name="zai", base_url="https://llm.example.com/v1")  # another preset's variable by its own name
    there = Provider(name="zhipu", base_url="https://open.bigmodel.cn/api/paas/v4/")
    found = variables_of((elsewhere, zai, there), PRESETS)
    assert (found["openai"], found["zai"]) == ((), ())
    assert found["zhipu"] == ("ZHIPUAI_API_KEY", "ZAI_API_KEY", "ZHIPU_API_KEY")
    keys = ring(workspace, {"OPENAI_API_KEY": TOLD}, elsewhere)
    assert keys.keys("openai") == ()


def test_it_changes_by_use_alone_and_stays_when_reading_fails(workspace: Workspace) -> None:
    vault = Vault(workspace, {})
    vault.add("openai", STORED)
    keys = ring(workspace, {})
    vault.add("openai", SECOND)
    held = keys.read(variables_of((), PRESETS))
    assert len(keys.keys("openai")) == 1
    keys.use(held)
    assert len(keys.keys("openai")) == 2
    workspace.vault_file.write_text("{}")
    with pytest.raises(VaultError):
        keys.read({})
    assert len(keys.keys("openai")) == 2


def test_no_text_of_it_shows_a_key(workspace: Workspace) -> None:
    Vault(workspace, {}).add("openai", STORED, label="team")
    keys = ring(workspace, {"ZAI_API_KEY": TOLD})
    shown = f"{keys!r} {keys.held!r} {keys.held} {keys.held.all} {keys.keys('openai')} {vars(keys.vault)}"
    assert "team" in shown
    assert STORED not in shown
    assert TOLD not in shown


def test_the_master_key_may_be_told_by_the_environment_file_of_a_workspace_too(workspace: Workspace) -> None:
    (workspace.folder / ".env").write_text(f"MOLTBOT_VAULT_KEY={'ab' * 32}\n")
    ring(workspace, {}).vault.add("openai", STORED)
    assert not workspace.vault_key_file.exists()
    assert [key.text for key in ring(workspace, {}).keys("openai")] == [STORED]
