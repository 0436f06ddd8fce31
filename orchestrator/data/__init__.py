"""What shards hold, which sample comes at which step, and how it becomes a batch."""
