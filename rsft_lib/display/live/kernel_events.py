"""Front-end events for long-running cells: whether a user is present, and which widgets were clicked."""

import zmq
from IPython import get_ipython


def somebody_looks() -> bool:
    """Whether a person runs this cell: JupyterLab and VS Code send the kernel its cell id, papermill does not."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and "cellId" in (kernel.get_parent().get("metadata") or {})


def process_widget_events() -> None:
    """Handle queued widget messages while a cell runs; all other messages stay queued, in order, until it ends.

    JupyterLab sends widget messages to a separate thread (a subshell,
    https://github.com/jupyter/enhancement-proposals/pull/91); ipykernel >= 7.4 routes them to the main thread.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None or not getattr(kernel, "shell_channel_thread", None):  # not in a notebook, or ipykernel < 7
        return
    socket = kernel.shell_channel_thread.manager.get_shell_channel_to_subshell_pair(None).to_socket
    while True:
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        if not _handled(kernel, frames):
            kernel.io_loop.add_callback(kernel.shell_main, None, frames)


def _handled(kernel, frames: list[zmq.Frame]) -> bool:
    """Dispatch a message if it is for a widget, and return whether it was."""
    if len(frames) == 1:  # the kernel's own signal that it may run cells again
        return False
    identities, parts = kernel.session.feed_identities(frames, copy=False)
    kind = kernel.session.deserialize(parts, content=False, copy=False)["msg_type"]
    if not kind.startswith("comm_"):
        return False
    kernel.shell_handlers[kind](None, identities, kernel.session.deserialize(parts, copy=False))
    return True
