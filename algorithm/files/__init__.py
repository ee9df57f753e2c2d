"""The door: which files are read, reading with all checks, writing all or nothing."""
