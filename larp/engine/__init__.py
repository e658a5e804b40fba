"""Training: processes and DeepSpeed engines, optimizers, schedules, checkpoints, logs."""
