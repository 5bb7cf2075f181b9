"""Contracts: claims with falsifiers, each an executable check and a planted control on which it must fail."""

from latentforge.contracts.finding import Finding

__all__ = ["Finding"]
