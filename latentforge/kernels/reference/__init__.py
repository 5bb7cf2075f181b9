"""The definitions, in torch, in any floating precision and on any device: what every other backend is measured by."""
