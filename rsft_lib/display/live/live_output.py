"""A cell output that is updated in place while the cell runs."""

import time
from base64 import b64encode
from collections.abc import Callable
from io import BytesIO

from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure

EFFORT = 0.1  # largest share of the time spent on updates


class LiveOutput:
    """One output with the content that `make` returns (MIME type -> data), refreshed at most every `seconds`.

    Outside of notebooks, where outputs cannot be updated, it shows nothing.
    """

    def __init__(self, make: Callable[[], dict], seconds: float):
        self.make, self.seconds, self.due = make, seconds, 0.0
        self.handle: DisplayHandle | None = None
        self.content: dict | None = None

    def refresh(self, now: bool = False) -> None:
        """Update the output if that is due, or if `now`."""
        began = time.monotonic()
        if get_ipython() is None or (began < self.due and not now):
            return
        content = self.make()
        ended = time.monotonic()
        self.due = ended + self.seconds
        if self.handle is None:  # the first call includes imports, so its time does not count
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.due = max(self.due, ended + (ended - began) / EFFORT)
            if content != self.content:
                self.handle.update(content, raw=True)
        self.content = content


def png(figure: Figure) -> str:
    """A figure as base64-encoded PNG, as notebooks store it."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=96)
    return b64encode(file.getvalue()).decode()
