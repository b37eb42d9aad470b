"""The tuner: measures every candidate of a bucket in a child process, checks it first, and writes the winner to the cache.

`plan` says which buckets, `run.tune` measures them, `events` says how it goes. No call of an op ever comes here, except inside
`with titans_backends.autotune():`.
"""
