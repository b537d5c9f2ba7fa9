"""MoltBot's built-in model: the artefact that ships with the package, its topics, and the recipe that makes it."""

from pathlib import Path

ARTIFACT = Path(__file__).parent / "artifact"
"""Folder of the shipped model: CTranslate2 files, `tokenizer.model` and `moltbot.yaml`."""
