"""The cache of tuned choices: what the YAML files hold, how they are read, merged and written, and what they say about a call.

Nothing here measures, chooses a kernel, or imports a backend. Import from the submodules: `schema` (the values), `file` (disk),
`lookup` and `staleness` (pure decisions), `timings` (every candidate's numbers), `paths`, `source_hash`, `environment`.
"""
