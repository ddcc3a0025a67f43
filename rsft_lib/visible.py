"""Text of data and models for people to read: nothing in it acts on a terminal, hides, or turns the line around."""

import re

# Characters that act on a terminal, take no space or turn the direction of writing, and halves of characters, which
# cannot be printed. The joiners U+200C and U+200D are left between letters of other scripts and within emoji, which
# need them; letters that are written from the right are left, since they turn nothing but themselves.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
    "|(?<![^\x00-\u02ff])[\u200c\u200d]"
)


def visible(text: str) -> str:
    """`text` with signs in place of what acts or hides: `␛` for escape, `⟨202E⟩` for an override of the direction."""
    return HIDDEN.sub(lambda found: _sign(ord(found[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨{code:04X}⟩"
