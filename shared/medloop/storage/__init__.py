"""Objects (bytes by key) and records (JSON documents by id), each behind a few verbs with two implementations."""
