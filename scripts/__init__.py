"""Programs beside the library; each says in its first lines what it is for.

Run from the root of a clone, as `python -m scripts.bench.matmul`: nothing has to be installed
but what the program imports.
"""
