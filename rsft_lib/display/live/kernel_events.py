"""What a cell that runs for long can know of whoever looks at it: whether there is one, and what was clicked."""

import zmq
from IPython import get_ipython


def somebody_looks() -> bool:
    """Whether a person runs this cell: JupyterLab and VS Code tell the kernel which one it is, papermill does not."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and "cellId" in (kernel.get_parent().get("metadata") or {})


def hear_widgets() -> None:
    """Handle what widgets have sent while this cell runs; all else that has come is handled after it, in its order.

    It waits where the kernel would find it once the cell has ended. JupyterLab sends it to a thread of its own (a
    subshell, https://github.com/jupyter/enhancement-proposals/pull/91); ipykernel from 7.4 on brings it to this one.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if not getattr(kernel, "shell_channel_thread", None):  # no notebook, or ipykernel before 7
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
    """Pass a message on if it is for a widget; whether it is."""
    if len(frames) == 1:  # the kernel's own sign that it may run cells again
        return False
    identities, parts = kernel.session.feed_identities(frames, copy=False)
    kind = kernel.session.deserialize(parts, content=False, copy=False)["msg_type"]
    if not kind.startswith("comm_"):
        return False
    kernel.shell_handlers[kind](None, identities, kernel.session.deserialize(parts, copy=False))
    return True
