"""Texts on which tokenizers differ, for training and comparing them."""

_WORDS = (
    "the of and to in is was for on that with as at by it from are which "
    "this be an or had not have were their one all has been can more when "
    "model token gradient policy opponent response prompt language learning"
).split()

_NAMES = ("Ada", "Grace", "Kurt", "Émilie", "Søren", "Zoë", "Łukasz")

CODE = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n\tprint(i)\n\n\n\tif i % 2:\n\t\tcontinue\n",
    "class A(B):\n    '''Doc.'''\n\n    def __init__(self):\n        pass\n",
    'int main(void) {\n  printf("%d\\n", 0x1F);\n  return 0;\n}\n',
    "SELECT * FROM t WHERE a >= 1.5e-3 AND b <> 'x''y';",
    '<div class="a b">\n  <!-- c -->&nbsp;\n</div>\n',
    '{"key": [1, 2, null, true], "nested": {"a": -0.5}}',
    "\\frac{a}{b} + \\sum_{i=1}^{n} x_i^2 \\leq 3",
    "git commit -m \"fix: don't\" && echo $HOME | sed 's/a/b/g'",
    "x = lambda *a, **k: {**k, 'n': len(a)}  # noqa: E731",
    "λ = μ ** 2 if μ != 0 else ~0",
    "\tindented\n\t\tmore\n  \t mixed \t\n",
]

SPACES = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    " \n ",
    "a  b   c    d     e",
    " leading",
    "   three leading",
    "trailing ",
    "trailing   ",
    "a\n\nb\n\n\n\nc",
    "a\r\nb\r\n\r\nc",
    "line\n    four\n        eight\n",
    "a\u00a0b\u2003c\u3000d\u200bE",
    "word \n\n  word",
    "....   ....\n...",
]

DIGITS = [
    "0123456789",
    "3.14159 2,718 1e-5",
    "1234567890123456789",
    "٠١٢٣٤٥٦٧٨٩",
    "१२३४५ ६७८९०",
    "１２３ ４５",
    "²³¹ ½ ⅔ Ⅷ ⑫",
    "2026-11-23T07:36:04Z",
    "1 234 567,89 €",
    "a1b22c333d4444",
]

SCRIPTS = [
    "Ünïcödé naïve café",
    "cafe\u0301 vs café",
    "日本語のテキストです。",
    "中文，没有空格。再来一句！",
    "한국어 텍스트",
    "Привет, мир! Ёжик",
    "Ελληνικά άλφα",
    "שלום עולם",
    "مرحبا بالعالم، كيف الحال؟",
    "abc שלום 123 مرحبا xyz",
    "\u202bright to left\u202c",
    "हिन्दी में वाक्य",
    "ไทยไม่มีช่องว่าง",
    "🙂🙃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈",
    "emoji🔥in🔥words",
    "ﬁ ﬂ ﬀ ① ™ ℃ Å",
    "I'm you're she'd we'll they've it's o'clock DON'T",
    "“quotes” ‘single’ — dash – … «g»",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉",
    "\x00\x01\x7f control",
    "\ufeffbom and \ufffd replacement",
    "ß ẞ İ ı ſ",
    "A\u0300\u0301\u0302 stacked",
]

MARKUP = [
    "<s>",
    "</s>",
    "a</s>b",
    "a </s> b",
    "</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
    "<unk>",
    "<|endoftext|>",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "x<|im_end|>y <|im_end|> z",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|end_of_text|>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<eos><pad>",
    "<start_of_turn> <end_of_turn>",
    "<|im_start|",
    "|im_end|>",
    "<0x0A> <0x41>",
    "[INST] a [/INST]",
    "<|user|>\n<|system|>",
    "</s></s>",
    "< s > </ s >",
]


def _sentence(index):
    """A text made of counting, the same on every machine."""
    length = 3 + index % 9
    words = [_WORDS[(index * 7 + i * i) % len(_WORDS)] for i in range(length)]
    name = _NAMES[index % len(_NAMES)]
    shapes = (
        f"{name} said: {' '.join(words)}.",
        f"{' '.join(words).capitalize()}? {index * 37}!",
        f"- {words[0]}\n- {words[1]}\n\n{name}'s {words[2]}: {index}%",
        f"{words[0].upper()}_{words[1]}({index}, '{words[2]}')  # {name}",
    )
    return shapes[index % len(shapes)]


TEXTS = [
    *CODE,
    *SPACES,
    *DIGITS,
    *SCRIPTS,
    *MARKUP,
    *(_sentence(index) for index in range(160)),
]
