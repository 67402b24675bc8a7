"""Only what pyproject.toml cannot say: the optional extension module.

``CONCHKERNEL_ABI3=1`` builds one wheel for every Python from 3.11 on, against the stable ABI.
"""

import os

from setuptools import Extension, setup

abi3 = os.environ.get("CONCHKERNEL_ABI3") == "1"

setup(
    ext_modules=[
        Extension(
            "conchkernel._fastpty",
            ["conchkernel/_fastpty.pyx"],
            # Without a compiler the pure twin serves, with the same behaviour.
            optional=True,
            py_limited_api=abi3,
            # What the stable ABI lacks must fail here and not when it is imported.
            extra_compile_args=["-Werror=implicit-function-declaration"] if abi3 else [],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if abi3 else [],
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if abi3 else {},
)
