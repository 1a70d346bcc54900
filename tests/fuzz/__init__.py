"""Bad and extreme inputs over the whole public face: each gives a right number or an error that names its argument.

`python -m tests.fuzz` tries them all, in processes that may die; test_fuzz.py a sample of them.
"""
