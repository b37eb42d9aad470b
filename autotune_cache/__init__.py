"""The shipped tables: one `<slug>.yaml` per machine, read by the cache's lookup when the user's own cache has no row."""
