"""What a manifest says, as a table."""

from rsft_lib.view.markup import Table

HASH = 12  # characters of a hash that are shown


def facts_table(title: str, facts: dict) -> Table:
    """Names and values that are not empty; hashes cut short, and parts of a value after their whole."""
    return Table(title, ("", ""), [(name.replace("_", " "), value) for name, value in _flat(facts)])


def _flat(facts: dict, prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in facts.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name} ")
        elif value not in ("", None, []):
            short = "sha256" in f"{prefix}{name}" and isinstance(value, str)
            found.append(
                (prefix + name, f"{value[:HASH]} …" if short else f"{value:,}" if _is_count(value) else str(value))
            )
    return found


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
