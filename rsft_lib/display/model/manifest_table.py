"""What a manifest says, as a table."""

from rsft_lib.display.html import Table


def facts_table(title: str, facts: dict) -> Table:
    """Names and values, but for those that are empty and for hashes, which are not for eyes."""
    shown = {name: value for name, value in facts.items() if value not in ("", None, {}, []) and "sha256" not in name}
    return Table(title, ("", ""), [(name.replace("_", " "), _said(value)) for name, value in shown.items()])


def _said(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(part)}" for name, part in value.items())
    return f"{value:,}" if type(value) is int else str(value)
