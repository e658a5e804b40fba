"""Captions of mirrored videos: left and right change places where they are directions, and only there."""

import re


def _compiled(pattern: str) -> re.Pattern:
    return re.compile(pattern, re.IGNORECASE)


_WORDS = _compiled(r"\b(?:left|right)(?=(?:wards?|most|hand)?\b)")
_SWAPPED = {"left": "right", "right": "left"}
_NEAR = 100
"""Characters on either side that a rule sees, so that long captions take no longer than their length."""

_THE = r"(?:the|a|an|his|her|its|their|my|your|our|one's|another|each|both|\w+'s)"
_FAR = r"(?:(?:far|very|upper|lower|top|bottom|front|rear|back|near|outer|inner|center|centre)[\s-]+)?"
_PLACE = r"\b(?:to|on|at|from|toward|towards|into|in|onto|off|along|by)\s+"
_MOVES = (
    r"\b(?:(?:mov|go|head|fac|turn|walk|run|runn|driv|rid|pan|pann|tilt|lean|look|glanc|gaz|point|drift|slid|roll|fly|jump|step|"
    r"stepp|swing|sway|shift|swip|spin|spinn|rotat|veer|swerv|bank|pull|push|steer|dodg|dribbl|flip|flipp|kick|pass|throw|shoot|"
    r"crawl|swim|swimm|skat|ski|sail|travel|scroll|bend|duck|hop|hopp|reach|wav|drag|aim|circl|bear|sidestep|slip|slipp)"
    r"(?:e|es|s|ed|d|ing)?|went|ran|flew|flies|slid|bent|swam|swung|spun|drove|rode)"
)
_HOW = r"(?:\s+(?:slightly|slowly|quickly|sharply|sharp|hard|far|further|farther|again|then|back|first|diagonally|up|down))*"
# What has a left and a right one, but hardly a correct one.
_PART = (
    r"\s+(?:(?:front|back|rear|upper|lower|hind)\s+)?(?:hand|arm|leg|foot|feet|knee|elbow|shoulder|eye|ear|cheek|thumb|finger|"
    r"wrist|ankle|hip|thigh|calf|fist|palm|wing|paw|hook|jab|punch|uppercut|glove|shoe|sleeve|boot|side|corner|edge|half|third|"
    r"lane|turn|flank|forehand|backhand)s?\b(?!\s+(?:up|by|in)\b)"
)
# No more is said of the direction. "At", "into" and their like are missing: before them "right" may mean "directly".
_END = r"\s*(?:$|[.,;:!?)\"]|(?:and|or|then|while|as|with|until|but|from|toward|towards|of|slowly|quickly|again)\b)"
_BE = r"\s+(?:is|are|was|were|has|have|who|which|that|where|there)\b"
_NO_OBJECT = rf"(?!\s+(?:{_THE}|for|home|him|them|us|me|it|out|over|behind|open|alone)(?:\s|$))"
_NOT_AT_ONCE = r"(?!\s+(?:now|away|here|there|around|back|over|side)\b)"
# After these, "left" is a verb and "right" may mean "correct".
_NOT_AFTER = _compiled(
    r"\b(?:is|are|was|were|be|been|what|what's|nothing|little|much|has|have|had|he|she|it|they|we|i|who|that|all)\s+$|"
    r"\b(?:everything|something|anything|nothing|things|all)\s+(?:goes|going|gone|went|go)\s+$"
)

