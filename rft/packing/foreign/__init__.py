"""Third-party shards: read and indexed in place, never written."""
