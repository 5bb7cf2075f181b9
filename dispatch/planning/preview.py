"""A plan as a reader sees it; the same plan gives the same bytes."""

from __future__ import annotations

from dispatch.planning.applied import Since
from dispatch.planning.ask import Ask
from dispatch.planning.plan import Plan


def render(plan: Plan, ask: Ask, since: Since | None = None) -> str:
    """The plan as text, with what changed since the last one was applied, without the sentence that ends a preview."""
    each = [one for one in (plan, plan.beside) if one is not None]
    where = " and ".join(one.host + (f" ({one.machine})" if one.machine else "") for one in each)
    lines = [f"plan {plan.digest[:8]}  {ask.recipe} on {where}", ""]
    width = max(len(step.name) for step in plan.steps)
    lines.append(f"  {'step':<{width}}  {'will':<6}  because")
    lines += [f"  {step.name:<{width}}  {step.will:<6}  {step.because}" for step in plan.steps]
    lines.append("")
    for one in each:
        whose = f"  {one.host}: " if len(each) > 1 else "  "
        lines.append(f"{whose}{one.memory.text}")
        if plan.starts_something:
            lines.append(f"{whose}{one.runner.text}")
    lines += [f"  note: {note}" for note in plan.notes]
    lines += ["", *since.lines()] if since is not None else []
    return "\n".join(lines) + "\n"


def ending(plan: Plan, ask: Ask) -> str:
    """The sentence that ends a dry run."""
    if plan.refusals:
        first = plan.refusals[0]
        return f"nothing was changed (dry run). It would be refused: {first.why}"
    if plan.changes_nothing:
        return "nothing was changed (dry run), and nothing is to be done."
    flags = " --attempt next" * ask.attempt_next + " --wait" * ask.wait
    return f"nothing was changed (dry run). To do it:  {ask.command}{flags}"
