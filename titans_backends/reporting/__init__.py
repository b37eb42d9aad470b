"""The report: what the tuned tables and their timings say, as rows, as charts and as one page.

`gather` reads files and asks backends, and gives `facts`; `rows` and `summary` are pure functions of facts; `charts` and `page` draw rows and
decide nothing. Nothing here runs a kernel, changes a file of the cache, or knows the command line. Import from the submodules.
"""
