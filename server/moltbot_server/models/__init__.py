"""Models: what can answer, and the engines that do."""
