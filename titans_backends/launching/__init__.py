"""What a backend that launches kernels needs and no kernel is: launches on tape, calls repeated from it, forms compiled ahead.

A backend's `launch` module makes its launches through a `Taping`; `remembering` then turns an op's `run` into its `remember`, and `ahead_of` into its
`compile_ahead`. Nothing here knows a kernel language.
"""
