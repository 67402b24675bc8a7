"""Only what pyproject.toml cannot say: the optional extension modules."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # optional: without a compiler the pure twin serves, with the same behaviour.
        Extension("conchkernel._fastpty", ["conchkernel/_fastpty.pyx"], optional=True),
    ],
)
