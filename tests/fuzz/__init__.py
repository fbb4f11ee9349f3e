"""A fuzzer of everything that is read from files and messages: ``python -m tests.fuzz --count 1000``.

``mutations.py`` damages a file, ``kinds.py`` makes whole folders and reads them, ``runner.py`` does both in child processes
with limits and says what came of it. The same seed makes the same inputs.
"""
