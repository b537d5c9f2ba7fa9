"""Replicas of small models as processes: what runs in them, and who starts them."""
