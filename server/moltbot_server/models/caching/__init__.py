"""What is kept for another time: answers, and what was looked up elsewhere."""
