"""Talk with a trained model in the browser: `python webui_demo.py --model-type qwen7b_chat -c model.pth`."""

import sys

from lavis.cli import main

if __name__ == "__main__":
    sys.exit(main(["web", *sys.argv[1:]]))
