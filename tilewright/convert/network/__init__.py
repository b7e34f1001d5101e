"""Convolutions as one program: what is fused, what stays int8 between layers, what is replayed."""

from tilewright.convert.network.convolutions import Convolutions, install_programs
from tilewright.convert.network.program import Program, programs_of, remove_programs

__all__ = ["Convolutions", "Program", "install_programs", "programs_of", "remove_programs"]