_BOTH = [  # (what stands before, and what after a direction)
    ("", r"(?:wards?|most)\b|[\s-]?hand(?:ed|er|ers)?\b|-(?:hand|foot|side|footed|sided)\b"),
    ("", _PART),
    (r"\b(?:top|bottom|upper|lower|middle|center|centre|stage|screen|camera)\s+$", _END),
    (r"\b(?:top|bottom|upper|lower|middle|center|centre|up|down)-$", ""),
    (rf"{_PLACE}(?:{_THE}\s+)?{_FAR}$", _END),  # also "next to her left", of which more may follow
    (r"(?<!\bthe )$", rf"\s+of\s+{_THE}\s"),  # a circle left of a square
    (rf"{_MOVES}{_HOW}\s+$", _END),
    (rf"{_MOVES}\s+(?:(?:{_THE}|two)\s+(?:\w+\s+)?\w+|something|someone)\s+$", _END),  # turning the camera left
]
_LEFT = [
    (rf"{_PLACE}(?!her\b){_THE}\s+{_FAR}$", r"(?!\s+(?:over|behind|luggage)\b)"),
    (rf"{_MOVES}{_HOW}\s+$", _NO_OBJECT),
]
_RIGHT = [
    (rf"{_PLACE}{_THE}\s+{_FAR}$", rf"{_BE}|\s+{_THE}\s"),
    (rf"\b(?:turn|veer|steer|swerv|bear)(?:e|es|s|ed|ing)?{_HOW}\s+$", _NOT_AT_ONCE),
]
_RULES = {
    word: [(_compiled(before), _compiled(after)) for before, after in (*_BOTH, *own)]
    for word, own in (("left", _LEFT), ("right", _RIGHT))
}
_IN_ROW = _compiled(
    r"(?=(left|right)\b\s*(?:,|/|&|-to-|-|\b(?:and|or|to|then)\b)(?:\s*\b(?:and|then|the|to the)\b)?\s*(left|right)\b"
    rf"(?!\s+(?:away|after|before|now|{_THE})\b))"
)
"""Two directions in a row: left to right, left, then right."""
_ENDS = _compiled(_END)
_BETWEEN = _compiled(rf"\s*(?:\w+\s*)?[,;]?\s*(?:and then|and|or|then|but|while)?\s*(?:(?:{_THE}|one)\s+)?(?:\w+\s+)?")
"""Between two directions: a left turn, then right; one goes left and the other right."""


def mirrored(text: str) -> str:
    """The caption of the mirrored video: left and right change places where they are directions.

    A rule of patterns, not of meaning, that would rather leave a word than change one too many. Directions are: after to,
    on, at, from ("to the left", "on his right"); after a verb of motion ("moving left", "turns sharply right", "pushing
    the box left"); before a part that there are two of ("left hand", "the right lane"); in rows ("from left to right",
    "left, then right"); "top left", "left of a car", "leftmost", "rightwards", "left-handed". Every other use keeps its
    word, be it a verb ("left the room"), an adjective ("the right tool", "is right") or an adverb ("right now", "right
    behind"). So a direction said in another way stays wrong in the mirrored clip: captions that must be right are better
    extracted without --flips.
    """
    in_row = {  # where the words of such rows begin
        start
        for row in _IN_ROW.finditer(text)
        if not _NOT_AFTER.search(text[max(0, row.start() - _NEAR) : row.start()])
        for start in (row.start(1), row.start(2))
    }
    made, end, after_one = [], 0, False
    for found in _WORDS.finditer(text):
        word = found[0].lower()
        before = text[max(end, found.start() - _NEAR) : found.start()]
        after = text[found.end() : found.end() + _NEAR]
        follows = after_one and _BETWEEN.fullmatch(before) is not None and _ENDS.match(after) is not None
        swap = found.start() in in_row or _is_direction(word, before, after, follows)
        made += [text[end : found.start()], _cased(_SWAPPED[word], found[0]) if swap else found[0]]
        end, after_one = found.end(), swap
    return "".join([*made, text[end:]])


def _is_direction(word: str, before: str, after: str, follows: bool) -> bool:
    """Whether `word`, left or right, is one between these texts; follows: on another that is."""
    fits = follows or any(first.search(before) and then.match(after) for first, then in _RULES[word])
    return fits and not _NOT_AFTER.search(before)


def _cased(word: str, like: str) -> str:
    return word.upper() if like.isupper() else word.capitalize() if like[0].isupper() else word
