"""`lavis chat` on the shapes model, which answers $ANSWER, a token each $PAUSE seconds; the flags follow."""

import os
import sys
import time

import lavis.generation.engine
from lavis.cli import main
from lavis.core.paths import ASSETS_ROOT
from lavis.generation.sampling import Chooser


class Scripted(Chooser):
    """Chooses the tokens of the text, then the end."""

    plain = False

    def __init__(self, settings, seed, ids):
        from transformers import AutoTokenizer

        super().__init__(settings, seed, ids)
        tokenizer = AutoTokenizer.from_pretrained(ASSETS_ROOT / "shapes" / "llm_b")
        self.script = iter(
            [
                *tokenizer.encode(os.environ["ANSWER"], add_special_tokens=False),
                tokenizer.convert_tokens_to_ids("<|im_end|>"),
            ]
        )

    def __call__(self, logits):
        time.sleep(float(os.environ["PAUSE"]))
        return next(self.script)


lavis.generation.engine.Chooser = Scripted
sys.exit(main(["chat", "--model-type", "shapes", *sys.argv[1:]]))
