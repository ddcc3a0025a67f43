"""Where the real tokenizers, traces and chats lie that some tests read; they are no part of the project."""

import os

import pytest

REAL = os.environ.get("RSFT_REAL_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="RSFT_REAL_DATA is not set to the folder of the real inputs")
