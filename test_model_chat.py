"""Smoke test of a model: `python test_model_chat.py [flags of cli_demo.py]` answers one question about a picture that
is included.
"""

import sys

from lavis.cli import main
from lavis.core.paths import ASSETS_ROOT

if __name__ == "__main__":
    picture = str(ASSETS_ROOT / "shapes" / "pictures" / "green_stars.png")
    sys.exit(main(["chat", "--question", "What is in the picture?", "--image", picture, *sys.argv[1:]]))
