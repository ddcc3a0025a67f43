"""The folder of real tokenizers, traces and chats that some tests read; it is not part of the project."""

import os

import pytest

REAL, LONG = os.environ.get("RSFT_REAL_DATA"), bool(os.environ.get("RSFT_LONG_TESTS"))
needs_real = pytest.mark.skipif(not REAL, reason="RSFT_REAL_DATA is not set to the folder of the real inputs")
