"""Operators on tensors: formats, references, implementations and the router between them. Knows nothing about
models.

Each folder with an ``operator.py`` holds operators, whose cards are registered here.
"""

import importlib

from tilewright.autotune.modes import when_changed
from tilewright.kernels import tuning
from tilewright.kernels.cpu import choices
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.card import folders
from tilewright.kernels.dispatch.library import define

for _module in folders(__name__):
    for _card in importlib.import_module(_module).CARDS:
        define(_card)
        tuning.implementation_of(_card.name)
router.set_choices(choices.faster, tuning.preference, tuning.tune_on_first_use)
when_changed(router.invalidate)
