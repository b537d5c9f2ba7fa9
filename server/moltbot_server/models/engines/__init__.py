"""Engines: one file for each way to get tokens."""
