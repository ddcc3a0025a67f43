"""Text of data and models for people to read: nothing in it acts on a terminal, hides, or turns the line around."""

import re

# Characters that act on a terminal, take no space, are blank or turn the direction of writing, and halves of
# characters, which cannot be printed: Unicode's categories of others, and what it lets a font ignore. Joiners and
# variation selectors, in whose runs a text can be hidden, are left where scripts and emoji need them: one behind a
# letter that is not Latin, FE0E and FE0F also behind what they make a keycap or an emoji. Letters that are written from
# the right are left, since they turn nothing but themselves.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<![^\x00-\u02ff\u200c\u200d])[\u200c\u200d]"
    "|(?<![^\x00-\u02ff\u180b-\u180f\u200c\u200d\ufe00-\ufe0f])(?<![#*0-9©®])[\u180b-\u180d\u180f\ufe0e\ufe0f]"
)


def visible(text: str) -> str:
    """`text` with signs in place of what acts or hides: `␛` for escape, `⟨202E⟩` for an override of the direction.

    Of the variation selectors only the two of emoji and those of Mongolian letters are left, each behind what it
    varies: FE00-FE0D and E0100-E01EF, which choose the form of a Chinese character too, are shown as signs.
    """
    return HIDDEN.sub(lambda found: _sign(ord(found[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨{code:04X}⟩"
