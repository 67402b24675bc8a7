"""What a fuzzer calls: any bytes at all, into each parser that a stranger reaches.

``make fuzz`` lets atheris search, from the seeds beside this; tests/test_fuzz.py runs the seeds
themselves everywhere. What is found becomes a seed.
"""
