"""One schema for each noun that passes between the rooms: lesion images, shards, findings, bundles."""
