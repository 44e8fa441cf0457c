"""Third-party shards: read and indexed where they are, never written."""
