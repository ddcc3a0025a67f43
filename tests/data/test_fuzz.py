"""The short form of fuzz_rows.py."""

from fuzz_rows import LAYOUTS, fuzz


def test_no_row_ends_the_work_or_touches_the_rows_beside_it(tmp_path):
    found = fuzz(tmp_path, rows=60, seed=1)
    assert len(found) == 2 * len(LAYOUTS)
    assert all(counts["rejected"] > 7 for counts in found.values())
    assert all(counts["written"] > 15 for name, counts in found.items() if name.endswith("04"))
