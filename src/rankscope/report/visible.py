"""Text from others, as it may be shown on a page, in Markdown, or in a terminal."""

import re

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text in which nothing acts unseen: control characters (a terminal obeys them), and those that turn the direction
    of the text around them, become U+FFFD. Tabs and line breaks stay.
    """
    return _UNSEEN.sub("\ufffd", text)
