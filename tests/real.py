"""Where the real tokenizers, traces and chats lie that some tests read; they are no part of the project."""

import os

import pytest

REAL, LONG = os.environ.get("RSFT_REAL_DATA"), bool(os.environ.get("RSFT_LONG_TESTS"))
needs_real = pytest.mark.skipif(not REAL, reason="RSFT_REAL_DATA is not set to the folder of the real inputs")
