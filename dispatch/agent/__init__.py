"""The part of LatentForge that runs on hosts: standard library only, Python 3.10 or later, nothing of the project.

One process answers one request: a JSON line (and payload) on stdin, one frame (and payload) on stdout.

  probe status read collect fetch        create and change nothing, not even the state root
  put install reserve launch cancel gc   idempotent; each answers with the state after it

A run's state is derived when asked for (state.py), from its journal, lock, supervisor and exit record:

  exit record  lock held  `started`   supervisor   boot      state
  valid        no         any         any          any       finished (by code or signal)
  valid        yes        any         any          any       finishing: something still holds the lock
  none         any        yes         any          another   interrupted by a restart of the host
  none         yes        yes         alive        same      running
  none         yes        yes         gone         same      unsupervised: its exit status will not be known
  none         no         yes         any          same      lost: outcome unknown
  none         yes        no          any          same      queued, or starting once `launching` is journalled
  none         no         no          any          any       reserved, never started

Lost, interrupted and unknown never become green; a run with `started` in its journal is never started again.
"""
