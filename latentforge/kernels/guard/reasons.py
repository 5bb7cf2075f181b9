"""The closed lists of the guard: states of a record, stages of a proof, reasons why a kernel is not used."""

from __future__ import annotations

STATES = ("pending", "ok", "degraded", "failed", "crashed")
"""``pending`` stands while a proof runs; one that is found later means that the proof took its process or host down."""

STAGES = ("gate", "inspect", "compile", "load", "parity", "cost", "freeze", "composite")
"""In this order; a stage runs only if the one before it passed."""

REASONS = {
    "no_cubin": "no machine code for this GPU is embedded",
    "ptx_too_new": "only PTX is embedded, of a version that the driver does not know",
    "compile_timeout": "the compiler did not end in time",
    "compile_oom": "the compiler ran out of memory",
    "smem_exceeded": "needs more shared memory than a block of this GPU has",
    "load_error": "could not be loaded or called",
    "mismatch_first_call": "the first call differs from the reference",
    "mismatch_later_call": "a later call differs from the reference, the first did not",
    "nondeterministic": "equal calls give different bits",
    "nan": "not-a-number or infinity where the reference is finite",
    "oob_write": "wrote outside its outputs",
    "input_modified": "wrote over its inputs",
    "slow": "slower than what it would replace",
    "hang_low_power": "did not end in time",
    "crash_signal": "ended by a signal",
    "host_crash": "the host went down while this was tried",
}
"""Why a variant is not used, in a word for programs and a sentence for people. No other word is written."""
