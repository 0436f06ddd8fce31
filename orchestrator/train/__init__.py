"""One run from the frozen bundle to its result: fit, evaluate, predict, checkpoints, signals, events."""
