"""One output of a cell that is rewritten while the cell runs."""

import time
from base64 import b64encode
from collections.abc import Callable
from io import BytesIO

from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

EFFORT = 0.1  # largest share of the time that making it may take


class Rewritten:
    """What `make` returns, MIME type -> data, as one output; made anew at most every `seconds`, and only if it changed.

    Outside of notebooks, where nothing can be rewritten, it shows nothing.
    """

    def __init__(self, make: Callable[[], dict], seconds: float):
        self.make, self.seconds, self.due = make, seconds, 0.0
        self.handle, self.content = None, None

    def refresh(self, now: bool = False) -> None:
        """Make and show it if that is due, or `now`."""
        began = time.monotonic()
        if get_ipython() is None or (began < self.due and not now):
            return
        content = self.make()
        ended = time.monotonic()
        self.due = ended + self.seconds
        if self.handle is None:  # the first takes long, since what it needs is loaded
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.due = max(self.due, ended + (ended - began) / EFFORT)
            if content != self.content:
                self.handle.update(content, raw=True)
        self.content = content


def png(figure: Figure) -> str:
    """A figure as notebooks keep one."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=96)
    return b64encode(file.getvalue()).decode()
