"""What the web page says, in English and in Chinese."""

from __future__ import annotations

LANGUAGES = ("en", "zh")

TEXT: dict[str, tuple[str, str]] = {
    "about": ("Ask about pictures, in English or Chinese.", "用中文或英文就图片提问。"),
    "text_only": ("This model reads text only.", "该模型只能读文字。"),
    "chat": ("Conversation", "对话"),
    "empty": (
        "### Show me a picture\nAdd one or more below and ask about them, or start from one of these.",
        "### 给我看一张图片\n在下方添加一张或多张图片并提问，或从下面的例子开始。",
    ),
    "empty_text": ("### Ask me something", "### 问我点什么"),
    "box": ("Ask something. Pictures: the paper clip, drop or paste.", "请输入问题。图片：点击回形针，或拖放、粘贴。"),
    "box_text": ("Ask something.", "请输入问题。"),
    "kept": ("Pictures for the next question", "下一个问题的图片"),
    "regenerate": ("Regenerate", "重新生成"),
    "undo": ("Undo", "撤销"),
    "clear": ("Clear history", "清除历史"),
    "restart": ("Restart", "重新开始"),
    "settings": ("Settings", "设置"),
    "do_sample": ("Sampling", "随机采样"),
    "do_sample_info": ("Draw words by chance; off: take the likeliest.", "按概率随机选词；关闭时总取最可能的词。"),
    "num_beams": ("Beams", "集束搜索宽度"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k", "Top-k"),
    "max_new_tokens": ("Longest answer (tokens)", "最长回答（token）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed", "随机种子"),
    "no_answer": ("(no answer)", "（没有回答）"),
    "bad_picture": ("This picture can't be used: {why}", "无法使用该图片：{why}"),
    "no_question": ("Type a question first.", "请先输入问题。"),
    "no_history": ("Nothing has been asked yet.", "还没有提过问题。"),
    "busy": ("An answer is still on its way: stop it first.", "回答尚未结束，请先停止。"),
    "too_many": ("At most {most} pictures in a conversation.", "一次对话最多 {most} 张图片。"),
    "failed": ("Something went wrong; the server's log says what.", "出错了，详情见服务器日志。"),
}
"""Key to (English, Chinese)."""

EXAMPLES: tuple[tuple[str, str, str], ...] = (
    ("green_stars.png", "What is in the picture?", "图里有什么？"),
    ("blue_squares.png", "How many shapes do you see?", "图片里有几个图形？"),
    ("red_triangles.png", "What shape do you see?", "这里是哪种形状？"),
    ("black_circles.png", "What color do you see?", "你看到什么颜色？"),
)
"""Picture in assets/shapes/pictures, English question, Chinese question."""


def text(key: str, lang: str) -> str:
    """The words for `key` in `lang`."""
    return TEXT[key][LANGUAGES.index(lang)]
