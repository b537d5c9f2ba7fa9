"""The MoltBot adapters: one small process for each platform."""
