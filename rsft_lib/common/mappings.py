"""Strings that stand for other strings, in one parameter: `this -> that, another -> more`."""


def pairs(text: str) -> dict[str, str]:
    """Parse a parameter that maps strings to strings.

    >>> pairs("<|quad_start|> -> <short>, <|quad_end|> -> <long>")
    {'<|quad_start|>': '<short>', '<|quad_end|>': '<long>'}

    Raises:
        ValueError: a part is not of the form `this -> that`.
    """
    parts = [[side.strip() for side in part.split("->")] for part in text.split(",") if part.strip()]
    for pair in parts:
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"found {' -> '.join(pair)!r} in {text!r}, expected `this -> that`, comma-separated")
    return dict(parts)
