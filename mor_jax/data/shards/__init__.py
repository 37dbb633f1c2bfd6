"""Pre-tokenised shards on disk."""
