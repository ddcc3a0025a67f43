"""Make text from data and models safe to display: no terminal control, invisible or direction-changing characters."""

import re

# Control characters, characters that are zero-width or blank or change the writing direction, and lone surrogates:
# Unicode's category Other and its default-ignorable code points. Joiners and variation selectors, whose runs can hide
# text, are kept where scripts and emoji need them: one after a non-Latin letter; FE0E and FE0F also after a keycap or
# emoji base. Right-to-left letters are kept, since they affect only themselves.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<![^\x00-\u02ff\u200c\u200d])[\u200c\u200d]"
    "|(?<![^\x00-\u02ff\u180b-\u180f\u200c\u200d\ufe00-\ufe0f])(?<![#*0-9©®])[\u180b-\u180d\u180f\ufe0e\ufe0f]"
)


def visible(text: str) -> str:
    """`text` with visible placeholders for such characters: `␛` for escape, `⟨202E⟩` for a direction override.

    The variation selectors of emoji and of Mongolian letters are kept after the character they modify; FE00-FE0D and
    E0100-E01EF, which also select forms of Chinese characters, are replaced.
    """
    return HIDDEN.sub(lambda match: _placeholder(ord(match[0])), text)


def _placeholder(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨{code:04X}⟩"
