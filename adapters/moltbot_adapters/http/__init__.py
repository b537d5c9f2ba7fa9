"""The HTTP adapter: an OpenAI-compatible API and the web chat, in a process of its own."""
