"""The `model` section of each architecture.

Torch-free, so that a recipe is checked before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Optional

from lavis.config.schema import ModelConfig, opt
from lavis.core.registry import Registry
from lavis.models.parts import MediaConfig

MODEL_CONFIGS: Registry[type[ModelConfig]] = Registry("model")
"""Architecture name to the dataclass of its section."""

VIT_PRESETS: dict[str, dict[str, Any]] = {
    # EVA-CLIP g/14 without its last block, as BLIP-2 uses it
    "eva_clip_g": {
        "patch_size": 14,
        "embed_dim": 1408,
        "depth": 39,
        "num_heads": 16,
        "mlp_ratio": 6144 / 1408,
        "init_std": 0.02,
        "pos_init_std": 0.02,
    },
}
"""Name of a ViT to its dimensions, keyed as in VitConfig."""


@dataclass
class VitConfig:
    """Dimensions of the EVA ViT. A null takes the value of `vit_model`."""

    patch_size: Optional[int] = opt(None, "side of a patch, pixels", at_least=1)
    embed_dim: Optional[int] = opt(None, "width", at_least=1)
    depth: Optional[int] = opt(None, "number of blocks", at_least=1)
    num_heads: Optional[int] = opt(None, "attention heads", at_least=1)
    mlp_ratio: Optional[float] = opt(None, "hidden width of the MLP / width")
    init_std: Optional[float] = opt(
        None, "standard deviation of new weights; a narrow ViT trained from nothing wants more than 0.02"
    )
    pos_init_std: Optional[float] = opt(None, "standard deviation of new position and class embeddings")


@dataclass
class QFormerConfig:
    """Dimensions of the Q-Former; BERT-base by default."""

    hidden_size: int = opt(768, "width", at_least=1)
    num_hidden_layers: int = opt(12, "layers", at_least=1)
    num_attention_heads: int = opt(12, "attention heads", at_least=1)
    intermediate_size: int = opt(3072, "hidden width of the MLP", at_least=1)
    cross_attention_frequency: int = opt(2, "every which layer looks at the image, from layer 0", at_least=1)
    dropout: float = opt(0.1, "dropout while the Q-Former is trained", at_least=0)
    init_std: float = opt(0.02, "standard deviation of new weights", at_least=0)
    max_position_embeddings: int = opt(512, "longest text, tokens (text branch only)", at_least=1)


@dataclass
class VisionConfig(ModelConfig):
    """EVA ViT, ln_vision, queries and Q-Former: the tower shared by every model that sees."""

    vit_model: str = opt("eva_clip_g", "preset of the ViT's dimensions", choices=("eva_clip_g",))
    vit: VitConfig = opt(VitConfig, "dimensions that differ from the preset")
    image_size: int = opt(224, "side of the input image, pixels", at_least=1)
    media: MediaConfig = opt(MediaConfig, "how pictures reach the model")
    drop_path_rate: float = opt(0.0, "stochastic depth while the ViT is trained", at_least=0)
    use_grad_checkpoint: bool = opt(False, "recompute the ViT's activations in backward (only when it is trained)")
    vit_precision: str = opt("fp16", "type of the frozen ViT's weights on a GPU", choices=("fp16", "bf16", "fp32"))
    freeze_vit: bool = opt(True, "do not train the ViT")
    unfreeze_pos_embed: bool = opt(False, "train the ViT's position embedding even if it is frozen")
    num_query_token: int = opt(32, "vectors an image becomes", at_least=1)
    qformer: QFormerConfig = opt(QFormerConfig, "dimensions of the Q-Former")
    freeze_qformer: bool = opt(True, "do not train the Q-Former and ln_vision")
    freeze_queries: bool = opt(True, "do not train the query vectors")
    vit_pretrained: Optional[str] = opt(
        None, "weight file of the ViT alone (eva_vit_g.pth), when `pretrained` has none"
    )
    load_pretrained: bool = opt(True, "load `vit_pretrained` and `pretrained`")
    pretrained: Optional[str] = opt(None, "weight file of the vision tower and Q-Former")
    load_finetuned: bool = opt(False, "load `finetuned` on top")
    finetuned: Optional[str] = opt(
        None, "weight file of what was trained: a projection, or trainable.safetensors of a checkpoint"
    )

    def vit_dimensions(self) -> dict[str, Any]:
        """Dimensions of the ViT: the preset's, with what `vit` overrides."""
        return VIT_PRESETS[self.vit_model] | {k: v for k, v in asdict(self.vit).items() if v is not None}


