# testing: what tests of pyvmm, and of what is built on it, need beside it.
"""Models of what guests do to their memory: `verify_model`, `hotcold_model`, `dup_model`. The proof of the memory
engine: `torture`, `operations`, `balance`."""
