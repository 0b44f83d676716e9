"""Talk with a trained model in the terminal: `python cli_demo.py -c model.pth`, or `--model-type shapes` for the one
that is included.
"""

import sys

from lavis.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
