"""Class names for prompts from the names of folders."""

from itertools import pairwise


def words(folder: str) -> str:
    """A folder's name with underscores and CamelCase taken apart, spelled as it is otherwise.

    "black_tern", "BlackTern" and "black tern" are the same to CLIP, whose tokenizer ignores case.
    Capitals in a row stay together, up to the one that begins a word: "HTMLPage" is "HTML Page",
    while "USA" and "DVDs" are one word. So are "iPhone" and "McLaren". A number is parted from a
    capitalised word: "RedCircle2" is "Red Circle 2"; "MP4-12C" and "B2" stay. A name with spaces
    is words already: "BMW ActiveHybrid 5" is what its author wrote.
    """
    if " " in folder.strip():
        return folder.replace("_", " ")
    return " ".join(_apart(word) for word in folder.replace("_", " ").split()) or folder


def _apart(word: str) -> str:
    """A word with spaces where another begins within it."""
    starts = [0, *(i for i in range(1, len(word)) if _begins(word[:i], word[i:])), len(word)]
    return " ".join(word[a:b] for a, b in pairwise(starts))


def _begins(before: str, rest: str) -> bool:
    """Whether a new word begins with `rest`."""
    last, first = before[-1], rest[0]
    if first.isupper() and last.islower():
        return len(before) > 1 and not before.endswith("Mc")
    if first.isupper() and last.isalnum():  # a capital or a digit
        return rest[1:3].islower() and len(rest) > 2 and any(map(str.isalpha, before))
    if first.isdigit() and last.islower():
        return len(before) > 2 and before != before.lower()
    return False
