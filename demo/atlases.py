"""The things of the demo's world, each drawn in eight designs, and the script that collects the drawings.

    python -m delta_llava.demo.atlases --output_dir demo/atlases      # needs npm, and `pip install resvg_py`

An atlas is one WebP file for each design: 12 crops of 64x64 pixels in a row, in the order of `THINGS`, cut from
pinned npm packages. `atlases/LICENSES.md` names their authors and licences.

Of 118 common emoji, the things are those that all designs have, whose English names are plain and in the singular, and
that a small convolutional network recognizes across authors: trained on all training designs except one author's, it
named at least 75 % of that author's crops at 18 to 24 pixels, on average over five authors (the network is not kept
here). Beyond having to draw them all, OpenMoji had no say.
"""

import argparse
import functools
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


FOLDER = Path(__file__).parent / "atlases"
CROP_SIZE, CROPS_PER_ROW = 64, 12
# By group, each thing's name (from CLDR's names and keywords) and its code point.
CODE_POINTS = {
    "animals": {
        "panda": "1f43c", "mouse": "1f42d", "frog": "1f438", "monkey": "1f435", "tiger": "1f42f", "bear": "1f43b",
        "snail": "1f40c", "elephant": "1f418", "cow": "1f42e", "rabbit": "1f430", "cat": "1f431", "pig": "1f437",
        "fish": "1f41f", "penguin": "1f427", "beetle": "1f41e",
    },
    "foods": {
        "bread": "1f35e", "donut": "1f369", "eggplant": "1f346", "hamburger": "1f354", "cookie": "1f36a",
        "cherry": "1f352", "mushroom": "1f344", "peach": "1f351", "pear": "1f350", "melon": "1f349", "corn": "1f33d",
        "lollipop": "1f36d", "pizza": "1f355", "strawberry": "1f353",
    },
    "vehicles": {
        "car": "1f697", "rocket": "1f680", "taxi": "1f695", "bus": "1f68c", "tractor": "1f69c", "sailboat": "26f5",
        "helicopter": "1f681", "bicycle": "1f6b2", "train": "1f682", "ambulance": "1f691", "ship": "1f6a2",
        "truck": "1f69a", "airplane": "2708",
    },
    "clothes": {
        "boot": "1f462", "heel": "1f460", "shirt": "1f455", "handbag": "1f45c", "ring": "1f48d", "dress": "1f457",
        "bikini": "1f459", "crown": "1f451", "tie": "1f454",
    },
    "tools": {
        "key": "1f511", "lock": "1f512", "hammer": "1f528", "bulb": "1f4a1", "pencil": "270f", "bolt": "1f529",
        "brush": "1f58c", "paperclip": "1f4ce", "knife": "1f52a", "wrench": "1f527",
    },
    "plants": {
        "cactus": "1f335", "sunflower": "1f33b", "maple": "1f341", "fir": "1f332", "palm": "1f334", "clover": "1f340",
        "tulip": "1f337", "rose": "1f339",
    },
}  # fmt: skip
GROUPS = {group: tuple(things) for group, things in CODE_POINTS.items()}
THINGS = tuple(thing for things in GROUPS.values() for thing in things)
# The package that each design is taken from.
DESIGNS = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojitwo": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto-2016": "@iconify-json/noto-v1@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
}
HELD_OUT_DESIGN = "openmoji"
# FxEmoji's names where they differ from Unicode's; none has a hyphen.
FXEMOJI = {
    "monkey-face": "monkeyface", "mouse-face": "mouse", "tiger-face": "tiger", "cow-face": "cowface", "pig-face": "pig",
    "rabbit-face": "bunny", "cat-face": "cat", "lady-beetle": "ladybeetle", "panda": "pandaface",
    "eggplant": "aubergine", "ear-of-corn": "earofmaize", "pizza": "sliceofpizza", "delivery-truck": "deliverytruck",
    "locomotive": "steamlocomotive", "womans-boot": "boot", "high-heeled-shoe": "heels", "t-shirt": "mansshirt",
    "necktie": "tie", "light-bulb": "lightbulb", "nut-and-bolt": "nutandbolt", "locked": "lock",
    "paintbrush": "lowerleftpaintbrush", "kitchen-knife": "hocho", "maple-leaf": "mapleleaf",
    "evergreen-tree": "evergreen", "palm-tree": "palmtree", "four-leaf-clover": "fourleafclover",
}  # fmt: skip


