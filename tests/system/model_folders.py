"""Models for the tests of `moltbot model`: folders that can answer, and what the command lists."""

import shutil
from pathlib import Path
from typing import Any

from cli_process import Home
from moltbot_server.demo_model import ARTIFACT

BUILT_IN = "moltbot-demo"


def twin(folder: Path) -> Path:
    """Make a model folder that holds what the built-in one does, under the folder's own name; return it."""
    shutil.copytree(ARTIFACT, folder)
    description = (folder / "moltbot.yaml").read_text()
    (folder / "moltbot.yaml").write_text(description.replace("family: moltbot-demo", "family: twin"))
    return folder


async def known(home: Home) -> dict[str, dict[str, Any]]:
    """Return the models of `moltbot model list` by name."""
    return {model["name"]: model for model in (await home.run("model", "list", "--json")).json["models"]}
