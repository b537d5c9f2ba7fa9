"""The MoltBot contract and its Python client."""
