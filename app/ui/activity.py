"""What the worker does: the line under the title, and the list of all jobs."""

from __future__ import annotations

import gradio as gr

from app.actions.studio import Studio
from app.jobs import Job, State
from app.ui import markup
from app.ui.live import EVENT, PIECE, Live, attempt, said

_MOST_JOBS = 25


def build_activity(studio: Studio, live: Live) -> None:
    """Build the line that shows the running job."""
    line = live.add(gr.HTML(elem_id="activity", js_on_load=markup.CLICKS), lambda: _activity(studio))
    wire_jobs(studio, line)


def build_jobs(studio: Studio, live: Live) -> None:
    """Build the list of all jobs."""
    with gr.Accordion("Jobs", open=False, elem_id="jobs"):
        shown = gr.State("")
        listing = live.add(gr.HTML(js_on_load=markup.CLICKS), lambda log: _listing(studio, log), shown)
        empty = gr.Button("Cancel everything that waits", size="sm", variant="secondary")
        empty.click(lambda: attempt(studio.jobs.empty, done="The queue is empty."), **EVENT)
    wire_jobs(studio, listing)

    def show_log(log: str, event: gr.EventData) -> str:
        do, name, _ = said(event)
        return log if do != "log" else "" if log == name else name

    listing.click(show_log, shown, shown, **PIECE)


def wire_jobs(studio: Studio, piece: gr.HTML) -> None:
    """Let the buttons of jobs in a piece of HTML work."""

    def act(event: gr.EventData) -> None:
        do, name, _ = said(event)
        if do == "cancel":
            attempt(studio.jobs.cancel, name)
        elif do == "resume":
            attempt(studio.jobs.resume, name, done="It goes on.")
        elif do == "up":
            attempt(studio.jobs.move, name, 1)

    piece.click(act, **PIECE)


def _activity(studio: Studio) -> str:
    jobs, waiting = studio.jobs.jobs(), studio.jobs.waiting()
    running = next((job for job in jobs if job.state is State.RUNNING), None)
    lost = next((job for job in jobs[:5] if job.state is State.INTERRUPTED), None)
    queue = f'<span class="sd-muted">{len(waiting)} waiting</span>' if waiting else ""
    if running is not None:
        done, total, words = progress(studio, running)
        title = f"<strong>{markup.text(running.title)}</strong>"
        middle = f'<span class="sd-grow">{title} <span class="sd-muted">{markup.text(words)}</span></span>'
        inner = middle + markup.bar(done, total, running.title) + queue + markup.job_buttons(running, waiting)
    elif lost is not None:
        middle = (
            f'<span class="sd-grow"><strong>{markup.text(lost.title)}</strong> was interrupted; what it had done is kept.</span>'
        )
        inner = markup.state_badge(lost.state) + middle + queue + markup.job_buttons(lost, waiting)
    else:
        words = "Starting the worker …" if waiting else "Nothing runs. Train a concept, draw, or export below."
        inner = f'<span class="sd-grow sd-muted">{words}</span>{queue}'
    return f'<div class="sd-activity" role="status">{inner}</div>'


def progress(studio: Studio, job: Job) -> tuple[float, float, str]:
    """Return how much of a running job is done, of how much, and that in words."""
    events = studio.jobs.progress(job.name)
    last = events[-1] if events else {}
    if "step" in last:
        speed, remaining = last["speed"], markup.duration(last["remaining"])
        return last["step"], last["steps"], f"step {last['step']} of {last['steps']}, {speed:.1f} per second, {remaining} left"
    if "stage" in last:
        return last["done"], last["total"], f"{last['stage']}: {last['unit']} {last['done']} of {last['total']}"
    if "total" in last:
        return last["done"], last["total"], f"{last['done']} of {last['total']}"
    return 0, 1, "getting ready …"


def _listing(studio: Studio, log: str) -> str:
    jobs, waiting = studio.jobs.jobs()[:_MOST_JOBS], studio.jobs.waiting()
    if not jobs:
        return markup.empty("No jobs yet. Whatever is trained, drawn or exported appears here.")
    return "".join(_job(studio, job, waiting, shows_log=job.name == log) for job in jobs)


def _job(studio: Studio, job: Job, waiting: list[str], *, shows_log: bool) -> str:
    reason = markup.refusal(job.reason) if job.reason else ""
    log = f"<pre>{markup.text(studio.jobs.log(job.name)[-8000:] or 'Nothing was logged.')}</pre>" if shows_log else ""
    label = "Hide log" if shows_log else "Log"
    buttons = markup.job_buttons(job, waiting) + markup.button(
        "log", job.name, label, kind="sd-quiet", title=f"{label} of {job.title}"
    )
    return (
        f'<div class="sd-job">{markup.state_badge(job.state)}<span class="sd-grow">{markup.text(job.title)}</span>'
        f"{buttons}{reason}{log}</div>"
    )
