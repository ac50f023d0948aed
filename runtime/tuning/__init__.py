"""Tuning: from a `TuningJob` to an adapter. Read `job.run` first; `settings` says what a job is."""
