"""The official VQA evaluation's normalization of answers, which several metrics share."""

import re


# A mark next to a space is removed, one inside a word becomes a space. Apostrophes and colons stay: "girl's", "2:50 pm"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# The official table lists each of these words with any one of its apostrophes missing. Its entries with a capital I
# are left out, because it looks up words in lower case: "im" stays "im"
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:position] + word[position + 1 :]: word
    for word in CONTRACTED.split()
    for position, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round, as in the official table


def normalize_answer(answer: str, keep_articles: bool = False) -> str:
    """
    The form in which the official VQA evaluation compares answers.

    Lower case, no punctuation or full stops, number words as digits, no articles, missing apostrophes of contractions
    added. If there is a comma between digits, all marks of the answer are removed without leaving a space.

    Args:
        answer (`str`): An answer as it was given.
        keep_articles (`bool`, *optional*, defaults to `False`): Keep "a", "an" and "the".

    Returns:
        `str`: The normalized answer, with single spaces. Empty if only punctuation and articles were given.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    joins = COMMA_IN_NUMBER.search(answer)
    marks = {
        ord(mark): "" if joins or f"{mark} " in answer or f" {mark}" in answer else " "
        for mark in PUNCTUATION
        if mark in answer
    }
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", answer.translate(marks)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if keep_articles or word not in ARTICLES)


def comparable(answer: str) -> str:
    """
    The form in which answers are compared, empty only for a blank answer: the normalized answer, with its articles or
    unchanged if nothing would be left of it.
    """
    return normalize_answer(answer) or normalize_answer(answer, keep_articles=True) or answer.strip()