@MODEL_CONFIGS.register("minigpt4qwen")
@dataclass
class MiniGPT4QwenConfig(VisionConfig):
    """A vision tower, one linear layer and a chat LLM."""

    qformer_text_input: bool = opt(False, "give the question to the Q-Former", choices=(False,))
    llm_model: str = opt("ckpt/Qwen7B-chat", "folder of the LLM and its tokenizer, or a name on the Hugging Face hub")
    llm_device_map: Optional[str] = opt(None, "where the LLM's layers go in chat", choices=(None, "cpu", "auto"))
    llm_quantization: Optional[str] = opt(
        None, "type of a frozen LLM's weights, if not that of the device (bitsandbytes)", choices=(None, "int8", "int4")
    )
    freeze_llm: bool = opt(True, "do not train the LLM")
    freeze_proj: bool = opt(False, "do not train the linear layer between Q-Former and LLM")
    get_lora: bool = opt(False, "train LoRA adapters on the parts in lora_parts")
    lora_parts: list[str] = opt(["llm"], "parts that get adapters", choices=("llm", "vit", "qformer"))
    lora_r: int = opt(8, "rank of the adapters", at_least=1)
    lora_alpha: float = opt(32, "scale of the adapters times their rank", at_least=0)
    lora_dropout: float = opt(0.05, "dropout before the adapters", at_least=0)
    max_txt_len: int = opt(512, "longest sample, tokens, images included", at_least=8)
    llm_grad_checkpoint: Any = opt(
        "auto",
        "recompute the LLM's activations in backward: less memory, slower; auto = on a GPU, where the plan of the run"
        " does not fit without",
        choices=("auto", True, False),
    )
    enable_autocast: bool = opt(True, "as `run.amp`; both must be true")

    @property
    def recomputes_llm(self) -> bool:
        """Whether the LLM's activations are recomputed; a runner has settled `auto` before it builds a model."""
        return self.llm_grad_checkpoint is True


@MODEL_CONFIGS.register("blip2_qformer")
@dataclass
class Blip2QFormerStage1Config(VisionConfig):
    """The vision tower with the Q-Former's text branch, for BLIP-2's first stage."""

    tokenizer: str = opt("ckpt/bert-base-uncased", "folder of the tokenizer that captions are read with")
    embed_dim: int = opt(256, "width of the contrastive space", at_least=1)
    max_txt_len: int = opt(32, "longest caption, tokens", at_least=4)
    itc_weight: float = opt(1.0, "weight of the image-text contrastive loss", at_least=0)
    itm_weight: float = opt(1.0, "weight of the image-text matching loss", at_least=0)
    itg_weight: float = opt(1.0, "weight of the image-grounded text generation loss", at_least=0)


@MODEL_CONFIGS.register("causal_lm")
@dataclass
class CausalLMConfig(ModelConfig):
    """A text-only causal LM of transformers: an existing one, or a new one from dimensions."""

    llm_model: Optional[str] = opt(None, "folder of an existing LLM; null makes one from `llm_config`")
    llm_config: dict[str, Any] = opt({}, "transformers configuration of a new LLM: model_type, hidden_size, ...")
    tokenizer: Optional[str] = opt(None, "folder of the tokenizer; null takes llm_model's")
    max_txt_len: int = opt(512, "longest sample, tokens", at_least=8)
    llm_grad_checkpoint: bool = opt(False, "recompute activations in backward: less memory, slower")


@MODEL_CONFIGS.register("byte_level_bpe")
@dataclass
class ByteLevelBPEConfig(ModelConfig):
    """A byte-level BPE tokenizer with ChatML control tokens, learned from the datasets' text."""

    vocab_size: int = opt(1024, "tokens, the 256 bytes and the control tokens included", at_least=300)
    min_frequency: int = opt(2, "how often a pair must occur to be merged", at_least=1)
    add_prefix_space: bool = opt(
        False, "begin every text with a space, so that its first word is the same token as inside a text"
    )
    split_pattern: Optional[str] = opt(None, "regular expression of words that are never merged with their neighbours")
