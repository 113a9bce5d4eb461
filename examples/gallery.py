"""Every sampler and every condition, on a mixture of two Gaussians and on digits.

The pictures and figures of docs/gallery.md.

    python examples/gallery.py docs
    writes docs/gallery.md and docs/gallery/*.png; networks are kept in runs/gallery
"""

import argparse
from pathlib import Path

import torch

import gallery_conditions
import gallery_digits
import gallery_mixture
import gallery_mnist

PARTS = (gallery_mixture, gallery_mnist, gallery_digits, gallery_conditions)


def main(out, runs="runs/gallery", quick=False):
    """Writes the page; returns the rows of each part, {part: [{column: value}]}."""
    out, runs = Path(out), Path(runs)
    (out / "gallery").mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    text, rows = [HEAD], {}
    for part in PARTS:
        sections, rows[part.__name__] = part.draw(out / "gallery", runs, quick)
        text += sections
    text.append(
        f"\nMade with torch {torch.__version__} on the CPU; "
        "with the training, some twenty minutes of one core.\n"
    )
    (out / "gallery.md").write_text("\n".join(text))
    return rows


HEAD = """# Gallery

`python examples/gallery.py docs` makes this page: it trains what it needs (the networks stay in
`runs/gallery`), draws with every sampler and every condition, and measures. Seeds are fixed. Calls
are network calls per sample.
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", default="docs", help="where gallery.md and gallery/ go"
    )
    parser.add_argument("--runs", default="runs/gallery", help="where trained networks are kept")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few updates and samples, to see that everything runs",
    )
    options = parser.parse_args()
    main(options.folder, options.runs, options.quick)
    print(f"page: {options.folder}/gallery.md")
