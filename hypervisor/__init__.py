"""The process that owns the arena and serves tmem hypercalls."""
