"""The MoltBot core."""
