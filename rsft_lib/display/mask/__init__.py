"""A sample as it will be trained: its segments, its tokens as text, and the pack it lies in."""
