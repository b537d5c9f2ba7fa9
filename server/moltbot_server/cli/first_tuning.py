"""After a first start: measures quickly how the model runs best here, for the starts to come.

Run as `python -m moltbot_server.cli.first_tuning --workspace DIR` beside a MoltBot that has just become ready. It takes
the least priority, does nothing where something was measured already or where it could do harm, and keeps nothing that
others disturbed: then the next start tries again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from moltbot_server.cli.terminal import Failure
from moltbot_server.cli.tuning import measured_undisturbed
from moltbot_server.config import INLINE, ConfigError, Settings, load_settings
from moltbot_server.errors import MoltBotError
from moltbot_server.models.folder import SCRIPTED, ModelFolder, configured_folder, is_encoder
from moltbot_server.models.library import default_folder
from moltbot_server.models.measuring_plan import STREAMS, Plan
from moltbot_server.models.tuning import keep_tuning, measured_here
from moltbot_server.workspace import Workspace, WorkspaceError, find_workspace

_LARGEST = 64 << 20
"""Bytes of weights beyond which nothing is measured unasked: it would take as much memory again, and minutes."""

_LEAST_PRIORITY = 19


def main(arguments: list[str] | None = None) -> int:
    """Measure if that is of use and harms nobody; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moltbot_server.cli.first_tuning")
    parser.add_argument("--workspace", type=Path, metavar="DIR")
    workspace = find_workspace(os.environ, parser.parse_args(arguments).workspace)
    try:
        settings = load_settings(workspace.folder, os.environ)
        folder = _to_measure(workspace, settings)
        if folder is not None:
            outcome = measured_undisturbed(Plan(folder=str(folder.path), type=folder.family, quick=True))
            if outcome is not None:
                found = outcome.trials[0].tokens_per_second
                keep_tuning(workspace, folder.path, folder.id, outcome.best, tokens_per_second=found, streams=STREAMS)
    except (MoltBotError, ConfigError, WorkspaceError, Failure, OSError) as problem:
        print(f"moltbot: nothing was measured: {problem}", file=sys.stderr)
        return 1
    return 0


def _to_measure(workspace: Workspace, settings: Settings) -> ModelFolder | None:
    """Return the folder of the model that answers here, None where nothing is to be measured."""
    kind = settings.model_type.strip().lower()
    path = str(settings.model_path or "")
    elsewhere = settings.engine not in ("", INLINE)
    if settings.threads or elsewhere or kind == SCRIPTED or (path and is_encoder(Path(path))):
        return None
    folder = default_folder(settings) or configured_folder(kind, path)
    small = (folder.path / "model.bin").stat().st_size <= _LARGEST
    return folder if small and measured_here(workspace, folder.path) is None else None


if __name__ == "__main__":
    os.nice(_LEAST_PRIORITY)
    sys.exit(main())
