"""What one NVIDIA GPU does with this project, in eight steps. Start at __main__.py, then run.py."""
