"""Stores what transformers computes of images: tests/goldens/vision_SECTION.json, read by tests/models/vision.

A tool of developers: needs torch and transformers, which the tests do without. Run it from the repository's root with
an environment that has both: PYTHONPATH=. python scripts/make_vision_goldens.py [SECTION ...]

A section is a module beside this one, vision_goldens_SECTION.py, whose function `make` returns what JSON can hold.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "tests" / "goldens"


def main() -> None:
    here = Path(__file__).parent
    known = sorted(p.stem.removeprefix("vision_goldens_") for p in here.glob("vision_goldens_*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"all of: {', '.join(known)}"
    )
    for section in parser.parse_args().sections or known:
        golden = import_module(f"vision_goldens_{section}").make()
        path = FOLDER / f"vision_{section}.json"
        # A line for each entry: a change of one shows as one line.
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
