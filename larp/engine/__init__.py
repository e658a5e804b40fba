"""Training machinery around the models: ranks and engines, learning-rate schedules, checkpoints, logs."""
