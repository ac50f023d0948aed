"""What a user may write about training, and what becomes of it: start at training.py, then rules.py."""
