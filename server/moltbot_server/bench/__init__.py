"""Benchmarks: what the core costs beside the bare transport, measured in pairs within one run."""
