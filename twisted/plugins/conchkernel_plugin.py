"""Makes ``twistd conchkernel`` and ``twist conchkernel`` known to Twisted.

Twisted imports every plugin module to list its commands, so this one holds only names. There is
no ``__init__.py`` beside it on purpose: ``twisted.plugins`` belongs to Twisted.
"""

from twisted.application.service import ServiceMaker

conchkernel = ServiceMaker(
    "conchkernel",
    "conchkernel.process",
    "SSH to any Jupyter: a gateway to the machine where a kernel runs.",
    "conchkernel",
)
