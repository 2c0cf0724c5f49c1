"""The durable list of contexts: one interface, one implementation per file."""
