"""From an archive to balanced, lesion-grouped Parquet shards, and from a shard's bytes to the network's input."""
