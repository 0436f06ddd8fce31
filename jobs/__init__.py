"""What a launcher starts in every process; the logic lives in `orchestrator`."""
