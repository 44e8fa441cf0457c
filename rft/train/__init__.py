"""Fine-tuning: objective, schedule, checkpoints, the run folder and the loop."""
