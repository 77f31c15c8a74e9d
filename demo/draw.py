"""Draws a scene of your own, to ask about with `delta_llava.demo.ask`.

    python -m delta_llava.demo.draw "a1 cat, c3 big bus" --output scene.png
    python -m delta_llava.demo.ask scene.png "What is at d4?"

Columns are a to d, rows 1 to 4; a big thing covers the quadrant at a1, c1, a3 or c3. An unknown thing is an error that
lists the known ones, and two things in one place are an error that names both.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from . import atlases, scenes


def main(arguments=None):
    """Command line: writes the picture, or one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", help="things at places, for example 'a1 cat, c3 big bus'")
    parser.add_argument("--output", type=Path, default=Path("scene.png"), help="(default: %(default)s)")
    designs = f"whose emoji; no training sees {atlases.HELD_OUT_DESIGN} (default: %(default)s)"
    parser.add_argument("--design", choices=atlases.DESIGNS, default="noto", help=designs)
    parser.add_argument("--seed", type=int, default=0, help="of background, sizes and positions (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.seed < 0:
            raise ValueError(f"--seed {options.seed} is negative: name 0 or more")
        kind = Image.registered_extensions().get(options.output.suffix.lower())
        if kind not in Image.SAVE or kind not in Image.OPEN:
            raise ValueError(f"--output {options.output} is not a picture file: name one such as scene.png")
        layout = scenes.parse(options.scene)
        picture = scenes.render(layout, np.random.default_rng(options.seed), options.design)
        Image.fromarray(picture).save(options.output)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
