"""The demo's held-out questions as a task of lmms-eval: writes their table and scores the answers.

    python -m delta_llava.demo.lmms_scenes --scenes demo/out/scenes
    python -m delta_llava.evaluation.run --suite demo/lmms_eval/suite.yaml --checkpoint demo/out/checkpoint \
        --num_visual_tokens 144 36 16 9 4 1

The task itself is `demo/lmms_eval/tasks/delta_llava_scenes.yaml`, which names the functions below.
"""

import argparse
import json
from pathlib import Path

import datasets
import evaluate

from ..evaluation import metrics


def write_table(scenes):
    """Write the held-out questions with their pictures to one Parquet file.

    Args:
        scenes (`str` or `Path`): folder that delta_llava.demo.scenes wrote; receives `held_out.parquet`.

    Returns:
        The file, a `Path`, with the columns `id`, `image` (the picture itself), `type`, `question` and `answer`.
    """
    folder = Path(scenes)
    rows = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    columns = {name: [row[name] for row in rows] for name in ("id", "type", "question", "answer")}
    # As bytes: Parquet would store a path as a path.
    files = [folder / "images" / row["image"] for row in rows]
    columns["image"] = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(folder / "held_out.parquet")
    return folder / "held_out.parquet"


def process_results(doc, results):
    """What lmms-eval keeps of one answer: the pair that [`exact_match`] needs."""
    return {"exact_match": {"prediction": results[0], "reference": doc["answer"]}}


def exact_match(pairs):
    """Share of right answers, from 0 to 1, by the package's own metric, which ignores case and punctuation."""
    metric = evaluate.load(str(Path(metrics.__file__).parent / "exact_match"))
    columns = {name: [pair[name] for pair in pairs] for name in ("prediction", "reference")}
    scores = metric.compute(predictions=columns["prediction"], references=columns["reference"])
    return scores["exact_match"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", default=Path(__file__).parent / "out" / "scenes", help="(default: the demo's)")
    print(f"written: {write_table(parser.parse_args().scenes)}")


if __name__ == "__main__":
    main()