@functools.cache
def crops(design):
    """All crops of a design: `(len(THINGS), 64, 64, 4)` uint8, RGBA."""
    atlas = np.asarray(Image.open(FOLDER / f"{design}.webp").convert("RGBA"))
    rows = atlas.reshape(-1, CROP_SIZE, CROPS_PER_ROW, CROP_SIZE, 4).swapaxes(1, 2)
    return rows.reshape(-1, CROP_SIZE, CROP_SIZE, 4)[: len(THINGS)]


@functools.cache
def crop(design, thing, size, redraw=None):
    """A thing at `size` pixels: `(size, size, 4)` float, 0 to 255, the colours premultiplied by alpha.

    Args:
        redraw (`Callable`, *optional*): called with design and thing, returns the crop to use instead of the atlas's.
    """
    full = (redraw(design, thing) if redraw else crops(design)[THINGS.index(thing)]).astype(np.float32)
    full[..., :3] *= full[..., 3:] / 255
    channels = [Image.fromarray(channel).resize((size, size), Image.Resampling.LANCZOS) for channel in full.T]
    return np.stack(channels, -1).swapaxes(0, 1).clip(0, 255)


def _cut(image):
    """A drawing's visible part, scaled to fit a crop and centred in it."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    image.thumbnail((CROP_SIZE, CROP_SIZE), Image.Resampling.LANCZOS)
    centred = Image.new("RGBA", (CROP_SIZE, CROP_SIZE))
    centred.paste(image, ((CROP_SIZE - image.width) // 2, (CROP_SIZE - image.height) // 2))
    return centred


def _draw_icon(icons, name):
    """Draw an icon of an Iconify package at 256 pixels."""
    import resvg_py

    name = (icons["icons"].keys() & {name} and name) or icons["aliases"][name]["parent"]
    icon = {"left": 0, "top": 0, "width": icons.get("width", 16), "height": icons.get("height", 16)}
    icon |= icons["icons"][name]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="256" height="256" '
        f'viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


def write_atlases(output_dir):
    """Download the packages and write an atlas for each design."""
    with tempfile.TemporaryDirectory() as folder:
        packages = {}
        for design, package in DESIGNS.items():
            command = ["npm", "pack", "--silent", package]
            file = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
            packages[design] = Path(folder) / design
            with tarfile.open(Path(folder) / file) as archive:
                archive.extractall(packages[design], filter="data")
        # Noto's package has Unicode's name of each code point.
        names = json.loads((packages["noto"] / "package" / "chars.json").read_text(encoding="utf-8"))
        points = [point for things in CODE_POINTS.values() for point in things.values()]
        for design, folder in packages.items():
            if (folder / "package" / "icons.json").is_file():
                icons = json.loads((folder / "package" / "icons.json").read_text(encoding="utf-8"))
                icon_names = [names[point] for point in points]
                if design == "fxemoji":
                    icon_names = [FXEMOJI.get(name, name) for name in icon_names]
                drawings = [_draw_icon(icons, name) for name in icon_names]
            else:
                files = [next((folder / "package" / "assets").glob(f"{point}*.webp")) for point in points]
                drawings = [Image.open(file) for file in files]
            rows = -(-len(THINGS) // CROPS_PER_ROW)
            atlas = Image.new("RGBA", (CROPS_PER_ROW * CROP_SIZE, rows * CROP_SIZE))
            for index, drawing in enumerate(drawings):
                row, column = divmod(index, CROPS_PER_ROW)
                atlas.paste(_cut(drawing), (column * CROP_SIZE, row * CROP_SIZE))
            path = Path(output_dir) / f"{design}.webp"
            atlas.save(path, quality=90, method=6)
            print(f"{path}: {len(drawings)} crops, {path.stat().st_size / 1e3:.0f} kB")


def main():
    """Command line of `write_atlases`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atlases(output_dir)


if __name__ == "__main__":
    main()
