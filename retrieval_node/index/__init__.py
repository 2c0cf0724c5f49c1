"""Index kinds over the keys of one layer of a shard. Importing this package registers all kinds."""
