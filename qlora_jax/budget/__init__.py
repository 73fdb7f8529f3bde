"""What a run needs of memory, and settings that fit.

`setup` is what memory depends on, `estimate` its parts from shapes alone, `plan` the
fastest settings within a limit, `host` what of the host's memory is free. What XLA itself
assigns to a step is in `train.compiled`.
"""
